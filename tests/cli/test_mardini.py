"""MarDini from the shell's side: a chain of stages, samples of every task, scores."""

import json
from itertools import pairwise

import pytest
import torch
from PIL import Image

pytest.importorskip("av")
pytest.importorskip("jsonargparse")
pytest.importorskip("tqdm")

from fastvid.cli import main
from fastvid.cli.train import parse_chain
from fastvid.data.synthetic import make_motion_clips
from fastvid.data.video import probe, read_clip
from fastvid.training.log import read_log
from fastvid.training.recipes import CHAINS, RECIPES
from fastvid.training.runs import load_run

TINY = [
    "--model.planner.dim=32",
    "--model.planner.depth=1",
    "--model.planner.heads=2",
    "--model.planner.mlp=32",
    "--model.planner.side=4",
    "--model.generator.dim=32",
    "--model.generator.depth=1",
    "--model.generator.heads=2",
    "--model.generator.mlp=32",
    "--data.size=[32, 32]",
    "--data.stride=1",
    "--optim.batch=2",
    "--run.steps=1",
    "--run.validation_clips=2",
    "--run.validate_every=0",
    "--run.sample_every=0",
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "motion"
    return make_motion_clips(folder, clips=4, frames=20, size=32)[0].parent


SHORT = tuple(f"mardini-demo-{name}" for name in ("planner", "dm-c", "joint", "512-t"))


@pytest.fixture(scope="module")
def chain(clips, tmp_path_factory):
    """The folder of some stages, one of each kind, each one step long."""
    root = tmp_path_factory.mktemp("chain") / "runs"
    arguments = ["--data.train", str(clips), "--data.validation_share=0.3", *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHAINS, "mardini-demo", SHORT)
        assert main(["train", "mardini-demo", *arguments, "--run.folder", str(root)]) == 0
    return root


def test_a_chain_runs_every_stage_from_the_one_before(chain):
    folders = sorted(path for path in chain.iterdir())
    assert [folder.name for folder in folders] == ["00-planner", "03-dm-c", "04-joint", "07-512-t"]
    before = None
    for folder in folders:
        model, config, _ = load_run(folder)
        assert config.run.init == ("" if before is None else str(before))
        assert any(line["kind"] == "train" for line in read_log(folder))
        before = folder
    assert config.model.generator.attention == "time"
    assert model.config.frames == 17


def test_a_chain_goes_on_where_it_stopped(chain, clips, capsys, monkeypatch):
    monkeypatch.setitem(CHAINS, "mardini-demo", SHORT)
    resumed = ["train", "mardini-demo", "--run.folder", str(chain), "--resume"]
    runs = parse_chain(resumed[1:])
    assert all(resume and config.run.steps == 1 for config, resume in runs)  # its own values
    assert main(resumed) == 0
    assert capsys.readouterr().out.count("last weights in model/last") == len(SHORT)
    assert main([word for word in resumed if word != "--resume"]) == 1
    assert "--resume" in capsys.readouterr().err


def test_published_stages_follow_each_other():
    runs = [config for config, _ in parse_chain(["mardini"])]
    assert [RECIPES[name]() for name in CHAINS["mardini"]] == runs
    for before, after in pairwise(runs):
        assert after.run.init == before.run.folder
    assert [(c.data.frames, c.data.size[0]) for c in runs] == [
        (4, 256), (4, 256), (4, 256), (9, 256), (9, 256), (9, 512), (17, 512), (17, 512),
        (17, 768), (17, 1024),
    ]  # fmt: skip
    assert [round(c.run.steps * c.optim.batch / 1e6) for c in runs] == [
        200, 20, 80, 40, 75, 40, 40, 40, 20, 5,
    ]  # fmt: skip
    assert {c.stage.trains for c in runs[5:]} == {"both"}
    assert runs[6].model.generator.attention == "clip"
    assert runs[7].model.generator.attention == "time"


@pytest.fixture
def sample(chain, tmp_path):
    run = chain / "04-joint"  # 9 frames

    def call(*options):
        arguments = [run, "--device", "cpu", "--steps", 2, "--out", tmp_path, *options]
        return main(["sample", *map(str, arguments)])

    return call


@pytest.mark.parametrize(
    ("task", "options", "frames"),
    [
        ("image-to-video", [], 9),
        ("interpolate", ["--given", "2"], 9),
        ("interpolate", ["--known", "0", "3", "7"], 9),
        ("middle-frame", [], 9),
        ("expand", ["--frames", "13"], 13),
        ("slow-motion", ["--given", "2", "--frames", "16"], 16),
        ("loop", [], 8),  # its last frame is its first, which is left out
        ("predict", ["--given", "3", "--frames", "11", "--one-pass"], 11),
    ],
)
def test_every_task_writes_its_files(sample, clips, tmp_path, task, options, frames):
    clip = sorted(clips.glob("*.mp4"))[0]
    assert sample("--task", task, "--input", clip, *options) == 0
    assert probe(tmp_path / f"{clip.stem}-{task}-seed0.mp4").frames == frames
    for kind in ("gif", "png"):
        assert (tmp_path / f"{clip.stem}-{task}-seed0.{kind}").is_file()


def test_two_images_are_the_two_ends(sample, tmp_path):
    folder = tmp_path / "ends"
    folder.mkdir()
    for number, level in enumerate((40, 220)):
        Image.new("RGB", (32, 32), (level, level, level)).save(folder / f"{number}.png")
    assert sample("--task", "interpolate", "--given", "2", "--input", folder) == 0
    made = read_clip(tmp_path / "ends-interpolate-seed0.mp4", size=(32, 32)).float()
    assert made[0].mean().item() == pytest.approx(40, abs=6)
    assert made[-1].mean().item() == pytest.approx(220, abs=6)


def test_guidance_is_an_option(sample, clips, tmp_path):
    clip = sorted(clips.glob("*.mp4"))[0]
    made = {}
    for scale in ("1", "2.5"):
        out = ["--out", tmp_path / scale, "--guidance", scale]
        assert sample("--task", "image-to-video", "--input", clip, *out) == 0
        made[scale] = read_clip(next((tmp_path / scale).glob("*.mp4")), size=(32, 32))
    assert made["1"].shape == made["2.5"].shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "unconditional"], "must give whole frames"),
        (["--task", "complete", "--input", "CLIP"], "must give whole frames"),
        (["--task", "interpolate", "--known", "0", "9", "--input", "CLIP"], "--known must name"),
        (["--task", "slow-motion", "--frames", "22", "--input", "CLIP"], "frames must be"),
    ],
)
def test_bad_input_is_named(sample, clips, capsys, options, message):
    clip = str(sorted(clips.glob("*.mp4"))[0])
    assert sample(*[clip if option == "CLIP" else option for option in options]) == 1
    assert message in capsys.readouterr().err


