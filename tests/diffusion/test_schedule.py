import copy
import dataclasses
import pickle

import pytest
import torch

from fastvid.diffusion.schedule import (
    Schedule,
    linear,
    rescale_zero_terminal_snr,
    respace,
    scaled_linear,
    squared_cosine,
)

CHAINS = [linear(), scaled_linear(), squared_cosine(), rescale_zero_terminal_snr(scaled_linear())]


@pytest.mark.parametrize("schedule", CHAINS, ids=repr)
def test_every_table_is_float64_of_the_chains_length(schedule):
    names = [each.name for each in dataclasses.fields(Schedule)]
    tables = [name for name in names if "alphas" in name or "posterior" in name]
    assert len(tables) == 10  # with betas the eleven of the literature
    for name in [*tables, "betas", "log_betas", "large_log_variance"]:
        table = getattr(schedule, name)
        assert table.dtype == torch.float64
        assert table.shape == (1000,)


@pytest.mark.parametrize("schedule", CHAINS, ids=repr)
def test_noise_only_grows(schedule):
    assert (schedule.alphas_cumprod.diff() < 0).all()
    assert schedule.alphas_cumprod_prev[0] == 1
    assert torch.equal(schedule.alphas_cumprod_prev[1:], schedule.alphas_cumprod[:-1])


def test_linear_adds_as_much_noise_in_fewer_steps():
    whole, half = linear(1000), linear(500)
    assert half.betas[0] == pytest.approx(2 * whole.betas[0].item())
    assert half.terminal_snr == pytest.approx(whole.terminal_snr, rel=0.2)
    with pytest.raises(ValueError, match=r"steps must be above 20 .* got 20: make a longer"):
        linear(20)


def test_squared_cosine_halves_the_data_midway():
    schedule = squared_cosine(1000)
    assert schedule.alphas_cumprod[499] == pytest.approx(0.5, abs=0.01)
    assert schedule.betas.max() == 0.999


def test_zero_terminal_snr_is_exact_and_keeps_the_first_step():
    plain, rescaled = scaled_linear(), rescale_zero_terminal_snr(scaled_linear())
    assert rescaled.terminal_snr == 0
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-12)
    assert respace(rescaled, 25, spacing="trailing").terminal_snr == 0
    assert plain.terminal_snr > 0
    with pytest.raises(ValueError, match="schedule must have at least 2 steps, got 1"):
        rescale_zero_terminal_snr(respace(plain, 1))


@pytest.mark.parametrize("steps", [1, 7, 25, "250", "ddim50", "10,15,20", [10, 15, 20]])
def test_respacing_keeps_the_noise_levels(steps):
    base = linear()
    short = respace(base, steps)
    kept = base.alphas_cumprod[short.timestep_map]
    # A long step's beta is near 1, and 1 - beta is known to half a unit in the last place of 1.
    torch.testing.assert_close(short.alphas_cumprod, kept, rtol=1e-12, atol=2**-53)


def test_respacing_accepts_the_strings_of_published_scripts():
    base = linear()
    assert len(respace(base, "10,15,20")) == 45
    assert torch.equal(respace(base, "250").timestep_map, respace(base, 250).timestep_map)
    assert respace(base, "ddim50").timestep_map.tolist() == list(range(0, 1000, 20))
    sections = respace(base, [10, 15, 20]).timestep_map
    assert sections[9] == 333  # the end of the first of three sections: 334, 333, 333 steps
    assert sections[10] == 334
    assert sections[-1] == 999


def test_respacing_a_half_rounds_as_published_chains_do():
    # 21 of 500: the 11th falls on 249.5, which a running sum of strides ends just below.
    assert respace(linear(500), 21).timestep_map[10] == 249


