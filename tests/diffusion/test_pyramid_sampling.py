"""The sampler of the pyramid, on a model that shows what it was given."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastvid.diffusion.pyramid import history_plan, pyramid_schedule
from fastvid.diffusion.pyramid_sampling import (
    Text,
    constant_guidance,
    linear_guidance,
    sample_pyramid,
)
from fastvid.functional import latent_pyramid, pyramid_renoise

SCHEDULE = pyramid_schedule()
SHAPE = (3, 5, 16, 24)
STEPS = {"first_steps": [2, 1, 2], "steps": [1, 2, 1]}


@dataclass
class Prefix:
    """What the first `frames` frames of a history add, at one timestep."""

    added: Tensor
    frames: int

    @property
    def nbytes(self):
        return 1000 * self.frames


class Model:
    """A velocity that every input moves; what frames add is linear, so that a prefix is exact."""

    def __init__(self):
        self.calls, self.frames = [], 0

    def __call__(self, latents, timestep, *, history, text, text_lengths, pooled, prefix=None):
        return self.run(latents, timestep, history, text, text_lengths, pooled, prefix, 0)[0]

    def extend(self, latents, timestep, *, keep, history, text, text_lengths, pooled, prefix):
        assert prefix is None or prefix.frames <= keep
        return self.run(latents, timestep, history, text, text_lengths, pooled, prefix, keep)

    def run(self, latents, timestep, history, text, text_lengths, pooled, prefix, keep):
        self.calls.append({"latents": latents, "timestep": timestep, "history": history})
        frames = [frame for clip in history for frame in clip.unbind(2)]
        condition = text.sum((1, 2)) + pooled.sum(1) + text_lengths
        added = torch.zeros_like(condition) if prefix is None else prefix.added
        kept = Prefix(added, 0 if prefix is None else prefix.frames)
        for i in range(kept.frames, len(frames)):
            self.frames += 1
            added = added + (i + 1) * frames[i].mean((1, 2, 3)) * torch.sin(timestep)
            if i + 1 == keep:
                kept = Prefix(added, keep)
        shift = (0.1 * condition + added).view(-1, 1, 1, 1, 1).to(latents)
        return torch.tanh(latents + shift), kept


def text(B, seed=0, tokens=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(B, tokens, 6, generator=generator).to(dtype)
    return Text(embeddings, torch.full((B,), 3), torch.randn(B, 5, generator=generator).to(dtype))


def sample(model=None, prompt=None, shape=SHAPE, **options):
    options = {"seed": 0, "patch": 2, **STEPS} | options
    return sample_pyramid(model or Model(), prompt or text(2), shape, SCHEDULE, **options)


def test_units_go_through_the_stages_with_the_history_of_the_plan():
    model = Model()
    video = sample(model)
    assert video.shape == (2, *SHAPE)
    pyramid, calls = latent_pyramid(video, 3), iter(model.calls)
    for unit in range(5):
        for stage in range(3):
            for _ in range((STEPS["steps"] if unit else STEPS["first_steps"])[stage]):
                call = next(calls)
                assert call["latents"].shape == (2, 3, 1, 4 << stage, 6 << stage)
                assert call["timestep"].dtype == torch.float32
                assert call["timestep"].shape == (2,)
                plan = history_plan(unit, stage)
                for (level, start, stop), clip in zip(plan, call["history"], strict=True):
                    assert torch.equal(clip, pyramid[level][:, :, start:stop])
    assert next(calls, None) is None


def test_a_stage_is_eulers_rule_between_jumps():
    """One frame by hand."""
    noise, block = torch.randn(1, 3, 1, 16, 24), [torch.randn(1, 3, 1, s, 2 * s) for s in (8, 16)]
    noise, block[0], block[1] = noise[..., :16], block[0][..., :8], block[1][..., :16]
    prompt, model = text(1), Model()
    options = {"seed": None, "noise": noise, "block_noise": block, "first_steps": 2}
    found = sample(model, prompt, (3, 1, 16, 16), **options)
    x = 4 * noise.unfold(-1, 4, 4).unfold(-3, 4, 4).mean((-1, -2))
    for i, stage in enumerate(SCHEDULE.stages):
        if i:
            x = pyramid_renoise(x, stage.alpha, stage.beta, noise=block[i - 1])
        for high, low in ((1, 0.001), (0.001, 0)):
            condition = {"history": [], "text": prompt.embeddings, "pooled": prompt.pooled}
            v = model(x, torch.zeros(1), text_lengths=prompt.lengths, **condition)
            x = x + (low - high) * v
    torch.testing.assert_close(found, x)


def test_seeds_govern_all_noise():
    torch.manual_seed(0)
    first = sample(seed=7)
    torch.manual_seed(1)
    assert torch.equal(first, sample(seed=7))
    assert not torch.equal(first, sample(seed=8))
    state = torch.get_rng_state()
    sample(seed=9)
    assert torch.equal(state, torch.get_rng_state())


def test_a_sample_depends_neither_on_its_batch_nor_on_its_length():
    whole, prompt = sample(seed=7), text(2)
    alone = sample(prompt=Text(*(part[1:] for part in prompt)), seed=torch.tensor([8]))
    torch.testing.assert_close(alone, whole[1:])
    short = sample(shape=(3, 3, 16, 24), seed=7)
    assert torch.equal(short, whole[:, :, :3])


def test_every_draw_of_a_video_is_fresh():
    """With a velocity of zero the first stage shows the noise of each unit, the next the jumps."""
    model = Model()
    model.run = lambda latents, *_: (model.calls.append(latents) or torch.zeros_like(latents), None)
    sample(model, first_steps=1, steps=1)
    for stage in range(3):
        seen = [calls.flatten() for calls in model.calls[stage::3]]
        correlation = torch.corrcoef(torch.stack(seen)) - torch.eye(5)
        assert correlation.abs().max() < 5 / seen[0].numel() ** 0.5 * (1 if stage == 0 else 2)


@pytest.mark.parametrize("frames", [1, 3])
def test_given_frames_come_back_and_steer_what_follows(frames):
    """An image (1), or a clip to continue (3)."""
    given = torch.randn(2, 3, frames, 16, 24)
    kept, model = given.clone(), Model()
    video = sample(model, given=given)
    assert torch.equal(video[:, :, :frames], given)
    assert torch.equal(given, kept)
    assert len(model.calls) == (5 - frames) * sum(STEPS["steps"])
    newest = model.calls[0]["history"][-1]
    assert torch.equal(newest, latent_pyramid(given[:, :, -1:], 3)[0])
    assert not torch.allclose(video[:, :, frames:], sample(given=-given)[:, :, frames:])
    one_for_all = sample(given=given[:1])
    assert torch.equal(one_for_all[1, :, :frames], given[0])


def test_continuing_a_clip_is_going_on():
    """The frames that a seed has made, given back, lead to those that it would make."""
    whole = sample(seed=3)
    torch.testing.assert_close(sample(seed=3, given=whole[:, :, :2]), whole)


def test_units_of_several_frames():
    model = Model()
    video = sample(model, frames_per_unit=2, given=torch.zeros(1, 3, 1, 16, 24))
    assert video.shape == (2, *SHAPE)
    assert model.calls[-1]["latents"].shape == (2, 3, 2, 16, 24)
    assert [clip.shape[2] for clip in model.calls[-1]["history"]] == [1, 2]


# ---- guidance


def test_guidance_is_that_of_its_unit():
    prompt, negative = text(2), text(2, seed=5)
    both, alone = Model(), Model()
    scales = {}

    def scale_of(unit):
        return scales.setdefault(unit, 1.0 + unit)

    sample(both, prompt, negative=negative, guidance=scale_of)
    assert sorted(scales) == [0, 1, 2, 3, 4]
    sizes = [len(call["latents"]) for call in both.calls]
    first = sum(STEPS["first_steps"])
    assert sizes[:first] == [2] * first  # at scale 1 the negative prompt is not computed
    assert set(sizes[first:]) == {4}
    sample(alone, prompt, guidance=scale_of)
    assert {len(call["latents"]) for call in alone.calls} == {2}


def test_guidance_goes_from_the_negative_prompt_to_the_prompt():
    prompt, negative, model = text(1), text(1, seed=5), Model()
    options = {"shape": (3, 1, 16, 24), "negative": negative, "guidance": lambda unit: 3.0}
    found = sample(prompt=prompt, first_steps=1, **options)

    class Guided(Model):
        def run(self, latents, timestep, history, *_):
            a, b = (
                model(latents, timestep, history=history, text=t[0], text_lengths=t[1], pooled=t[2])
                for t in (negative, prompt)
            )
            return a + 3 * (b - a), None

    plain = sample(Guided(), prompt, shape=(3, 1, 16, 24), first_steps=1)
    torch.testing.assert_close(found, plain)


def test_one_negative_prompt_serves_all():
    negative = text(1, seed=5)
    each = Text(*(part.expand(2, *part.shape[1:]) for part in negative))
    assert torch.equal(sample(negative=negative), sample(negative=each))


def test_scales():
    assert [constant_guidance(7, 5)(unit) for unit in range(3)] == [7, 5, 5]
    assert [linear_guidance(7)(unit) for unit in (0, 1, 5, 10, 20)] == [7, 6.5, 4.5, 2, 2]


# ---- what may be left out


def test_skipping_the_last_step_changes_little_and_saves_a_call_per_stage():
    whole, short = Model(), Model()
    options = {"shape": (3, 1, 16, 24), "first_steps": 4}
    found, cut = sample(whole, **options), sample(short, **options, skip_last=True)
    assert (len(whole.calls), len(short.calls)) == (12, 9)
    # Velocities are at most 1, so that each stage moves by 0.002; jumps and steps may widen that.
    assert 0 < (found - cut).abs().max() < 0.02


@pytest.mark.parametrize("negative", [None, text(1, seed=5)])
def test_a_cache_changes_the_work_and_not_the_result(negative):
    """All of it, half, none: the more memory, the fewer frames through the model."""
    work, shape = [], (3, 9, 16, 24)
    guidance = lambda unit: 1.0 if unit == 6 else 4.0  # noqa: E731  other branches for a while
    expected = sample(shape=shape, negative=negative, guidance=guidance)
    for gigabytes in (0, 8e-6, math.inf):
        model = Model()
        found = sample(model, shape=shape, negative=negative, guidance=guidance, cache_gb=gigabytes)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        work.append(model.frames)
    assert work[0] > work[1] > work[2]


class Watched(Model):
    """Remembers the prefixes that it was given."""

    def __init__(self):
        super().__init__()
        self.prefixes = []

    def run(self, latents, timestep, history, *rest):
        self.prefixes.append(rest[-2])
        return super().run(latents, timestep, history, *rest)


def test_a_cache_keeps_its_budget_and_the_longest_prefixes():
    model = Watched()
    sample(model, shape=(3, 9, 16, 24), cache_gb=8e-6)
    last = model.prefixes[-sum(STEPS["steps"]) :]
    stored = [prefix for prefix in last if prefix is not None]
    assert 0 < sum(prefix.nbytes for prefix in stored) <= 8000
    assert last[0] is not None  # of the lowest stage, which has the most frames
    assert last[-1] is None


def test_a_cache_that_overflows_serves_the_same_steps_in_every_unit():
    """Two of three prefixes of the last units fit: those are not dropped for one another."""
    model = Watched()
    sample(model, shape=(3, 9, 16, 24), steps=[3, 1, 1], cache_gb=14e-6)
    frames = [[p and p.frames for p in model.prefixes[i : i + 3]] for i in range(5, 45, 5)]
    assert frames[-2:] == [[6, 6, None], [7, 7, None]]


class Counter(Model):
    """Counts tokens: of 128 text embeddings, and of patches of 2 x 2."""

    tokens = 0

    def run(self, latents, timestep, history, text, text_lengths, pooled, prefix, keep):
        patches = [clip.shape[-1] * clip.shape[-2] // 4 for clip in history for _ in clip[0, 0]]
        known = 0 if prefix is None else prefix.frames
        self.tokens += sum(patches[known:]) + latents[0, 0].numel() // 4
        self.tokens += 128 if prefix is None else 0
        return torch.zeros_like(latents), Prefix(torch.zeros(1), keep)


@pytest.mark.parametrize(
    ("size", "frames", "share"),
    [((48, 80), 16, 0.686), ((96, 160), 16, 0.721), ((96, 160), 31, 0.540)],
    ids=["384p 5 s", "768p 5 s", "768p 10 s"],
)
def test_a_cache_saves_what_can_be_saved(size, frames, share):
    """The tokens that the text and the frames at lowest resolution leave."""
    counts, prompt = [], Text(torch.zeros(1, 128, 1), torch.tensor([128]), torch.zeros(1, 1))
    for gigabytes in (0, math.inf):
        model = Counter()
        steps = {"first_steps": 2, "steps": 1}  # 20 and 10, a tenth of the calls
        sample(model, prompt, (1, frames, *size), cache_gb=gigabytes, **steps)
        counts.append(model.tokens)
    assert counts[1] / counts[0] == pytest.approx(share, abs=0.001)


def test_progress_counts_the_calls():
    seen, model = [], Model()
    sample(model, given=torch.zeros(1, 3, 2, 16, 24), progress=lambda *at: seen.append(at))
    assert seen == [(i + 1, len(model.calls)) for i in range(len(model.calls))]


def test_the_model_sees_the_dtype_of_the_text():
    model = Model()
    video = sample(model, text(2, dtype=torch.bfloat16))
    assert video.dtype == torch.float32
    assert model.calls[-1]["latents"].dtype == torch.bfloat16
    assert {clip.dtype for clip in model.calls[-1]["history"]} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"shape": (3, 5, 16, 20)}, ValueError, "H and W divisible by 8, .* got H=16 W=20"),
        ({"shape": (3, 5, 16, 24), "frames_per_unit": 3}, ValueError, "frames must be 1 and a"),
        ({"first_steps": 0}, ValueError, "first_steps must be at least 1, .* got 0"),
        ({"steps": [1, 2]}, ValueError, r"steps must be at least 1, .* got \[1, 2\]"),
        ({"steps": [1, -2, 1]}, ValueError, "steps must be at least 1"),
        ({"seed": None}, ValueError, "seed must be given, unless noise and block_noise are"),
        ({"noise": torch.zeros(2, 3, 4, 16, 24)}, ValueError, r"noise must be \(2, 3, 5, 16, 24\)"),
        ({"block_noise": []}, ValueError, "block_noise must be that of 10 jumps, got 0"),
        ({"given": torch.zeros(3, 3, 1, 16, 24)}, ValueError, r"given must be \(B or 1, C, t"),
        ({"given": torch.zeros(2, 3, 5, 16, 24)}, ValueError, "fewer frames than T=5, got 5"),
        ({"given": torch.zeros(2, 3, 0, 16, 24)}, ValueError, "given must hold whole units"),
        ({"negative": text(3)}, ValueError, "negative must be of 1 sample or of 2"),
        ({"negative": text(1, tokens=5)}, ValueError, "negative.embeddings must have 3 axes"),
        ({"negative": text(1, dtype=torch.half)}, TypeError, "negative.embeddings must be floats"),
        ({"prompt": text(2)._replace(lengths=torch.ones(3))}, ValueError, "prompt.lengths must"),
        ({"cache_gb": -1}, ValueError, "cache_gb must be at least 0, got -1"),
        ({"cache_gb": 1, "model": print}, TypeError, "model must have extend where cache_gb"),
    ],
)
def test_refuses_before_any_compute(options, error, says):
    model = Model()
    with pytest.raises(error, match=says):
        sample(**{"model": model} | options)
    assert model.calls == []