def test_vdt_has_no_guidance(tmp_path, clips, capsys):
    tiny = ["--model.dim=16", "--model.depth=1", "--model.heads=2", "--run.steps=1"]
    run = ["--run.folder", str(tmp_path / "vdt"), "--run.validation_clips=1"]
    assert main(["train", "vdt-demo", "--data.train", str(clips), *tiny, *run]) == 0
    clip = str(sorted(clips.glob("*.mp4"))[0])
    options = ["--task", "predict", "--input", clip, "--guidance", "2"]
    assert main(["sample", str(tmp_path / "vdt"), *options]) == 1
    assert "guidance must be left out for vdt" in capsys.readouterr().err


def test_scores_are_written(chain, clips, tmp_path):
    out = tmp_path / "scores.json"
    options = ["--data", str(clips), "--task", "interpolate", "--given", "2", "--clips", "2"]
    options += ["--steps", "2", "--samples", "1", "--device", "cpu", "--out", str(out)]
    assert main(["evaluate", str(chain / "04-joint"), *options]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {"sample", "one_step_mean", "linear_blend"} <= set(rows)
    assert all(torch.tensor(row["psnr"]).isfinite() for row in rows.values())


def test_vidim_prints_the_model_above_the_published_rows(chain, tmp_path, monkeypatch, capsys):
    from fastvid.data import vidim

    monkeypatch.setitem(vidim.COUNTS, "davis", 2)
    for number in range(2):
        folder = tmp_path / "davis" / f"{number:04d}"
        folder.mkdir(parents=True)
        for index in range(9):
            Image.new("RGB", (256, 256), (20 * index,) * 3).save(folder / f"frame_{index:03d}.png")
    options = ["--davis", str(tmp_path / "davis"), "--steps", "1", "--device", "cpu"]
    assert main(["evaluate", "vidim", str(chain / "04-joint"), *options]) == 0
    printed = capsys.readouterr().out
    assert printed.index("this model") < printed.index("MarDini-L/T-512 (published)")
    result = json.loads((chain / "04-joint" / "vidim" / "vidim.json").read_text())["davis"]
    assert result["clips"] == 2
    # The middle of evenly rising levels is the mean of the ends.
    assert result["rows"]["linear_blend"]["psnr"] > 50
