"""Sampling MarDini on a model that counts: one plan, guidance, exact given frames, slow motion."""

import pytest
import torch

from fastvid.diffusion.mardini import Level, sample, slow_motion
from fastvid.diffusion.sampling import sample_ddim
from fastvid.diffusion.schedule import rescale_zero_terminal_snr, respace, scaled_linear

CHAIN = respace(rescale_zero_terminal_snr(scaled_linear(1000)), 5, spacing="trailing")


class Counting:
    """The velocity is a fixed function of latents, timestep and plan; every call is written down.

    A plan is the mean of the given low frames, and 0 where there is none.
    """

    def __init__(self):
        self.calls = []

    def plan(self, low, known):
        self.calls.append("plan")
        return low[known.expand(len(low), -1)[:, None].expand_as(low[:, :, :, 0, 0])].mean()

    def project(self, signal):
        self.calls.append("project")
        return torch.tensor(0.0) if signal is None else signal

    def references(self, clean, known, planning):
        self.calls.append("references")
        return planning + 100

    def __call__(self, latents, timestep, *, known, planning, references=None):
        assert timestep.shape == (1,)
        self.calls.append("step" if references is None else "short step")
        velocity = torch.sin(3 * latents + timestep / 500 + planning)
        return velocity.masked_fill(known[:, None, :, None, None], 0)


@pytest.fixture
def inputs(rand):
    known = torch.tensor([[True, False, False, True], [False, True, True, False]])
    return {"noise": rand(2, 3, 4, 4, 4), "known": known, "clean": rand(2, 3, 4, 4, 4)} | {
        "low": rand(2, 3, 4, 2, 2)
    }


def run(model, inputs, **options):
    inputs = inputs | options
    return sample(model, inputs.pop("noise"), CHAIN, **inputs)


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, ["project", "plan"] + 5 * ["step"]),
        ({"guidance": 2.5}, 2 * ["project"] + ["plan"] + 10 * ["step"]),
        ({"guidance": 0.0}, ["project"] + 5 * ["step"]),
        ({"references": True}, ["project", "plan", "references"] + 5 * ["short step"]),
    ],
)
def test_a_plan_is_made_once_and_what_is_not_wanted_is_not_computed(inputs, options, calls):
    model = Counting()
    run(model, inputs, **options)
    assert sorted(model.calls) == sorted(calls)


def test_it_is_ddim_of_the_velocity(inputs):
    model = Counting()
    planning = model.project(model.plan(inputs["low"], inputs["known"]))
    wanted = sample_ddim(
        lambda x, t, *, known, **more: model(x, t, known=known, planning=planning),
        inputs["noise"],
        CHAIN,
        known=inputs["known"],
        clean=inputs["clean"],
        prediction="v",
    )
    torch.testing.assert_close(run(model, inputs), wanted, rtol=1e-5, atol=1e-5)


def test_guidance_goes_from_no_plan_past_the_plan(inputs):
    """One step of zero terminal SNR is x0 = -v, so the branches can be told apart."""
    model, chain = Counting(), respace(CHAIN, 1)
    arguments = {name: inputs[name] for name in ("known", "clean", "low")}
    without, plain, strong = (
        sample(model, inputs["noise"], chain, guidance=scale, **arguments)
        for scale in (0.0, 1.0, 2.5)
    )
    torch.testing.assert_close(strong, without + 2.5 * (plain - without), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(without, plain, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_given_frames_come_out_bit_for_bit(inputs, dtype, eta):
    noise, clean, low = (inputs[name].to(dtype) for name in ("noise", "clean", "low"))
    made = run(Counting(), inputs, noise=noise, clean=clean, low=low, guidance=2.5, eta=eta)
    cells = inputs["known"][:, None, :, None, None].expand_as(clean)
    assert made.dtype == dtype
    assert torch.equal(made[cells], clean[cells])
    assert not torch.isclose(made[~cells], clean[~cells]).all()


def test_unknown_frames_of_clean_are_not_read(inputs):
    cells = inputs["known"][:, None, :, None, None].expand_as(inputs["clean"])
    spoiled = inputs["clean"].masked_fill(~cells, float("nan"))
    assert torch.equal(run(Counting(), inputs, clean=spoiled), run(Counting(), inputs))


def test_progress_counts_the_steps(inputs):
    seen = []
    run(Counting(), inputs, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 5) for n in range(1, 6)]


def test_clean_of_another_shape_is_refused(inputs):
    with pytest.raises(ValueError, match=r"clean must be torch\.float32 of shape"):
        run(Counting(), inputs, clean=inputs["clean"][:, :, :2])


@pytest.mark.parametrize(
    ("given", "frames", "window", "levels"),
    [
        (4, 128, 32, [(4, 32), (8, 32)]),  # the paper's example
        (4, 32, 32, [(4, 32)]),
        (2, 9, 17, [(2, 9)]),  # what fits needs no multiple
        (3, 17, 17, [(3, 17)]),
        (2, 64, 16, [(2, 16), (4, 16)]),
        (5, 40, 17, [(5, 10), (2, 8)]),
    ],
)
def test_slow_motion_goes_by_levels(given, frames, window, levels):
    made = slow_motion(given, frames, window)
    assert made == [Level(*level) for level in levels]
    count = given
    for level in made:
        assert level.frames <= window
        assert count % level.given == 0
        assert level.known().sum() == level.given
        assert level.known()[0, [0, -1]].all()
        count = count // level.given * level.frames
    assert count == frames


@pytest.mark.parametrize(
    ("given", "frames", "window"), [(1, 8, 8), (4, 30, 16), (4, 4, 2), (2, 26, 8)]
)
def test_slow_motion_that_leads_nowhere_is_refused(given, frames, window):
    with pytest.raises(ValueError, match=f"frames must be .*{frames}"):
        slow_motion(given, frames, window)
