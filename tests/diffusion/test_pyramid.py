"""The pyramid's schedule, units and training columns."""

import math

import pytest
import torch

from fastvid.diffusion.pyramid import (
    MINIFLUX_SCALE,
    SD3_SCALE,
    ColumnDraws,
    column_stages,
    count_units,
    denormalize_latents,
    draw_column,
    history_plan,
    normalize_latents,
    pyramid_schedule,
    stage_steps,
    stage_timesteps,
    training_column,
    unit_counts,
    unit_frames,
)
from fastvid.functional import latent_pyramid, pyramid_renoise

SCHEDULE = pyramid_schedule()


@pytest.mark.parametrize("gamma", [1 / 3, 0.2, 0.01])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_a_jump_lands_on_the_level_where_its_stage_starts(stages, gamma):
    """Signal and both entries of the covariance, equation for equation."""
    schedule = pyramid_schedule(stages, gamma=gamma, shift=2.0)
    assert len(schedule) == stages
    assert schedule.stages[0].start_sigma == 1
    assert schedule.stages[-1].end_sigma == 0
    for before, stage in zip(schedule.stages, schedule.stages[1:], strict=False):
        signal = stage.alpha * (1 - before.end_sigma)
        assert math.isclose(signal, 1 - stage.start_sigma)
        left = stage.alpha**2 * before.end_sigma**2
        assert math.isclose(left + stage.beta**2, stage.start_sigma**2)
        assert math.isclose(left, gamma * stage.beta**2)
        assert stage.start_sigma > before.end_sigma  # time rolls back


def test_the_published_windows():
    """[0, 1/3], [1/5, 2/3], [1/2, 1] in the paper's time, but for the grid of 1000."""
    schedule = pyramid_schedule(grid=3000)
    windows = [(1 - s.start_sigma, 1 - s.end_sigma) for s in schedule.stages]
    for found, wanted in zip(windows, ((0, 1 / 3), (1 / 5, 2 / 3), (1 / 2, 1)), strict=True):
        assert found == pytest.approx(wanted, abs=1e-6)


def test_steps_go_down_to_the_end_of_the_stage():
    found = stage_steps(SCHEDULE, 1, 10)
    assert found.stage_times.tolist() == pytest.approx(
        [1, 0.889, 0.778, 0.667, 0.556, 0.445, 0.334, 0.223, 0.112, 0.001, 0]
    )
    assert found.timesteps[[0, 1, -1]].tolist() == pytest.approx([744, 704.262, 386.358], abs=1e-3)
    assert stage_timesteps(SCHEDULE, 0)[0] == 1000


def test_the_short_last_step_may_be_left_out():
    whole, cut = (stage_steps(SCHEDULE, 2, 10, skip_last=skip) for skip in (False, True))
    assert len(cut.timesteps) == 9
    assert torch.equal(cut.timesteps, whole.timesteps[:9])
    assert torch.equal(cut.stage_times[:-1], whole.stage_times[:9])
    assert cut.stage_times[-1] == 0
    one = stage_steps(SCHEDULE, 2, 1, skip_last=True)
    assert one.stage_times.tolist() == [1, 0]


def test_steps_of_one_velocity_end_where_the_stage_ends():
    for skip in (False, True):
        times = stage_steps(SCHEDULE, 0, 7, skip_last=skip).stage_times
        start, end = torch.randn(2, 3)
        x = start
        for low, high in zip(times[1:], times[:-1], strict=True):
            x = x + (low - high) * (start - end)
        torch.testing.assert_close(x.float(), end)


# ---- units and history


def test_units_cover_the_frames_in_order():
    for size in (1, 2, 4):
        frames = [f for unit in range(5) for f in unit_frames(unit, size)]
        assert frames == list(range(1 + 4 * size))
        assert count_units(len(frames), size) == 5


