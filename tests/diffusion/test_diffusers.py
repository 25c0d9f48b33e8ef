"""Our schedules and steps against diffusers' schedulers, wherever that library is installed."""

import itertools

import pytest
import torch

from fastvid.diffusion.process import add_noise, target_of
from fastvid.diffusion.sampling import sample_ddim
from fastvid.diffusion.schedule import (
    linear,
    rescale_zero_terminal_snr,
    respace,
    scaled_linear,
    squared_cosine,
)
from fastvid.diffusion.steps import ddim_step, ddpm_step
from fastvid.diffusion.tables import ddim_table, ddpm_table, euler_table
from fastvid.functional import guided_step

diffusers = pytest.importorskip("diffusers")

NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SHAPE = (2, 3, 4, 6, 6)
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CHAINS = {
    "linear": (linear(), {"beta_schedule": "linear"}),
    "scaled-linear": (scaled_linear(), LATENT),
    "cosine": (squared_cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    "zero-snr": (
        rescale_zero_terminal_snr(scaled_linear()),
        {**LATENT, "rescale_betas_zero_snr": True},
    ),
}
chains = pytest.mark.parametrize(("chain", "options"), CHAINS.values(), ids=CHAINS)
SPACINGS = [(50, "leading"), (25, "trailing"), (10, "trailing"), (1000, "leading")]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, check_dtype=False)


def rival(kind, chain, options, **more):
    """Their scheduler with our fp64 tables for its fp32 ones: the formulas are compared."""
    scheduler = kind(**options, **more)
    scheduler.betas = chain.betas
    scheduler.alphas = 1 - chain.betas
    scheduler.alphas_cumprod = chain.alphas_cumprod
    return scheduler


@chains
def test_betas(chain, options):
    theirs = diffusers.DDIMScheduler(**options)
    close(chain.alphas_cumprod, theirs.alphas_cumprod)
    if chain.terminal_snr:
        close(chain.betas, theirs.betas)


def test_zero_terminal_snr():
    # Called with fp64: in fp32, as their scheduler calls it, the last ratios lose six digits.
    rescale = diffusers.schedulers.scheduling_ddim.rescale_zero_terminal_snr
    close(CHAINS["zero-snr"][0].betas, rescale(scaled_linear().betas))


@chains
def test_noising_and_velocity(rand, chain, options):
    theirs = rival(diffusers.DDPMScheduler, chain, options)
    x0, noise = rand(*SHAPE, dtype=torch.float64).cpu(), rand(*SHAPE, dtype=torch.float64).cpu()
    index = torch.tensor([7, 900])
    close(add_noise(x0, noise, index, chain), theirs.add_noise(x0, noise, index))
    close(target_of(x0, noise, index, chain, "v"), theirs.get_velocity(x0, noise, index))


@pytest.mark.parametrize(("steps", "spacing"), SPACINGS)
def test_timesteps(steps, spacing):
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    assert torch.equal(
        respace(linear(), steps, spacing=spacing).timestep_map.flip(0), theirs.timesteps
    )


