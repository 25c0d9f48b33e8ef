"""`fastvid evaluate` from the shell's side: a tiny run, real files, and every bad input."""

import json

import pytest
import torch

from fastvid.cli import main
from fastvid.data.synthetic import make_motion_clips
from fastvid.models.vdt import VDT, VDTConfig
from fastvid.training.config import CodecConfig, DataConfig, DiffusionConfig, TrainVDT
from fastvid.training.runs import export, load_run

pytest.importorskip("av")
pytest.importorskip("tqdm")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with real files that hold one clip of 8 frames each."""
    folder = tmp_path_factory.mktemp("clips")
    make_motion_clips(folder, clips=5, frames=8, size=32, seed=0)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, clips):
    """A run as `fastvid train` leaves it, with an untrained model."""
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
        data=DataConfig(train=str(clips), validation_share=0.4, frames=8, size=(32, 32)),
        codec=CodecConfig(factor=4),
        diffusion=DiffusionConfig(
            schedule="squared_cosine", prediction="x0", steps=20, given={"predict": 2}
        ),
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    export(folder / "model" / "last", config, VDT(config.model).state_dict())
    return folder


def evaluate(run, *options):
    return main(["evaluate", str(run), "--device", "cpu", "--steps", "2", *map(str, options)])


def test_prints_the_table_and_writes_the_same_numbers(run, clips, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    status = evaluate(
        run, "--task", "interpolate", "--data", clips, "--samples", 2, "--out", out, "--clips", 3
    )
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert status == 0
    assert (result["task"], result["clips"], result["steps"], result["samples"]) == (
        "interpolate",
        3,
        2,
        2,
    )
    for row in ("sample", "one_step_mean", "sample_mean", "copy_nearest", "linear_blend"):
        assert f"{result['rows'][row]['psnr']:.2f}" in printed
        assert f"{result['rows'][row]['ssim']:.4f}" in printed
    assert str(out) in printed


def test_scores_are_those_of_the_plain_model(run, clips, tmp_path, monkeypatch):
    """The verb folds `temporal_fc` away and tracks nothing for autograd."""
    from fastvid.training import evaluate as library

    plain, seen = library.evaluate, []

    def watched(model, *arguments, **options):
        folded = not any("temporal.fc" in name for name, _ in model.named_parameters())
        made = plain(model, *arguments, **options)
        again = plain(load_run(run)[0], *arguments, **options)
        seen.append((folded, torch.is_inference_mode_enabled(), made["rows"], again["rows"]))
        return made

    monkeypatch.setattr(library, "evaluate", watched)
    options = ("--samples", 1, "--clips", 2, "--out", tmp_path / "metrics.json")
    assert evaluate(run, "--task", "predict", "--data", clips, *options) == 0
    ((folded, inference, made, again),) = seen
    assert folded
    assert inference
    assert made.keys() == again.keys()
    assert all(made[row] == pytest.approx(again[row], rel=1e-5) for row in made)


def test_without_data_scores_what_the_run_held_out(run, capsys):
    assert evaluate(run, "--task", "predict", "--samples", 1) == 0
    result = json.loads((run / "metrics-predict.json").read_text())
    assert result["clips"] == 2  # two files of five
    assert result["given"] == 2  # as the run was trained
    assert result["frames"] == 2 * (8 - 2)
    assert result["data"] is None


def test_image_to_video_starts_from_the_first_frame(run, clips, tmp_path):
    out = tmp_path / "metrics.json"
    evaluate(run, "--task", "image-to-video", "--data", clips, "--samples", 1, "--out", out)
    result = json.loads(out.read_text())
    assert (result["task"], result["given"]) == ("image-to-video", 1)
    assert result["frames"] == 5 * 7


def test_a_long_prediction_goes_on_by_windows(run, tmp_path, capsys):
    long = tmp_path / "long"
    make_motion_clips(long, clips=2, frames=28, size=32, seed=1)
    out = tmp_path / "metrics.json"
    options = ("--task", "predict", "--given", 2, "--frames", 28, "--samples", 1, "--out", out)
    assert evaluate(run, "--data", long, *options) == 0
    result = json.loads(out.read_text())
    assert (result["given"], result["frames"], result["windows"]) == (2, 2 * 26, 5)
    assert list(result["rows"]) == ["sample", "copy_nearest", "linear_blend"]


@pytest.fixture
def heard(monkeypatch):
    """What the verb hands to `evaluate`, without the sampling."""
    from fastvid.training import evaluate as module

    calls = []

    def listen(model, codec, schedule, clips, **settings):
        calls.append((clips, settings))
        rows = {"rows": {"sample": {"psnr": 1.0}}, "definitions": {}}
        facts = dict.fromkeys(("clips", "frames", "sampler", "steps", "samples"), 0)
        return rows | facts | {"task": settings["task"]}

    monkeypatch.setattr(module, "evaluate", listen)
    return calls


def test_clips_are_spread_evenly_and_latents_bounded(run, clips, tmp_path, heard):
    options = ("--task", "predict", "--data", clips, "--clips", 2, "--out", tmp_path / "m.json")
    assert evaluate(run, *options) == 0
    ((subset, settings),) = heard
    assert list(subset.indices) == [0, 2]  # of five
    assert (settings["clip"], settings["window"], settings["steps"]) == (1.0, 8, 2)


@pytest.fixture
def of_kind(run, tmp_path):
    """The same run, trained on another kind of data, or otherwise kept."""
    from dataclasses import replace

    from fastvid.training.runs import load_run

    def make(kind, **changes):
        model, config, _ = load_run(run)
        config = replace(config, data=replace(config.data, kind=kind, **changes))
        export(tmp_path / "other" / "model" / "last", config, model.state_dict())
        return tmp_path / "other"

    return make


def test_only_what_is_scored_is_decoded(of_kind, tmp_path, heard, monkeypatch):
    """A run that kept its clips in memory does not decode them all again."""
    from fastvid.data import clips as module

    decoded, read = [], module.read_clip
    monkeypatch.setattr(
        module, "read_clip", lambda path, *a, **k: decoded.append(path) or read(path, *a, **k)
    )
    other = of_kind("clips", cache=True)
    assert evaluate(other, "--task", "predict", "--out", tmp_path / "m.json") == 0
    assert not decoded
    assert [clip["start"] for clip in heard[0][0]] == [0, 0]
    assert len(decoded) == 2


def pictures(folder, name, count):
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (32, 32), (9 * number, 0, 0)).save(folder / name.format(number))


@pytest.mark.parametrize(
    ("kind", "place", "name"),
    [
        ("frames", "drive", "{:03}.png"),
        ("cityscapes", "ulm", "ulm_000001_{:06}_leftImg8bit.png"),
    ],
)
def test_pictures_are_opened_as_the_run_opened_its_own(of_kind, tmp_path, heard, kind, place, name):
    pytest.importorskip("PIL")
    other, count = of_kind(kind), 30 if kind == "cityscapes" else 9
    pictures(tmp_path / "pictures" / place, name, count)
    options = ("--task", "predict", "--data", tmp_path / "pictures", "--out", tmp_path / "m.json")
    assert evaluate(other, *options) == 0
    video = heard[0][0][0]["video"]
    assert video.shape == (3, 8, 32, 32)
    assert video[0, :, 0, 0].mul(127.5).add(127.5).round().tolist() == [9 * t for t in range(8)]


def test_a_run_on_latents_is_scored_on_clips(of_kind, clips, tmp_path, capsys, heard):
    other, out = of_kind("latents"), tmp_path / "m.json"
    assert evaluate(other, "--task", "predict", "--out", out) == 1
    assert "--data must name a folder of clips" in capsys.readouterr().err
    assert evaluate(other, "--task", "predict", "--data", clips, "--out", out) == 0
    assert heard[0][0][0]["video"].shape == (3, 8, 32, 32)


def test_lpips_is_a_column(run, clips, tmp_path, capsys):
    from fastvid.metrics.lpips import WIDTHS, _alexnet

    torch.manual_seed(0)
    backbone = {f"features.{name}": value for name, value in _alexnet().state_dict().items()}
    heads = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate(WIDTHS["alex"])}
    torch.save(backbone, tmp_path / "alexnet.pth")
    torch.save(heads, tmp_path / "heads.pth")
    options = ("--lpips", tmp_path / "alexnet.pth", "--lpips-heads", tmp_path / "heads.pth")
    out = tmp_path / "metrics.json"
    evaluate(run, "--task", "predict", "--data", clips, "--samples", 1, "--out", out, *options)
    result = json.loads(out.read_text())
    assert "LPIPS" in capsys.readouterr().out
    assert result["rows"]["copy_nearest"]["lpips"] > 0
    assert "alex" in result["definitions"]["lpips"]


class TestBadInput:
    """One line that says what to do, no trace, nothing written."""

    @pytest.fixture
    def refuses(self, run, capsys, tmp_path):
        def check(message, *options, of=run):
            out = tmp_path / "metrics.json"
            assert evaluate(of, "--out", out, *options) == 1
            assert message in capsys.readouterr().err
            assert not out.exists()

        return check

    def test_unknown_task(self, run, capsys):
        with pytest.raises(SystemExit):
            evaluate(run, "--task", "guess")
        assert "invalid choice: 'guess'" in capsys.readouterr().err

    def test_no_such_run(self, refuses, tmp_path):
        refuses("neither a run", "--task", "predict", of=tmp_path / "nowhere")

    def test_no_such_folder(self, refuses, tmp_path):
        refuses("nowhere", "--task", "predict", "--data", tmp_path / "nowhere")

    def test_folder_without_videos(self, refuses, tmp_path):
        refuses("no video", "--task", "predict", "--data", tmp_path)

    def test_everything_given(self, refuses, clips):
        refuses("given must", "--task", "predict", "--data", clips, "--given", 8)

    def test_too_many_steps(self, refuses, clips):
        refuses("at most 20", "--task", "predict", "--data", clips, "--steps", 21)

    def test_no_clips(self, refuses, clips):
        refuses("--clips must be", "--task", "predict", "--data", clips, "--clips", 0)

    def test_no_frames(self, refuses, clips):
        refuses("--frames must be", "--task", "predict", "--data", clips, "--frames", 0)

    def test_missing_lpips_file(self, refuses, clips, tmp_path):
        options = ("--task", "predict", "--data", clips, "--lpips", tmp_path / "alexnet.pth")
        refuses("nothing is downloaded", *options)

    def test_missing_fvd_file(self, refuses, clips, tmp_path):
        options = ("--task", "predict", "--data", clips, "--fvd", tmp_path / "i3d.pt")
        refuses("nothing is downloaded", *options)

    def test_another_fvd_file(self, refuses, clips, tmp_path):
        (tmp_path / "i3d.pt").write_bytes(b"code")
        options = ("--task", "predict", "--data", clips, "--fvd", tmp_path / "i3d.pt")
        refuses("TorchScript is code", *options)

    def test_unconditional_without_fvd(self, refuses, clips):
        refuses("only fvd can score it", "--task", "unconditional", "--data", clips)
