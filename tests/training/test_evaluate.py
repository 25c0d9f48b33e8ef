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


class Lossy(PixelCodec):
    """Decodes a little darker than it encoded, and draws latents when asked to."""

    def __init__(self, noise=0.0):
        super().__init__(4)
        self.noise = noise

    def encode(self, video, *, generators=None):
        latents = super().encode(video)
        drawn = [torch.randn(latents.shape[1:], generator=g) for g in generators]
        return latents + self.noise * torch.stack(drawn)

    def decode(self, latents):
        return super().decode(latents) - 0.25


def test_given_pixels_are_the_truth_in_every_row(clips):
    """Whatever the codec makes of them."""
    seen = []

    def keep(video, target):
        seen.append((video == target).all(dim=1))
        return psnr(video, target)

    settings = {"task": "predict", "given": 4, "prediction": "x0", "steps": 3, "samples": 2}
    evaluate(grey, Lossy(), squared_cosine(20), clips, metrics={"psnr": keep}, **settings)
    assert len(seen) == 1 + 5  # the trial on one clip, then every row
    for same in seen[1:]:
        assert same[:, :4].all()
        assert not same[:, 4:].flatten(1).all(1).any()


def test_a_codec_that_draws_does_so_for_each_clip_apart(clips):
    def run(batch, seed=0):
        settings = {"task": "predict", "prediction": "x0", "steps": 2, "samples": 1, "seed": seed}
        codec = Lossy(noise=0.3)
        return evaluate(jitter, codec, squared_cosine(20), clips, batch=batch, **settings)["rows"]

    whole = run(5)
    assert run(2)["one_step_mean"] == pytest.approx(whole["one_step_mean"], rel=1e-6)


def listener(told):
    def model(latents, timestep, *, known):
        told.append(int(timestep))
        return torch.zeros_like(latents)

    return model


def test_fifty_steps_unless_told_otherwise_and_the_mean_from_the_noisiest(clips):
    for length, steps in ((200, 50), (20, 20)):
        told = []
        result = evaluate(
            listener(told),
            CODEC,
            squared_cosine(length),
            clips,
            task="predict",
            prediction="x0",
            samples=1,
        )
        assert result["steps"] == steps
        assert len(told) == steps + 1
        assert told[0] == told[-1] == length - 1  # the mean's call comes last
    told.clear()
    score(listener(told), clips, steps=1, samples=1)
    assert told == [19, 19]


def test_clipping_reaches_the_sampler(clips):
    def bright(latents, timestep, *, known):
        return torch.full_like(latents, 0.8)

    rows = score(bright, clips, clip=0.5, metrics={"level": lambda video, _: video.mean((1, 3, 4))})
    assert rows["rows"]["sample"]["level"] == pytest.approx(0.75, abs=1e-5)


