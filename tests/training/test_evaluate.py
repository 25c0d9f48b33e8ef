"""Scoring: averages over generated frames alone, the rivals always there, repeatable."""

import errno
import json
import os

import pytest
import torch

from fastvid.diffusion.schedule import squared_cosine
from fastvid.metrics import FVD, copy_nearest, linear_blend, psnr
from fastvid.training.codec import PixelCodec
from fastvid.training.evaluate import evaluate, format_table, to_unit, write_json

T, SIDE = 10, 16
CODEC = PixelCodec(4)


@pytest.fixture
def clips():
    """Five clips whose brightness moves: known answers for copying and blending."""
    time = torch.linspace(0, 1, T)[None, None, :, None, None]
    phase = torch.arange(5.0)[:, None, None, None, None]
    place = torch.linspace(0, 3, SIDE)
    return (torch.sin(4 * time + phase + place).expand(5, 3, T, SIDE, SIDE)).clone()


def grey(latents, timestep, *, known):
    """A model that always predicts x0 = 0: grey video."""
    return torch.zeros_like(latents)


def jitter(latents, timestep, *, known):
    """A model whose x0 follows its noisy input: every sample differs."""
    return 0.9 * latents


def score(model, clips, **changes):
    settings = {"task": "predict", "prediction": "x0", "steps": 3, "samples": 2}
    return evaluate(model, CODEC, squared_cosine(20), clips, **settings | changes)


def test_rows_and_columns_of_a_prediction(clips):
    result = score(grey, clips)
    assert list(result["rows"]) == [
        "sample",
        "one_step_mean",
        "sample_mean",
        "copy_nearest",
        "linear_blend",
    ]
    assert all(list(row) == ["psnr", "ssim"] for row in result["rows"].values())
    assert (result["clips"], result["frames"]) == (5, 5 * 2)  # 8 of 10 frames are given
    assert result["definitions"]["psnr"].startswith("PSNR in dB of each frame")
    json.dumps(result)


@pytest.mark.parametrize(("task", "given"), [("predict", 3), ("interpolate", 3), ("backward", 1)])
def test_given_frames_do_not_count(clips, task, given):
    """Every row against its score written out by hand, over generated frames only."""
    from fastvid.diffusion.tasks import task_known

    known = task_known(task, T, 4, 4, given=given).expand(5, T)
    target = to_unit(clips)
    expected = {
        "sample": torch.full_like(target, 0.5),
        "copy_nearest": copy_nearest(target, known),
        "linear_blend": linear_blend(target, known),
    }
    result = score(grey, clips, task=task, given=given)
    assert result["frames"] == 5 * (T - given)
    for row, video in expected.items():
        by_hand = psnr(video, target)[~known].mean().item()
        assert result["rows"][row]["psnr"] == pytest.approx(by_hand, abs=1e-9)


def test_a_perfect_model_is_perfect_and_partly_given_frames_count(clips):
    latents = CODEC.encode(clips)

    def oracle(x, timestep, *, known):
        return latents

    result = score(oracle, clips, task="complete", batch=5)
    assert result["rows"]["sample"]["psnr"] > 90
    assert result["rows"]["sample"]["ssim"] > 0.999
    assert result["rows"]["linear_blend"]["psnr"] < 60
    assert 0 < result["frames"] <= 5 * T


def test_given_pixels_are_the_truth_in_every_row(clips):
    """Half of each frame is given: grey elsewhere must score 3 dB over grey everywhere."""
    seen = {}

    def keep(video, target):
        seen["video"], seen["target"] = video, target
        return psnr(video, target)

    score(grey, clips, task="complete", metrics={"psnr": keep}, samples=1, batch=5)
    same = (seen["video"] == seen["target"]).all(dim=1)
    assert same.flatten(2).double().mean(2).min() > 0.45


def test_result_does_not_depend_on_the_batch_and_repeats(clips):
    whole = score(jitter, clips, batch=5, task="image-to-video")
    parts = score(jitter, clips, batch=2, task="image-to-video")
    assert whole == score(jitter, clips, batch=5, task="image-to-video")
    for row, values in whole["rows"].items():
        assert parts["rows"][row] == pytest.approx(values, rel=1e-6)
    other = score(jitter, clips, batch=5, task="image-to-video", seed=1)
    assert other["rows"]["sample"] != whole["rows"]["sample"]


def test_the_mean_of_samples_beats_one_sample(clips):
    rows = score(jitter, clips, samples=8)["rows"]
    assert rows["sample_mean"]["psnr"] > rows["sample"]["psnr"] + 0.3