def test_history_is_the_published_table():
    """Unit 5 of one frame each: its predecessors by stage, the oldest first."""
    assert history_plan(0, 2) == ()
    assert history_plan(5, 0) == ((0, 0, 4), (0, 4, 5))
    assert history_plan(5, 1) == ((0, 0, 4), (1, 4, 5))
    assert history_plan(5, 2) == ((0, 0, 3), (1, 3, 4), (2, 4, 5))
    assert history_plan(1, 2) == ((2, 0, 1),)
    assert history_plan(2, 2) == ((1, 0, 1), (2, 1, 2))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_history_covers_every_earlier_frame_once(stage, size):
    for unit in range(8):
        clips = history_plan(unit, stage, size)
        frames = [f for clip in clips for f in range(clip.start, clip.stop)]
        assert frames == list(range(unit_frames(unit, size).start))
        assert [clip.stage for clip in clips] == sorted(clip.stage for clip in clips)
        if unit:
            assert clips[-1].stage == stage
            assert clips[-1].stop - clips[-1].start == len(unit_frames(unit - 1, size))


# ---- training


def test_units_of_a_group_cover_every_position():
    """And the long sequences of the highest stage go with the short ones of the others."""
    counts = [
        unit_counts(step, rank, units=16, sync_group=8) for step in (0, 1) for rank in range(8)
    ]
    assert sorted(high for *_, high in counts) == list(range(1, 17))
    assert all(low == mid == 17 - high for low, mid, high in counts)
    assert unit_counts(2, 11, units=16, sync_group=8) == unit_counts(0, 3, units=16, sync_group=8)


def test_columns_follow_the_ratios():
    assert column_stages((1, 2, 1)) == (0, 1, 1, 2)
    assert column_stages((0, 1)) == (1,)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("units", [None, 1, 2, 5])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_column_is_the_path_between_the_ends_of_its_stage(stage, units):
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 5, 16, 24)
    draws = draw_column(generators(1, 2), latents.shape[1:], stage, SCHEDULE, units=units)
    draws = draws._replace(place=torch.tensor([0.0, 0.9999]))
    found = training_column(latents, stage, SCHEDULE, draws, units=units)
    at, levels = SCHEDULE.stages[stage], latent_pyramid(latents, 3)
    own = slice(0, 5) if units is None else slice(units - 1, units)
    end = at.end_sigma * draws.noise + (1 - at.end_sigma) * levels[stage][:, :, own]
    start = at.start_sigma * draws.noise
    if stage:
        up = levels[stage - 1].repeat_interleave(2, -1).repeat_interleave(2, -2)[:, :, own]
        start = start + (1 - at.start_sigma) * up
    torch.testing.assert_close(found.target, start - end)
    torch.testing.assert_close(found.latents[0], start[0])
    torch.testing.assert_close(found.latents[1], (0.001 * start + 0.999 * end)[1])
    table = stage_timesteps(SCHEDULE, stage)
    assert torch.equal(found.timestep, table[[0, -1]])
    plan = () if units is None else history_plan(units - 1, stage)
    c = draws.corruption.view(2, 1, 1, 1, 1)
    for clip, (level, first, last), noise in zip(found.history, plan, draws.history, strict=True):
        clean = levels[level][:, :, first:last]
        torch.testing.assert_close(clip, c * noise + (1 - c) * clean)


def test_one_step_by_the_true_velocity_leads_from_stage_to_stage():
    """Start at noise, follow the target of each stage, jump: the clean latents come out."""
    torch.manual_seed(0)
    latents = torch.randn(1, 2, 1, 8, 16).expand(4, -1, -1, -1, -1)
    pyramid = latent_pyramid(latents, 3)
    x = None
    for i, stage in enumerate(SCHEDULE.stages):
        draws = draw_column(generators(0, 1, 2, 3), (2, 1, 8, 16), i, SCHEDULE)
        draws = draws._replace(place=torch.zeros(4))
        column = training_column(latents, i, SCHEDULE, draws)
        if x is None:
            x = column.latents
        else:
            up = pyramid[i - 1].repeat_interleave(2, -1).repeat_interleave(2, -2)
            x = pyramid_renoise(x, stage.alpha, stage.beta, noise=torch.zeros_like(column.latents))
            signal = (1 - stage.start_sigma) * up
            torch.testing.assert_close(x, signal)  # what the jump keeps of the data
            x = column.latents
        x = x - column.target
        level = stage.end_sigma
        # Freed of its noise, so that the jump shows what it does to the data.
        x = x - level * draws.noise
        torch.testing.assert_close(x, (1 - level) * pyramid[i])
    torch.testing.assert_close(x, latents)