def cases(chain):
    """Every prediction, clipped or not, in the middle and at both ends of a chain."""
    for prediction, clip, (steps, spacing) in itertools.product(NAMES, (None, 0.9), SPACINGS):
        schedule = respace(chain, steps, spacing=spacing)
        # At zero SNR noise says nothing of the data.
        last = steps - 1 - (prediction == "eps" and schedule.terminal_snr == 0)
        settings = {
            "prediction_type": NAMES[prediction],
            "timestep_spacing": spacing,
            "clip_sample": clip is not None,
            "clip_sample_range": clip or 1.0,
        }
        for index in (0, 1, steps // 2, last):
            yield schedule, index, {"prediction": prediction, "clip": clip}, settings


@chains
def test_ddim_steps(rand, chain, options):
    x, output, noise = (rand(*SHAPE, dtype=torch.float64).cpu() for _ in range(3))
    for schedule, index, kwargs, settings in cases(chain):
        theirs = rival(diffusers.DDIMScheduler, chain, options, **settings)
        theirs.set_timesteps(len(schedule))
        for eta in (0.0, 0.6):
            expected = theirs.step(
                output,
                int(schedule.timestep_map[index]),
                x,
                eta=eta,
                variance_noise=noise,
                use_clipped_model_output=True,  # its default keeps the unclipped noise direction
            ).prev_sample
            close(ddim_step(output, x, index, schedule, noise=noise, eta=eta, **kwargs), expected)


@chains
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ancestral_steps(rand, chain, options, variance):
    channels = SHAPE[1] * (2 if variance == "learned_range" else 1)
    x = rand(*SHAPE, dtype=torch.float64).cpu()
    output = rand(SHAPE[0], channels, *SHAPE[2:], dtype=torch.float64).cpu()
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fixed = "large" if variance == "fixed_large" else "small"
    for schedule, index, kwargs, settings in cases(chain):
        timestep = int(schedule.timestep_map[index])
        if index == 0 and timestep > 0 and variance != "fixed_small":
            continue  # theirs adds noise to the last step of such a chain; ours never does
        theirs = rival(diffusers.DDPMScheduler, chain, options, variance_type=variance, **settings)
        theirs.set_timesteps(len(schedule))
        generator = torch.Generator().manual_seed(1)
        expected = theirs.step(output, timestep, x, generator=generator).prev_sample
        ours = ddpm_step(output, x, index, schedule, noise=noise, fixed_variance=fixed, **kwargs)
        close(ours, expected)


def tabled_cases(chain):
    """Those of `cases` that have a table, less a thousand rows of the same formula."""
    for schedule, index, kwargs, settings in cases(chain):
        hopeless = kwargs["prediction"] == "eps" and schedule.terminal_snr == 0
        if len(schedule) <= 50 and not hopeless:
            yield schedule, index, kwargs, settings


def tabled(table, schedule, index, x, output, noise, clip):
    """A guided step without guidance, at an index of the schedule."""
    row = torch.tensor([len(schedule) - 1 - index])
    return guided_step(x, output, table, row, noise=noise, clip=clip)


@chains
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_tables(rand, chain, options, eta):
    x, output, noise = (rand(*SHAPE, dtype=torch.float64).cpu() for _ in range(3))
    for schedule, index, kwargs, settings in tabled_cases(chain):
        theirs = rival(diffusers.DDIMScheduler, chain, options, **settings)
        theirs.set_timesteps(len(schedule))
        expected = theirs.step(
            output,
            int(schedule.timestep_map[index]),
            x,
            eta=eta,
            variance_noise=noise,
            use_clipped_model_output=True,
        ).prev_sample
        assert eta or expected.isfinite().all()
        if expected.isnan().all():
            continue  # theirs takes the root of a share of noise that rounding put below 0
        table = ddim_table(schedule, eta=eta, prediction=kwargs["prediction"])
        close(tabled(table, schedule, index, x, output, noise, kwargs["clip"]), expected)


@chains
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_tables(rand, chain, options, variance):
    x, output = (rand(*SHAPE, dtype=torch.float64).cpu() for _ in range(2))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    named = f"fixed_{variance}"
    for schedule, index, kwargs, settings in tabled_cases(chain):
        timestep = int(schedule.timestep_map[index])
        if index == 0 and timestep > 0 and variance == "large":
            continue  # theirs adds noise to the last step of such a chain; ours never does
        theirs = rival(diffusers.DDPMScheduler, chain, options, variance_type=named, **settings)
        theirs.set_timesteps(len(schedule))
        generator = torch.Generator().manual_seed(1)
        expected = theirs.step(output, timestep, x, generator=generator).prev_sample
        table = ddpm_table(schedule, prediction=kwargs["prediction"], fixed_variance=variance)
        close(tabled(table, schedule, index, x, output, noise, kwargs["clip"]), expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_table(rand, shift):
    x, velocity = (rand(*SHAPE).cpu() for _ in range(2))
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(20)
    table = euler_table(theirs.sigmas)
    for row, timestep in enumerate(theirs.timesteps):
        expected = theirs.step(velocity, timestep, x).prev_sample
        close(guided_step(x, velocity, table, torch.tensor(row)), expected)


def wave(latents, timestep, *, known=None):
    """A smooth model."""
    return torch.sin(3 * latents + timestep / 400) / 2


@chains
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize(("steps", "spacing"), SPACINGS[:3])
def test_a_whole_ddim_loop_with_their_own_tables(rand, chain, options, prediction, steps, spacing):
    """Nothing of theirs is replaced here. Their tables are fp32 products, in which the share of the
    noise at index 0 is up to 5e-4 off; both loops run in fp64 and agree to 3e-5 of the largest
    value."""
    if prediction == "eps" and chain.terminal_snr == 0 and spacing == "trailing":
        pytest.skip("noise says nothing of the data at zero SNR")
    noise, schedule = (
        rand(*SHAPE, dtype=torch.float64).cpu(),
        respace(chain, steps, spacing=spacing),
    )
    for clip in (None, 1.0):
        theirs = diffusers.DDIMScheduler(
            **options,
            prediction_type=NAMES[prediction],
            timestep_spacing=spacing,
            clip_sample=clip is not None,
        )
        theirs.set_timesteps(steps)
        x = noise
        for timestep in theirs.timesteps:
            output = wave(x, timestep)
            x = theirs.step(output, timestep, x, use_clipped_model_output=True).prev_sample
        ours = sample_ddim(wave, noise, schedule, prediction=prediction, clip=clip)
        assert (ours - x).abs().max() < 3e-5 * x.abs().max()