def test_one_sample_has_no_mean_and_noise_prediction_no_one_step(clips):
    assert "sample_mean" not in score(jitter, clips, samples=1)["rows"]
    rows = score(jitter, clips, prediction="eps")["rows"]
    assert "one_step_mean" not in rows
    assert "sample_mean" in rows


def test_clips_may_be_a_dataset(clips):
    items = [{"video": clip, "path": "clip.mp4", "start": 0} for clip in clips]
    assert score(grey, items) == score(grey, clips)


def test_another_metric_is_one_more_column(clips):
    def darkness(video, target):
        """Mean darkness of a frame."""
        return 1 - video.mean(dim=(1, 3, 4))

    result = score(grey, clips, metrics={"darkness": darkness})
    assert result["rows"]["sample"]["darkness"] == pytest.approx(0.5, abs=1e-6)
    assert result["definitions"] == {"darkness": "Mean darkness of a frame."}
    assert "DARKNESS" in format_table(result)


class TestFVD:
    @staticmethod
    def detector(video):
        return video.mean(dim=(3, 4)).flatten(1)[:, :2] / 255

    def test_is_taken_once_over_all_clips(self, clips):
        """Three short batches give the distance of the whole set, not a mean over batches."""
        rows = score(grey, clips, fvd=FVD(self.detector), batch=2)["rows"]
        whole = score(grey, clips, fvd=FVD(self.detector), batch=5)["rows"]
        assert rows["sample"]["fvd"] == pytest.approx(whole["sample"]["fvd"], rel=1e-5)

    def test_its_definition_names_variant_and_count(self, clips):
        definition = score(grey, clips, fvd=FVD(self.detector, variant="tf"))["definitions"]["fvd"]
        assert "tf" in definition
        assert "N=5" in definition

    def test_unconditional_samples_have_fvd_alone(self, clips):
        result = score(jitter, clips, task="unconditional", fvd=FVD(self.detector))
        assert list(result["rows"]) == ["sample"]
        assert list(result["rows"]["sample"]) == ["fvd"]

    def test_unconditional_without_it_is_refused(self, clips):
        with pytest.raises(ValueError, match="no true continuation: only fvd"):
            score(jitter, clips, task="unconditional")


def test_progress_counts_model_calls(clips):
    calls = []
    score(grey, clips, batch=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 18) for n in range(1, 19)]  # 3 batches x 2 samples x 3 steps


def test_table_has_a_line_for_every_row(clips):
    lines = format_table(score(grey, clips)).splitlines()
    assert lines[0].split() == ["PSNR", "SSIM"]
    assert [line[:24].strip() for line in lines[1:6]] == [
        "model, one sample",
        "model, mean by one step",
        "model, mean of samples",
        "copy nearest given",
        "blend given",
    ]
    assert "5 clips, 10 frames scored" in lines[-1]


class TestRefusals:
    def test_unknown_task(self, clips):
        with pytest.raises(ValueError, match=r"task must be one of predict.*got 'guess'"):
            score(grey, clips, task="guess")

    def test_model_in_training_mode(self, clips):
        with pytest.raises(ValueError, match="eval mode"):
            score(torch.nn.Linear(2, 2), clips)

    @pytest.mark.parametrize("changes", [{"samples": 0}, {"batch": 0}, {"steps": 21}])
    def test_counts(self, clips, changes):
        with pytest.raises(ValueError, match=next(iter(changes))):
            score(grey, clips, **changes)

    def test_no_clips(self):
        with pytest.raises(ValueError, match="clips must be at least 1, got 0"):
            score(grey, [])

    def test_latents_in_place_of_video(self):
        with pytest.raises(ValueError, match="'video', got only latents, path"):
            score(grey, [{"latents": torch.zeros(48, T, 4, 4), "path": "clip.mp4"}])

    def test_everything_given(self, clips):
        with pytest.raises(ValueError, match="given"):
            score(grey, clips, given=T)


class TestJSON:
    def test_reads_back(self, tmp_path, clips):
        result = score(grey, clips)
        write_json(result, tmp_path / "new" / "metrics.json")
        assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == result
        assert os.listdir(tmp_path / "new") == ["metrics.json"]

    def test_a_full_disk_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch):
        path = tmp_path / "metrics.json"
        write_json({"clips": 1}, path)

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_json({"clips": 2}, path)
        assert json.loads(path.read_text()) == {"clips": 1}
        assert os.listdir(tmp_path) == ["metrics.json"]
