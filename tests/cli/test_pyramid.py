"""Pyramid Flow from the shell's side: train, continue a clip, make one from nothing, score."""

import json

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("jsonargparse")
pytest.importorskip("tqdm")

from fastvid.cli import main
from fastvid.cli.train import parse
from fastvid.data.synthetic import make_motion_clips
from fastvid.data.video import probe
from fastvid.training.log import read_log
from fastvid.training.recipes import RECIPES

TINY = [
    "--model.heads=1",
    "--model.joint_blocks=1",
    "--model.single_blocks=1",
    "--optim.batch=4",
    "--run.steps=2",
    "--run.validation_clips=2",
    "--run.validate_every=0",
    "--run.sample_every=0",
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "motion"
    return make_motion_clips(folder, clips=4, frames=10, size=32)[0].parent


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pyramid"
    data = ["--data.train", str(clips), "--data.validation_share=0.3"]
    arguments = ["pyramid-demo", *data, *TINY, "--run.folder", str(folder)]
    assert main(["train", *arguments]) == 0
    return folder


def test_options_lie_on_top_of_the_recipe():
    config, _ = parse(["pyramid-demo", "--diffusion.sample_ratios=[1,1]", "--optim.skip_loss=3"])
    recipe = RECIPES["pyramid-demo"]()
    assert config.diffusion.sample_ratios == (1, 1)
    assert config.optim.skip_loss == 3
    assert config.model == recipe.model


def test_a_run_trains_and_validates(run):
    kinds = {line["kind"] for line in read_log(run)}
    assert {"train", "validation"} <= kinds


@pytest.mark.parametrize(
    ("task", "options", "frames"),
    [
        ("predict", [], 8),
        ("predict", ["--given", "2", "--frames", "10"], 10),
        ("image-to-video", [], 8),
        ("unconditional", ["--frames", "3"], 3),
    ],
)
def test_samples_are_written(run, clips, tmp_path, task, options, frames):
    clip = sorted(clips.glob("*.mp4"))[0]
    if task != "unconditional":
        options = [*options, "--input", str(clip)]
    made = [str(run), "--task", task, "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["sample", *made, *options]) == 0
    name = "sample" if task == "unconditional" else clip.stem
    assert probe(tmp_path / f"{name}-{task}-seed0.mp4").frames == frames


def test_scores_are_written(run, clips, tmp_path):
    out = tmp_path / "scores.json"
    options = ["--data", str(clips), "--task", "predict", "--clips", "2", "--out", str(out)]
    options += ["--steps", "2", "--samples", "1", "--device", "cpu"]
    assert main(["evaluate", str(run), *options]) == 0
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert result["sampler"] == "euler"
    assert {"sample", "one_step_mean", "copy_nearest"} <= set(rows)
    assert all(torch.tensor(row["psnr"]).isfinite() for row in rows.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "interpolate"], "task must be one of predict"),
        (["--task", "predict", "--known", "0", "3"], "known must be the first frames"),
        (["--task", "predict", "--guidance", "2"], "guidance must be left out for pyramid"),
    ],
)
def test_bad_input_is_named(run, clips, capsys, options, message):
    clip = str(sorted(clips.glob("*.mp4"))[0])
    assert main(["sample", str(run), *options, "--input", clip, "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err