def test_a_samples_draws_are_its_own():
    shape = (4, 5, 16, 24)
    both = draw_column(generators(1, 2), shape, 2, SCHEDULE, units=5)
    alone = draw_column(generators(2), shape, 2, SCHEDULE, units=5)
    for pair, one in zip(
        (both.noise, both.place, both.corruption, *both.history),
        (alone.noise, alone.place, alone.corruption, *alone.history),
        strict=True,
    ):
        assert torch.equal(pair[1:], one)
    assert len(both.history) == 3
    assert (both.corruption <= 1 / 3).all()
    assert draw_column(generators(1), shape, 0, SCHEDULE, units=1).history == ()


def test_noise_of_a_column_is_standard_normal():
    draws = draw_column(generators(*range(8)), (4, 8, 64, 64), 0, SCHEDULE)
    assert draws.noise.shape == (8, 4, 8, 16, 16)
    assert abs(draws.noise.std() - 1) < 0.02


def test_normalised_latents_come_back():
    z = torch.randn(1, 4, 3, 2, 2)
    kept = z.clone()
    for scale in (MINIFLUX_SCALE, SD3_SCALE):
        made = normalize_latents(z, scale)
        torch.testing.assert_close(denormalize_latents(made, scale), z)
        assert torch.equal(z, kept)
    torch.testing.assert_close(
        normalize_latents(z, MINIFLUX_SCALE)[:, :, 0], (z[:, :, 0] + 0.04) / 1.8726
    )
    torch.testing.assert_close(made[:, :, 1:], (z[:, :, 1:] + 0.2343) / 3.0986)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pyramid_schedule(0), "stages must be at least 1, got 0"),
        (lambda: pyramid_schedule(gamma=0.4), r"gamma must be in \(0, 1/3\], got 0.4"),
        (lambda: pyramid_schedule(shift=0), "shift must be above 0, got 0"),
        (lambda: pyramid_schedule(bounds=[0, 1]), "bounds must be 4 shares from 0 to 1"),
        (lambda: pyramid_schedule(bounds=[0, 0.5, 0.5, 1]), "bounds must rise by at least 1/grid"),
        (lambda: stage_steps(SCHEDULE, 0, 0), "steps must be at least 1, got 0"),
        (
            lambda: count_units(4, 2),
            "frames must be 1 and a multiple of frames_per_unit = 2, got 4",
        ),
        (
            lambda: unit_counts(0, 0, units=6, sync_group=8),
            "units must be a multiple of sync_group",
        ),
        (lambda: column_stages((0, 0)), "sample_ratios must be counts of columns"),
    ],
)
def test_refuses(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_training_column_refuses():
    latents = torch.zeros(1, 2, 4, 8, 8)
    draws = draw_column(generators(0), (2, 4, 8, 8), 1, SCHEDULE, units=3)
    for options, says in (
        ({"stage": 3}, r"stage must be in \[0, 3\), got 3"),
        ({"units": 5}, r"units must be in \[1, 4\] for 4 frames, got 5"),
        ({"units": 2}, "draws.history must hold the noise of 1 clips, got 2"),
        ({"latents": latents[..., :6]}, "latents must have H and W divisible by 4, got H=8 W=6"),
    ):
        arguments = {"latents": latents, "stage": 1, "schedule": SCHEDULE, "draws": draws}
        with pytest.raises(ValueError, match=says):
            training_column(**arguments | {"units": 3} | options)
    short = ColumnDraws(draws.noise[:, :1], *draws[1:])
    with pytest.raises(ValueError, match="noise must be"):
        training_column(latents, 1, SCHEDULE, short, units=3)