class TestLongClips:
    """10 frames by a model that makes 4 at once: each window sees what the one before made."""

    @staticmethod
    def follow(latents, timestep, *, known):
        """Repeats its first frame, which is given or made already, a little lighter."""
        assert latents.shape[2] == 4
        first = latents[:, :, :1]
        return first + 0.01 * torch.arange(4.0)[:, None, None]

    def test_windows_go_on_from_each_other(self, clips):
        level = {"level": lambda video, target: (video - target[:, :, :1]).mean((1, 3, 4))}
        still = clips[:, :, :1].mul(0.5).expand(-1, -1, T, -1, -1)
        result = score(self.follow, still, given=1, window=4, steps=2, metrics=level)
        assert result["windows"] == 3
        assert "one_step_mean" not in result["rows"]
        # Windows start at 0, 3 and 6, so frame t is 0.01 t lighter in [-1, 1]; frames 1 to 9 count.
        assert result["rows"]["sample"]["level"] == pytest.approx(0.005 * 5, abs=1e-5)

    def test_backwards_too_and_whatever_the_batch(self, clips):
        settings = {"window": 4, "given": 2, "task": "backward", "samples": 1}
        whole = score(jitter, clips, batch=5, **settings)
        assert whole["windows"] == 4
        assert whole["rows"]["copy_nearest"] == pytest.approx(
            score(jitter, clips, given=2, task="backward")["rows"]["copy_nearest"]
        )
        parts = score(jitter, clips, batch=2, **settings)
        assert parts["rows"]["sample"] == pytest.approx(whole["rows"]["sample"], rel=1e-6)

    def test_progress_counts_the_calls_of_all_windows(self, clips):
        calls = []
        score(
            self.follow,
            clips,
            given=1,
            window=4,
            progress=lambda done, total: calls.append((done, total)),
        )
        assert calls == [(n, 18) for n in range(1, 19)]  # 3 windows x 2 samples x 3 steps


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
        return video.mean(dim=(3, 4)).flatten(1)[:, -2:] / 255

    def test_is_taken_once_over_all_clips_from_what_each_row_shows(self, clips):
        """Against its definition by hand; three short batches give the distance of the whole."""
        fvd, target = FVD(self.detector), to_unit(clips)
        known = (torch.arange(T) < 8)[None].expand(5, T)
        shown = {
            "sample": torch.where(known[:, None, :, None, None], target, 0.5),
            "copy_nearest": copy_nearest(target, known),
        }
        rows = score(grey, clips, fvd=fvd, batch=2)["rows"]
        for row, video in shown.items():
            expected = fvd.score(fvd.features(target), fvd.features(video))["fvd"]
            assert expected > 1e-6
            assert rows[row]["fvd"] == pytest.approx(expected, rel=1e-4)

    def test_leaves_given_frames_out_where_enough_remain(self, clips):
        long = torch.cat([clips, clips.flip(2)], dim=2)  # 20 frames
        seen = []

        def detector(video):
            seen.append(video.clone())
            return video.mean(dim=(3, 4)).flatten(1)[:, -2:] / 255

        for given, frames, which in ((4, 16, "generated"), (11, 20, "all")):
            seen.clear()
            result = score(
                grey, long, given=given, fvd=FVD(detector), batch=5, metrics={"psnr": psnr}
            )
            assert result["fvd_frames"] == which
            assert {video.shape[2] for video in seen} == {frames}
            torch.testing.assert_close(
                seen[1], (to_unit(long)[:, :, T * 2 - frames :] * 255).round()
            )
            told = "generated frames alone" if which == "generated" else "given frames included"
            assert told in result["definitions"]["fvd"]
            assert result["definitions"]["fvd"] in format_table(result)

    def test_given_frames_between_are_left_out_too(self, clips):
        long = torch.cat([clips, clips.flip(2)], dim=2)
        seen = []

        def detector(video):
            seen.append(video.clone())
            return video.mean(dim=(3, 4)).flatten(1)[:, :2]

        score(grey, long, task="image-to-video", given=3, fvd=FVD(detector), batch=5, metrics={})
        assert {video.shape[2] for video in seen} == {17}

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

    def test_a_clip_without_room_for_a_given_frame(self):
        with pytest.raises(
            ValueError, match="room for a given and a generated frame, got 1 frames"
        ):
            score(grey, torch.zeros(2, 3, 1, SIDE, SIDE), task="arbitrary-interpolation")

    @pytest.mark.parametrize(
        ("shape", "fvd", "message"),
        [
            ((2, 3, 4, 8, 8), False, "11"),  # SSIM's window
            ((2, 3, 4, 16, 16), True, "at least 10 frames, got 4"),
            ((1, 3, 12, 16, 16), True, "clips must be at least 2 for fvd, got 1"),
        ],
    )
    def test_what_a_metric_cannot_take_shows_before_any_sampling(self, shape, fvd, message):
        def never(latents, timestep, *, known):
            raise AssertionError("the model was called")

        fvd = FVD(TestFVD.detector) if fvd else None
        with pytest.raises(ValueError, match=message):
            score(never, torch.zeros(shape), given=1, fvd=fvd)

    def test_a_model_that_makes_nan(self, clips):
        with pytest.raises(ValueError, match=r"video .*got NaN"):
            score(lambda x, t, known: x * float("nan"), clips)

    def test_everything_given(self, clips):
        with pytest.raises(ValueError, match="given"):
            score(grey, clips, given=T)


class TestJSON:
    def test_reads_back(self, tmp_path, clips):
        result = score(grey, clips)
        write_json(result, tmp_path / "new" / "metrics.json")
        assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == result
        assert os.listdir(tmp_path / "new") == ["metrics.json"]

    def test_nan_is_no_json(self, tmp_path):
        path = tmp_path / "metrics.json"
        for value in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match="result must be finite"):
                write_json({"rows": {"sample": {"psnr": value}}}, path)
        assert not path.exists()

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