@pytest.mark.parametrize("steps", [1, "1", [1], "ddim1"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_a_single_step_is_the_noisiest(steps, spacing):
    short = respace(linear(), steps, spacing=spacing)
    assert short.timestep_map.tolist() == [999]
    assert short.terminal_snr == pytest.approx(linear().terminal_snr, rel=1e-9)


def test_respacing_twice_keeps_the_models_numbers():
    twice = respace(respace(linear(), "ddim100"), "ddim10")
    assert torch.equal(twice.timestep_map, respace(linear(), "ddim10").timestep_map)
    torch.testing.assert_close(twice.betas, respace(linear(), "ddim10").betas)


def test_spacings_keep_the_ends_they_promise():
    base = linear()
    ends = {
        spacing: respace(base, 25, spacing=spacing).timestep_map[[0, -1]].tolist()
        for spacing in ("linspace", "leading", "trailing")
    }
    assert ends == {"linspace": [0, 999], "leading": [0, 960], "trailing": [39, 999]}
    for spacing in ends:
        for steps in (1, 2, 3, 299, 300, 501, 999, 1000):
            assert len(respace(base, steps, spacing=spacing)) == steps


@pytest.mark.parametrize(
    ("steps", "spacing", "message"),
    [
        ("ddim501", "linspace", "divide 1000 by a whole stride, got 'ddim501'"),
        ("ddim1001", "linspace", "divide 1000 by a whole stride"),
        ("fast", "linspace", "must read like '250', 'ddim50' or '10,15,20', got 'fast'"),
        ("ddimx", "linspace", "must read like"),
        ("10,,20", "linspace", "must read like"),
        (0, "linspace", "steps must be at least 1, got 0"),
        ([], "linspace", "at least one section"),
        (1001, "linspace", "at most 1000 in section 0, got 1001"),
        ([10, 501], "linspace", "at most 500 in section 1, got 501"),
        (1001, "trailing", "at most 1000, got 1001"),
        ("10,20", "trailing", "spacing must be linspace with sections"),
        (10, "middle", "spacing must be linspace, leading or trailing, got 'middle'"),
    ],
)
def test_respacing_refuses_by_name(steps, spacing, message):
    with pytest.raises(ValueError, match=message):
        respace(linear(), steps, spacing=spacing)


@pytest.mark.parametrize("steps", [2.5, True, None])
def test_steps_are_whole_numbers(steps):
    with pytest.raises(TypeError, match="steps must be a whole number"):
        linear(steps)
    with pytest.raises(TypeError):
        respace(linear(), steps)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.1], [1.0, 0.1], [float("nan")]])
def test_betas_that_are_no_variances_are_refused(betas):
    with pytest.raises(ValueError, match="betas must"):
        Schedule(torch.tensor(betas, dtype=torch.float64), torch.arange(len(betas)))


def test_tables_of_other_types_are_refused():
    betas = torch.full((3,), 0.1, dtype=torch.float64)
    with pytest.raises(TypeError, match="betas must be a float64 CPU vector, got"):
        Schedule(betas.float(), torch.arange(3))
    with pytest.raises(TypeError, match=r"timestep_map must be int64 of shape \(3,\)"):
        Schedule(betas, torch.arange(4))
    with pytest.raises(ValueError, match="timestep_map must increase"):
        Schedule(betas, torch.tensor([0, 2, 1]))


def test_gather_shapes_entries_to_multiply(device):
    schedule = linear()
    like = torch.ones(2, 3, 4, 5, 6, device=device)
    index = torch.tensor([0, 999], device=device)
    entries = schedule.gather("betas", index, like)
    assert entries.shape == (2, 1, 1, 1, 1)
    assert entries.dtype == torch.float32
    assert entries.flatten().tolist() == schedule.betas[[0, 999]].float().tolist()
    assert schedule.gather("betas", index, like.double()).dtype == torch.float64
    assert schedule.gather("betas", index[:1], like.half()).shape == (1, 1, 1, 1, 1)
    for wrong in (index.float(), index.int(), torch.zeros(3, dtype=torch.long, device=device)):
        with pytest.raises(TypeError, match=r"index must be int64 of shape \(2,\) or \(1,\)"):
            schedule.gather("betas", wrong, like)


def test_a_table_moves_to_a_device_once():
    schedule = linear()
    index, like = torch.tensor([3]), torch.ones(1, 1)
    schedule.gather("betas", index, like)
    (kept,) = schedule._moved.values()
    schedule.gather("betas", index, like)
    assert [id(table) for table in schedule._moved.values()] == [id(kept)]


@pytest.mark.parametrize("index", [-1, 1000])
def test_an_index_outside_the_chain_is_refused(index):
    for call in (
        lambda places: linear().gather("betas", places, torch.ones(2, 3)),
        linear().timesteps,
    ):
        with pytest.raises(ValueError, match=r"index must be in \[0, 1000\), got"):
            call(torch.tensor([3, index]))
    with pytest.raises(ValueError, match=rf"index must be in \[0, 1000\), got {index}"):
        linear().at("betas", index)


def test_a_schedule_can_be_pickled():
    schedule = respace(linear(), 10)
    schedule.timesteps(torch.tensor([3]))
    for again in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert torch.equal(again.betas, schedule.betas)
        assert torch.equal(again.timestep_map, schedule.timestep_map)
        assert repr(again).startswith("Schedule(steps=10, timesteps=0..999")
        assert not again._moved  # perhaps of a device that is not there
