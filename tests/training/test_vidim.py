"""VIDIM-Bench: which frames become clips, how they are resized, and what is scored on which."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("PIL")
pytest.importorskip("av")
from PIL import Image

from fastvid.cli import main
from fastvid.data.frames import read_image
from fastvid.data.video import write_mp4
from fastvid.data.vidim import (
    COUNTS,
    prepare_davis,
    prepare_ucf101,
    prepared,
    square_in_linear_light,
)
from fastvid.diffusion.schedule import linear
from fastvid.metrics import FVD, ssim
from fastvid.training import vidim
from fastvid.training.codec import PixelCodec
from fastvid.training.vidim import PUBLISHED, format_vidim, score_vidim


@pytest.fixture
def davis(tmp_path):
    """Two shots of 20 and 8 frames, 30 x 48; the level of a frame is its number."""
    for shot, frames in (("bear", 20), ("swan", 8), ("cows", 9)):
        folder = tmp_path / "DAVIS" / "JPEGImages" / "480p" / shot
        folder.mkdir(parents=True)
        for number in range(frames):
            level = (10 * number,) * 3
            Image.new("RGB", (48, 30), level).save(folder / f"{number:05d}.jpg", quality=100)
    return tmp_path / "DAVIS"


def levels(clip):
    return [round(read_image(path).float().mean().item()) for path in clip]


def test_davis_becomes_chunks_of_nine_without_the_rest(davis, tmp_path):
    assert prepare_davis(davis, tmp_path / "out", count=None) == 3
    clips = prepared(tmp_path / "out", count=3)
    assert [path.relative_to(tmp_path / "out").as_posix() for path in clips[0]][::8] == [
        "0000/frame_000.png",
        "0000/frame_008.png",
    ]
    assert levels(clips[0]) == pytest.approx(range(0, 90, 10), abs=2)  # bear
    assert levels(clips[1]) == pytest.approx(range(90, 180, 10), abs=2)
    assert levels(clips[2]) == pytest.approx(range(0, 90, 10), abs=2)  # cows; swan is too short
    assert read_image(clips[0][0]).shape == (3, 256, 256)


@pytest.mark.parametrize("prepare", [prepare_davis, prepare_ucf101])
def test_another_number_of_clips_is_refused_before_anything_is_written(davis, tmp_path, prepare):
    if prepare is prepare_ucf101:
        (davis / "ucfTrainTestlist").mkdir()
        (davis / "ucfTrainTestlist" / "testlist01.txt").write_text("A/a.avi\n")
        write_mp4(davis / "a.mp4", torch.zeros(9, 3, 32, 32, dtype=torch.uint8), 25)
        (davis / "a.mp4").rename(davis / "a.avi")
    wanted = COUNTS["davis" if prepare is prepare_davis else "ucf101"]
    with pytest.raises(ValueError, match=f"must hold {wanted} clips of 9 frames, got"):
        prepare(davis, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_published_numbers_of_clips():
    assert COUNTS == {"davis": 357, "ucf101": 400}


def test_ucf101_takes_the_first_clips_of_the_test_list(tmp_path, rand):
    (tmp_path / "ucf" / "ucfTrainTestlist").mkdir(parents=True)
    listing = tmp_path / "ucf" / "ucfTrainTestlist" / "testlist01.txt"
    listing.write_text("B/second.mp4\nA/first.mp4\n")
    for name, frames, level in (("A/first", 30, 200), ("B/second", 20, 50), ("A/train", 30, 90)):
        path = tmp_path / "ucf" / f"{name}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_mp4(path, torch.full((frames, 3, 48, 64), level, dtype=torch.uint8), 25)
    assert prepare_ucf101(tmp_path / "ucf", tmp_path / "out", count=4) == 4
    clips = prepared(tmp_path / "out", count=4)
    means = [levels(clip)[0] for clip in clips]
    assert means == pytest.approx([50, 50, 200, 200], abs=4)
    assert read_image(clips[0][0]).shape == (3, 256, 256)
    (tmp_path / "ucf" / "A" / "first.mp4").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 videos of the test split: first\.mp4"):
        prepare_ucf101(tmp_path / "ucf", tmp_path / "again", count=4)


def test_light_is_averaged_not_levels():
    """Half black and half white is half the light: 255 x 0.5^(1 / 2.2) = 186, not 128."""
    image = torch.zeros(3, 512, 600, dtype=torch.uint8)
    image[:, ::2] = 255
    made = square_in_linear_light(image)
    assert made.shape == (3, 256, 256)
    assert made.unique().tolist() == [186]


def test_the_centre_is_kept_and_uneven_pixels_are_shared():
    image = torch.zeros(1, 480, 854, dtype=torch.uint8).expand(3, -1, -1).clone()
    image[:, :, (854 - 480) // 2 : (854 + 480) // 2] = 255
    assert square_in_linear_light(image).min() == 255
    light = torch.rand(3, 480, 480, generator=torch.Generator().manual_seed(0)) * 255
    made = square_in_linear_light(light.to(torch.uint8)).double().div(255) ** 2.2
    whole = light.to(torch.uint8).double().div(255) ** 2.2
    assert made.mean().item() == pytest.approx(whole.mean().item(), rel=1e-3)  # nothing is lost
    small = square_in_linear_light(torch.full((3, 100, 120), 77, dtype=torch.uint8))
    assert small.unique().tolist() == [77]


class Blend(nn.Module):
    """x0 is the mean of the two given frames."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(frames=9)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, latents, timestep, *, known):
        assert known.tolist() == [[True, *[False] * 7, True]] * len(known)
        return ((latents[:, :, :1] + latents[:, :, -1:]) / 2).expand_as(latents)


