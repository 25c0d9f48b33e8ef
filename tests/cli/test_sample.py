"""`fastvid sample` from the shell's side: every task writes its files, bad input is named."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("tqdm")
from PIL import Image

from fastvid.cli import main
from fastvid.data.synthetic import make_motion_clips
from fastvid.data.video import probe, read_clip, write_mp4
from fastvid.models.vdt import VDT, VDTConfig
from fastvid.training.config import CodecConfig, DataConfig, DiffusionConfig, TrainVDT
from fastvid.training.runs import export, load_run


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A clip of 12 frames, 32 x 32."""
    return make_motion_clips(tmp_path_factory.mktemp("clips") / "c", clips=1, frames=12)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as `fastvid train` leaves it, with a random model."""
    config = TrainVDT(
        model=VDTConfig(
            channels=48,
            height=8,
            width=8,
            frames=8,
            dim=16,
            depth=1,
            heads=2,
            class_dropout=0.0,
            learned_variance=False,
        ),
        data=DataConfig(train="clips", frames=8, size=(32, 32)),
        codec=CodecConfig(factor=4),
        diffusion=DiffusionConfig(
            schedule="squared_cosine", prediction="x0", steps=20, given={"predict": 3}
        ),
    )
    torch.manual_seed(0)
    model = VDT(config.model)
    for weight in (model.final.weight, model.modulation.weight):
        torch.nn.init.normal_(weight, std=0.1)
    folder = tmp_path_factory.mktemp("run")
    export(folder / "model" / "last", config, model.state_dict())
    return folder


@pytest.fixture
def sample(run, tmp_path):
    def call(*options):
        arguments = [run, "--device", "cpu", "--steps", 2, "--out", tmp_path, *options]
        return main(["sample", *map(str, arguments)])

    return call


def sheet(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("frames", [8, 12])
def test_samples_are_those_of_the_plain_model(sample, run, clip, monkeypatch, frames):
    """The verb folds `temporal_fc` away and tracks nothing for autograd."""
    from fastvid.training import sample as library

    plain, seen = library.sample_task, []

    def watched(model, codec, *arguments, **options):
        folded = not any("temporal.fc" in name for name, _ in model.named_parameters())
        made = plain(model, codec, *arguments, **options)
        whole = load_run(run)[0]
        if frames > whole.config.frames:
            whole = library.with_frames(whole, frames)
        again = plain(whole, codec, *arguments, **options)
        seen.append((folded, torch.is_inference_mode_enabled(), made.video - again.video))
        return made

    monkeypatch.setattr(library, "sample_task", watched)
    assert sample("--task", "predict", "--input", clip, "--one-pass", "--frames", frames) == 0
    ((folded, inference, difference),) = seen
    assert folded
    assert inference
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize(
    "task",
    ["predict", "backward", "interpolate", "complete", "image-to-video", "unconditional"],
)
def test_every_task_writes_video_picture_and_sheet(sample, clip, tmp_path, task):
    source = [] if task == "unconditional" else ["--input", clip]
    assert sample("--task", task, *source) == 0
    name = "sample" if task == "unconditional" else clip.stem
    info = probe(tmp_path / f"{name}-{task}-seed0.mp4")
    assert (info.frames, info.height, info.width, info.fps) == (8, 128, 128, 12)
    with Image.open(tmp_path / f"{name}-{task}-seed0.gif") as gif:
        assert gif.n_frames > 1  # equal neighbours may be merged
    assert (tmp_path / f"{name}-{task}-seed0.png").is_file()


def test_given_frames_stand_in_the_video(sample, clip, tmp_path):
    assert sample("--task", "predict", "--input", clip, "--given", 2, "--start", 4) == 0
    made = read_clip(tmp_path / f"{clip.stem}-predict-seed0.mp4", size=(32, 32)).float()
    wanted = read_clip(clip, 4, 8).float()
    error = (made - wanted).abs().mean((1, 2, 3))
    assert error[:2].max() < 4 < error[2:].min()


def test_batch_changes_no_result_and_seeds_do(sample, clip, tmp_path):
    task = ["--task", "interpolate", "--input", clip, "--samples", 3, "--seed", 5]
    sheets = []
    for batch in (1, 3):
        assert sample(*task, "--batch", batch, "--out", tmp_path / str(batch)) == 0
        paths = sorted((tmp_path / str(batch)).glob("*.png"))
        assert [p.stem[-1] for p in paths] == ["5", "6", "7"]
        sheets.append([sheet(p) for p in paths])
    for one, three in zip(*sheets, strict=True):
        assert np.abs(one - three).max() <= 1  # a rounding of the levels
    first, second = sheets[0][0][30:], sheets[0][1][30:]  # below the title
    assert np.abs(first - second).max() > 20


@pytest.mark.parametrize("how", [["--window"], ["--window", "--overlap", "5"], ["--one-pass"], []])
def test_long_prediction(sample, clip, tmp_path, how):
    options = ["--task", "predict", "--input", clip, "--given", 2, "--frames", 30]
    assert sample(*options, *how) == 0
    assert probe(tmp_path / f"{clip.stem}-predict-seed0.mp4").frames == 30


def test_takes_several_inputs_of_any_size_and_images(sample, clip, rand, tmp_path):
    wide = tmp_path / "in" / "wide.mp4"
    write_mp4(wide, (rand(9, 3, 50, 90) * 40 + 128).clamp(0, 255).byte(), 25)
    photo = tmp_path / "in" / "photo.png"
    Image.new("RGB", (100, 60), (200, 30, 30)).save(photo)
    out = tmp_path / "out"
    task = ["--task", "image-to-video", "--out", out]
    assert sample(*task, "--input", clip, wide, photo, "--batch", 2, "--stride", 2) == 0
    names = {path.name for path in out.glob("*.mp4")}
    assert names == {f"{n}-image-to-video-seed0.mp4" for n in (clip.stem, "wide", "photo")}
    assert probe(out / "wide-image-to-video-seed0.mp4").fps == 12.5
    first = read_clip(out / "photo-image-to-video-seed0.mp4", 0, 1).float()
    assert (first - torch.tensor([200.0, 30, 30])[:, None, None]).abs().max() < 12


def test_takes_a_folder_of_frames_in_natural_order(sample, tmp_path):
    folder, out = tmp_path / "in" / "drive", tmp_path / "out"
    (folder / "deeper").mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(folder / f"{number}.png")
    Image.new("RGB", (32, 32), (0, 255, 0)).save(folder / "deeper" / "0.png")
    options = ["--task", "predict", "--input", folder, "--out", out, "--start", 1, "--stride", 5]
    assert sample(*options, "--given", 3) == 0
    made = read_clip(out / "drive-predict-seed0.mp4", 0, 3).float()
    assert made[:, 0].mean((1, 2)).tolist() == pytest.approx([20, 120, 220], abs=12)
    assert made[:, 1].mean() < 12


def test_a_folder_without_frames_is_named(sample, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert sample("--task", "predict", "--input", tmp_path / "empty") == 1
    assert f"no image in {tmp_path / 'empty'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "predict"], "--input must name a clip"),
        (["--task", "unconditional", "--input", "CLIP"], "--input must be left out"),
        (["--task", "interpolate", "--input", "CLIP", "--start", "8"], "too short.*needs 5.*has 4"),
        (["--task", "complete", "--input", "CLIP", "--start", "6"], "too short.*needs 8.*has 6"),
        (["--task", "predict", "--input", "CLIP", "--start", "12"], "none from --start 12"),
        (["--task", "predict", "--input", "CLIP", "--given", "8"], "given must be"),
        (["--task", "predict", "--input", "CLIP", "--samples", "0"], "--samples must be"),
        (["--task", "predict", "--input", "nowhere.mp4"], "nowhere.mp4"),
        (
            ["--task", "predict", "--input", "CLIP", "--frames", "20", "--overlap", "8"],
            "overlap must be",
        ),
    ],
)
def test_bad_input_is_named_and_nothing_written(sample, clip, tmp_path, capsys, options, message):
    assert sample(*[clip if option == "CLIP" else option for option in options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastvid sample: ")
    assert re.search(message, error.replace("\n", " "))
    assert not any(tmp_path.iterdir())


def test_unknown_task_lists_the_tasks(sample, clip, capsys):
    with pytest.raises(SystemExit, match="2"):
        sample("--task", "guess", "--input", clip)
    assert "interpolate" in capsys.readouterr().err


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["sample", str(tmp_path), "--task", "unconditional"]) == 1
    assert str(tmp_path) in capsys.readouterr().err