@pytest.fixture
def clips(tmp_path, rand):
    """Two clips of 16 x 16 noise, as PNG."""
    for number in range(2):
        folder = tmp_path / "set" / f"{number:04d}"
        folder.mkdir(parents=True)
        for index in range(9):
            frame = rand(16, 16, 3).mul(60).add(128).clamp(0, 255).to(torch.uint8)
            Image.fromarray(frame.numpy()).save(folder / f"frame_{index:03d}.png")
    return prepared(tmp_path / "set")


def test_each_metric_sees_its_frames(clips):
    seen = {"lpips": [], "fid": [], "fvd": []}

    def lpips(video, target):
        seen["lpips"].append((video, target))
        return (video - target).abs().mean((1, 3, 4))

    def fid(frames):
        seen["fid"].append(frames)
        return frames.flatten(1)[:, :4]

    def detector(video):
        seen["fvd"].append(video)
        return video.flatten(1)[:, :2]

    with pytest.warns(UserWarning, match="biased"):
        result = score_vidim(
            Blend(),
            PixelCodec(4),
            linear(100),
            clips,
            size=16,
            prediction="x0",
            steps=3,
            lpips=lpips,
            fid=fid,
            fvd=FVD(detector, min_frames=9),
        )
    truth = torch.stack([torch.stack([read_image(p) for p in c], 1) for c in clips]) / 255
    (made, target), _ = seen["lpips"]
    torch.testing.assert_close(target, truth[:, :, 4:5])
    torch.testing.assert_close(made[:, :, 0], (truth[:, :, 0] + truth[:, :, 8]) / 2)
    assert [len(frames) for frames in seen["fid"]] == [14, 14, 14]
    assert [tuple(video.shape[1:3]) for video in seen["fvd"]] == [(3, 9)] * 3
    torch.testing.assert_close(seen["fvd"][1][:, :, [0, 8]], truth[:, :, [0, 8]] * 255)
    blend = result["rows"]["linear_blend"]
    assert result["rows"]["model"]["ssim"] == pytest.approx(blend["ssim"], abs=1e-5)
    wanted = ssim(((truth[:, :, :1] + truth[:, :, 8:]) / 2), truth[:, :, 4:5]).mean()
    assert blend["ssim"] == pytest.approx(wanted.item(), abs=1e-5)
    assert set(blend) == {"ssim", "psnr", "lpips", "fid", "fvd"}
    text = format_vidim(result, "davis")
    assert "MarDini-L/T-512 (published)" in text
    assert "2 clips" in text


def test_a_larger_model_is_scored_at_the_size_of_the_clips(clips, monkeypatch):
    sizes, plain = [], vidim.sample_task

    def watched(model, codec, schedule, video, **options):
        sizes.append(video.shape[-1])
        return plain(model, codec, schedule, video, **options)

    monkeypatch.setattr(vidim, "sample_task", watched)
    options = {"prediction": "x0", "steps": 1, "batch": 1}
    result = score_vidim(Blend(), PixelCodec(4), linear(100), clips, size=32, **options)
    assert sizes == [32, 32]
    rows = result["rows"]
    assert rows["model"]["psnr"] == pytest.approx(rows["linear_blend"]["psnr"], abs=1.5)
    assert set(rows["model"]) == {"ssim", "psnr"}
    assert format_vidim(result, "ucf101").splitlines()[1].split()[-3:] == ["-", "-", "-"]


def test_published_tables_hold_their_known_numbers():
    assert PUBLISHED["davis"]["MarDini-L/T-512"] == (0.5085, 0.3083, 25.30, 117.13)
    assert PUBLISHED["ucf101"]["VIDIM"] == (0.6880, 0.1768, 34.48, 278.00)
    assert list(PUBLISHED["davis"]) == list(PUBLISHED["ucf101"])


def test_clips_of_another_length_are_refused(clips):
    clips[0][8].unlink()
    with pytest.raises(ValueError, match="must have 9 frames, got 8"):
        prepared(clips[0][0].parents[1])


def test_the_verb_wants_a_data_set(tmp_path, capsys):
    assert main(["evaluate", "vidim", str(tmp_path)]) == 1
    assert "--davis or --ucf101 must name a folder" in capsys.readouterr().err
