import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastvid.diffusion.losses import diffusion_loss
from fastvid.diffusion.process import predict_eps, predict_x0
from fastvid.diffusion.sampling import (
    draw_noise,
    guided,
    invert_ddim,
    one_step_x0,
    sample_ddim,
    sample_ddpm,
    seeded,
)
from fastvid.diffusion.schedule import linear, rescale_zero_terminal_snr, respace, scaled_linear
from fastvid.diffusion.steps import ddim_inverse_step, ddim_step, ddpm_step

SHAPE = (2, 3, 4, 6, 6)
CHAIN = linear()
ZERO = rescale_zero_terminal_snr(scaled_linear())
PREDICTIONS = ("eps", "v", "x0")


def exact(schedule, prediction, mean=0.7, std=0.4):
    """The perfect model of independent Gaussian data."""
    at = {int(timestep): index for index, timestep in enumerate(schedule.timestep_map)}

    def model(latents, timestep, *, known=None):
        index = at[timestep.item()]
        alpha = schedule.sqrt_alphas_cumprod[index].item()
        sigma = schedule.sqrt_one_minus_alphas_cumprod[index].item()
        total = (alpha * std) ** 2 + sigma**2
        eps = sigma * (latents - alpha * mean) / total
        x0 = mean + alpha * std**2 * (latents - alpha * mean) / total
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[prediction]

    return model


def rough(latents, timestep, *, known=None):
    """Some smooth function of latents and timestep."""
    return torch.sin(3 * latents.float() + timestep.float() / 400).to(latents.dtype) / 2


def doubled(latents, timestep, *, known=None):
    """The same with a learned variance."""
    return torch.cat([rough(latents, timestep), torch.cos(latents)], dim=1)


WAYS = {
    "ddim": (sample_ddim, {}),
    "ddim-eta1": (sample_ddim, {"eta": 1.0}),
    "ddpm-small": (sample_ddpm, {}),
    "ddpm-large": (sample_ddpm, {"fixed_variance": "large"}),
}


@pytest.mark.parametrize(
    ("chain", "prediction"),
    [(CHAIN, "eps"), (CHAIN, "v"), (CHAIN, "x0"), (ZERO, "v"), (ZERO, "x0")],
    ids=["eps", "v", "x0", "zero-snr-v", "zero-snr-x0"],
)
@pytest.mark.parametrize(("sample", "kwargs"), WAYS.values(), ids=WAYS)
def test_gaussian_data_comes_back_with_its_mean_and_spread(sample, kwargs, chain, prediction):
    schedule = respace(chain, 500, spacing="trailing")
    generator = torch.Generator().manual_seed(0)
    noise = draw_noise((1, 4, 8, 32, 32), generator)
    model = exact(schedule, prediction)
    samples = sample(model, noise, schedule, prediction=prediction, generator=generator, **kwargs)
    # 32768 values tell the mean to 0.0022 and the spread to 0.4 %; the rest is the step size.
    assert samples.mean().item() == pytest.approx(0.7, abs=0.01)
    assert samples.std().item() == pytest.approx(0.4, rel=0.03)


def test_the_right_learned_variance_is_exact_in_ten_steps():
    # For Gaussian data p(x_{t-1} | x_t) is Gaussian: the posterior, widened by what x_t leaves
    # open of x0. A model that says so loses nothing however long the steps; only the last, which
    # adds no noise, must be short.
    schedule = respace(CHAIN, 10)
    at = {int(timestep): index for index, timestep in enumerate(schedule.timestep_map)}

    def model(latents, timestep, *, known=None):
        index = at[timestep.item()]
        left = schedule.alphas_cumprod[index]
        open_x0 = 0.4**2 * (1 - left) / (left * 0.4**2 + 1 - left)
        variance = (
            schedule.posterior_variance[index] + schedule.posterior_mean_coef1[index] ** 2 * open_x0
        )
        low = schedule.posterior_log_variance_clipped[index]
        share = (variance.log() - low) / (schedule.log_betas[index] - low)
        fraction = torch.full_like(latents, 2 * share.item() - 1)
        return torch.cat([exact(schedule, "eps")(latents, timestep), fraction], dim=1)

    generator = torch.Generator().manual_seed(0)
    noise = draw_noise((1, 4, 16, 64, 64), generator)
    samples = sample_ddpm(model, noise, schedule, generator=generator)
    assert samples.mean().item() == pytest.approx(0.7, abs=0.005)
    assert samples.std().item() == pytest.approx(0.4, rel=0.005)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inversion_leads_back_to_the_start(rand, prediction):
    start = (0.7 + 0.4 * rand(*SHAPE, dtype=torch.float64)).cpu()
    errors = []
    for steps in (100, 400):
        schedule = respace(CHAIN, steps)
        model = exact(schedule, prediction)
        noise = invert_ddim(model, start, schedule, prediction=prediction)
        assert noise.std().item() == pytest.approx(1, abs=0.15)
        back = sample_ddim(model, noise, schedule, prediction=prediction)
        errors.append((back - start).abs().mean().item())
    assert errors[1] < 0.02 * 0.4
    assert errors[1] < 0.3 * errors[0]  # first order: a quarter


@pytest.mark.parametrize("chain", [CHAIN, ZERO], ids=["linear", "zero-snr"])
def test_one_step_gives_the_mean_of_the_data(rand, chain):
    for prediction in ("v", "x0"):
        model = exact(chain, prediction)
        estimate = one_step_x0(model, rand(*SHAPE).cpu(), chain, prediction=prediction)
        assert (estimate - 0.7).abs().max() < 0.01


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [None, 0.8])
def test_ddim_with_eta_1_is_the_ancestral_step(rand, prediction, clip):
    schedule = respace(CHAIN, 20)
    x, noise = rand(*SHAPE, dtype=torch.float64), rand(*SHAPE, dtype=torch.float64)
    output = rand(*SHAPE, dtype=torch.float64)
    for index in range(20):
        options = {"noise": noise, "prediction": prediction, "clip": clip}
        torch.testing.assert_close(
            ddim_step(output, x, index, schedule, eta=1.0, **options),
            ddpm_step(output, x, index, schedule, **options),
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [None, 0.8])
def test_a_ddim_step_keeps_x0_and_noise_and_changes_their_shares(rand, prediction, clip):
    schedule, index = respace(CHAIN, 20), 11
    x, output = rand(*SHAPE, dtype=torch.float64), rand(*SHAPE, dtype=torch.float64)
    x0 = predict_x0(output, x, index, schedule, prediction)
    if clip:
        x0 = x0.clamp(-clip, clip)
    eps = predict_eps(x0, x, index, schedule, "x0")
    for step, to in ((ddim_step, index - 1), (ddim_inverse_step, index + 1)):
        alpha, sigma = (
            schedule.sqrt_alphas_cumprod[to],
            schedule.sqrt_one_minus_alphas_cumprod[to],
        )
        stepped = step(output, x, index, schedule, prediction=prediction, clip=clip)
        torch.testing.assert_close(stepped, alpha * x0 + sigma * eps)


STEPS = {
    "ancestral": (ddpm_step, {"noise": torch.ones(SHAPE)}),
    "ddim": (ddim_step, {"noise": torch.ones(SHAPE), "eta": 0.6}),
    "inverse": (ddim_inverse_step, {}),
}


@pytest.mark.parametrize(("step", "kwargs"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("clip", [None, 0.8])
def test_a_step_may_write_over_its_state_but_not_over_the_output(rand, step, kwargs, clip):
    x, output, schedule = rand(*SHAPE).cpu(), rand(*SHAPE).cpu(), respace(CHAIN, 20)
    options = {**kwargs, "clip": clip}
    expected = step(output, x, 11, schedule, **options)
    with pytest.raises(ValueError, match="out must be another tensor than output"):
        step(output, x, 11, schedule, out=output, **options)
    assert step(output, x, 11, schedule, out=x, **options) is x
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_first_inverse_step_reads_the_data_as_if_at_index_0(rand, prediction):
    schedule = respace(CHAIN, 5)
    x, output = rand(*SHAPE, dtype=torch.float64), rand(*SHAPE, dtype=torch.float64)
    for clip in (None, 0.8):
        x0 = predict_x0(output, x, 0, schedule, prediction)
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        eps = predict_eps(x0, x, 0, schedule, "x0")
        left = schedule.alphas_cumprod[0]
        expected = left.sqrt() * x + (1 - left).sqrt() * eps
        ours = ddim_inverse_step(output, x, -1, schedule, prediction=prediction, clip=clip)
        torch.testing.assert_close(ours, expected)


def test_inversion_clips(rand):
    start, schedule = rand(*SHAPE).cpu(), respace(CHAIN, 6)
    x = start.clone()
    for index in range(-1, 5):
        output = rough(x, schedule.timestep_map[max(index, 0)])
        x = ddim_inverse_step(output, x, index, schedule, clip=0.5)
    torch.testing.assert_close(invert_ddim(rough, start, schedule, clip=0.5), x)
    assert not torch.equal(invert_ddim(rough, start, schedule), x)


SAMPLERS = {
    "ddim": lambda model, noise, **kwargs: sample_ddim(model, noise, respace(CHAIN, 6), **kwargs),
    "eta": lambda model, noise, **kwargs: sample_ddim(
        model, noise, respace(CHAIN, 6), eta=0.7, **kwargs
    ),
    "ddpm": lambda model, noise, **kwargs: sample_ddpm(model, noise, respace(CHAIN, 6), **kwargs),
    "one step": lambda model, noise, **kwargs: one_step_x0(
        model, noise, CHAIN, **{k: v for k, v in kwargs.items() if k != "generator"}
    ),
}
samplers = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)


@samplers
@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 4, 6, 6)])
def test_known_cells_are_clean_in_every_call_and_exact_in_the_end(rand, sample, shape):
    noise, clean, known = rand(*SHAPE), rand(*SHAPE), rand(*shape) > 0
    whole = known.reshape(*shape, *[1] * (4 - len(shape))).unsqueeze(1).expand(SHAPE)
    clean[~whole] = float("nan")  # must not be looked at

    def model(latents, timestep, *, known):
        assert torch.equal(latents[whole], clean[whole])
        assert latents[~whole].isfinite().all()
        return doubled(latents, timestep)

    samples = sample(model, noise, known=known, clean=clean)
    assert torch.equal(samples[whole], clean[whole])
    assert samples[~whole].isfinite().all()


@samplers
def test_noise_is_left_alone_and_the_result_can_be_trained_on(rand, sample):
    noise = rand(*SHAPE)
    kept, weight = noise.clone(), torch.nn.Parameter(torch.ones(1, device=noise.device))
    samples = sample(lambda x, t, known: weight * rough(x, t), noise)
    assert torch.equal(noise, kept)
    assert not samples.requires_grad
    (weight * samples).sum().backward()
    assert weight.grad.isfinite().all()


@samplers
def test_a_sample_does_not_depend_on_its_company(rand, sample):
    noise = draw_noise(SHAPE, seeded([3, 4]))
    both = sample(doubled, noise, generator=seeded([13, 14]))
    for i in range(2):
        start = draw_noise((1, *SHAPE[1:]), seeded([3 + i]))
        alone = sample(doubled, start, generator=seeded([13 + i]))
        assert torch.equal(alone[0], both[i])


@pytest.mark.parametrize("name", ["eta", "ddpm"])
def test_all_randomness_comes_from_the_generator(rand, name):
    noise = rand(*SHAPE)

    def run(seed, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        return SAMPLERS[name](rough, noise.to(dtype), generator=generator)

    torch.manual_seed(0)
    first = run(5)
    assert torch.equal(first, run(5))
    assert not torch.equal(first, run(6))


@pytest.mark.parametrize("name", ["ddim", "eta", "ddpm"])
def test_a_float64_state_is_stepped_in_float64(rand, name):
    """By the chain's own coefficients, not those rounded to float32."""
    noise, schedule = rand(*SHAPE, dtype=torch.float64).cpu(), respace(CHAIN, 6)
    ours = SAMPLERS[name](rough, noise, generator=torch.Generator().manual_seed(0))
    x, generator = noise, torch.Generator().manual_seed(0)
    for index in reversed(range(6)):
        output = rough(x, schedule.timestep_map[index])
        drawn = draw_noise(SHAPE, generator, dtype=x.dtype) if index and name != "ddim" else None
        if name == "ddpm":
            x = ddpm_step(output, x, index, schedule, noise=drawn)
        else:
            eta = 0.0 if drawn is None else 0.7
            x = ddim_step(output, x, index, schedule, noise=drawn, eta=eta)
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


@samplers
def test_half_precision_keeps_an_fp32_state(rand, sample):
    noise = rand(*SHAPE).bfloat16()
    seen = set()

    def model(latents, timestep, *, known=None):
        seen.add(latents.dtype)
        return rough(latents, timestep)

    samples = sample(model, noise, generator=torch.Generator().manual_seed(0))
    assert seen == {samples.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["ddim", "eta", "ddpm"])
def test_the_model_is_told_one_shared_timestep_per_step(rand, name):
    told, heard = [], []

    def model(latents, timestep, *, known=None, text):
        assert (timestep.shape, timestep.dtype, text) == ((1,), torch.int64, "words")
        told.append(timestep.item())
        return rough(latents, timestep)

    SAMPLERS[name](
        model, rand(*SHAPE), condition={"text": "words"}, progress=lambda *at: heard.append(at)
    )
    assert told == respace(CHAIN, 6).timestep_map.flip(0).tolist()
    assert heard == [(i, 6) for i in range(1, 7)]


def test_inversion_tells_its_progress_and_calls_once_per_step(rand):
    told, heard = [], []

    def model(latents, timestep, *, known):
        told.append(timestep.item())
        assert torch.equal(latents[:, :, 0], start[:, :, 0])
        return rough(latents, timestep)

    start, known = rand(*SHAPE), torch.tensor([[True, False, False, False]], device=rand(1).device)
    invert_ddim(model, start, respace(CHAIN, 6), known=known, progress=lambda *at: heard.append(at))
    numbers = respace(CHAIN, 6).timestep_map.tolist()
    assert told == [numbers[0], *numbers[:-1]]
    assert heard == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize("name", ["ddim", "eta", "ddpm"])
def test_clipping_bounds_the_sample(rand, name):
    samples = SAMPLERS[name](lambda x, t, known: 9 * rough(x, t), rand(*SHAPE), clip=1.0)
    assert samples.abs().max() <= 1


@samplers
def test_a_model_that_returns_its_input_is_no_trap(rand, sample):
    noise = rand(*SHAPE)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    same = sample(lambda x, t, known: x, noise, generator=generators[0])
    copied = sample(lambda x, t, known: x.clone(), noise, generator=generators[1])
    assert torch.equal(same, copied)


@pytest.mark.parametrize("sample", [sample_ddim, sample_ddpm, one_step_x0, invert_ddim])
def test_noise_prediction_is_refused_at_zero_terminal_snr(rand, sample):
    schedule = respace(ZERO, 6, spacing="trailing")
    with pytest.raises(ValueError, match="prediction must be v or x0"):
        sample(rough, rand(*SHAPE), schedule, prediction="eps")
    for prediction in ("v", "x0"):
        assert sample(rough, rand(*SHAPE), schedule, prediction=prediction).isfinite().all()


def test_a_compiled_model_is_compiled_once_for_all_steps(rand):
    counter = CompileCounter()
    compiled = torch.compile(rough, backend=counter, fullgraph=True)
    noise = rand(*SHAPE)
    expected = sample_ddim(rough, noise, respace(CHAIN, 6))
    torch.testing.assert_close(sample_ddim(compiled, noise, respace(CHAIN, 6)), expected)
    assert counter.frame_count == 1


def test_guidance_moves_away_from_the_unconditional_model(rand):
    """Defect Q6 of the official code: guidance called the model with an argument too many."""
    calls = []

    def model(latents, timestep, *, known=None, text):
        calls.append(text)
        return latents * text

    x, timestep = rand(*SHAPE), torch.tensor([5])
    for scale, factor, texts in ((0, 1.0, [1.0]), (1, 3.0, [3.0]), (2.5, 6.0, [3.0, 1.0])):
        calls.clear()
        ours = guided(model, scale, {"text": 1.0})(x, timestep, known=None, text=3.0)
        torch.testing.assert_close(ours, factor * x)
        assert calls == texts


def test_guidance_keeps_the_conditional_variance_and_may_hide_what_is_known(rand):
    """Defect Q6 of the official code: guidance cut along frames where it meant channels."""

    def model(latents, timestep, *, known=None):
        seen.append(known)
        value = 0.0 if known is None else 1.0
        return torch.full((2, 6, 4, 6, 6), value)

    seen = []
    known = torch.ones(2, 4, dtype=torch.bool)
    ours = guided(model, 2.0, {"known": None})(torch.zeros(SHAPE), torch.tensor([5]), known=known)
    assert (ours[:, :3] == 2).all()
    assert (ours[:, 3:] == 1).all()
    assert seen == [known, None]


@pytest.mark.parametrize("timesteps", [[5], [5, 700]])
def test_a_batched_guidance_is_the_same_in_one_call(rand, timesteps):
    calls = []

    def model(latents, timestep, *, known=None, text, size):
        calls.append(len(latents))
        told = timestep.reshape(-1, 1, 1, 1, 1) / 1000 + text[:, :, None, None, None]
        given = known[:, None, :, None, None]
        return torch.cat([latents * told * size + given, latents], dim=1)

    x, text = rand(*SHAPE), rand(2, 1)
    empty, timestep = rand(1, 1), torch.tensor(timesteps, device=text.device)
    keywords = {"known": rand(1, 4) > 0, "text": text, "size": 3}
    expected = guided(model, 2.5, {"text": empty})(x, timestep, **keywords)
    assert calls == [2, 2]
    calls.clear()
    ours = guided(model, 2.5, {"text": empty}, batched=True)(x, timestep, **keywords)
    torch.testing.assert_close(ours, expected)
    assert calls == [4]
    with pytest.raises(TypeError, match="known must be tensors with and without condition"):
        guided(model, 2.5, {"known": None}, batched=True)(x, timestep, **keywords)


def test_guided_models_sample(rand):
    noise = rand(*SHAPE)
    plain = sample_ddim(doubled, noise, respace(CHAIN, 6))
    same = sample_ddim(guided(doubled, 3.0, {}), noise, respace(CHAIN, 6))
    torch.testing.assert_close(plain, same)


def test_noise_is_the_same_in_every_dtype_and_per_seed():
    noise = draw_noise(SHAPE, seeded([1, 2]))
    assert torch.equal(draw_noise(SHAPE, seeded([2, 1])), noise.flip(0))
    halved = draw_noise(SHAPE, seeded([1, 2]), dtype=torch.bfloat16)
    assert torch.equal(halved, noise.bfloat16())
    with pytest.raises(ValueError, match="generator must be one or 2 of them, got 3"):
        draw_noise(SHAPE, seeded([1, 2, 3]))


def test_nonsense_is_refused_by_name(rand):
    noise, known = rand(*SHAPE), torch.ones(2, 4, dtype=torch.bool)
    schedule = respace(CHAIN, 6)
    for sample in (sample_ddim, sample_ddpm, one_step_x0):
        with pytest.raises(ValueError, match="clean must be given with known"):
            sample(rough, noise, schedule, known=known)
        with pytest.raises(ValueError, match=r"clean must be .* like noise, got"):
            sample(rough, noise, schedule, known=known, clean=noise[:1])
        with pytest.raises(TypeError, match="known must be bool"):
            sample(rough, noise, schedule, known=known.float(), clean=noise)
        with pytest.raises(ValueError, match=r"noise must be float \(B, C, T, H, W\)"):
            sample(rough, noise[0], schedule)
        with pytest.raises(ValueError, match="prediction must be eps, v or x0, got 'flow'"):
            sample(rough, noise, schedule, prediction="flow")
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got 1.5"):
        sample_ddim(rough, noise, schedule, eta=1.5)
    with pytest.raises(ValueError, match="fixed_variance must be small or large"):
        sample_ddpm(rough, noise, schedule, fixed_variance="tiny")
    with pytest.raises(ValueError, match="noise must be given for eta"):
        ddim_step(noise, noise, 3, schedule, eta=0.5)
    with pytest.raises(ValueError, match=r"index must be in \[-1, 5\), got 5"):
        ddim_inverse_step(noise, noise, 5, schedule)


@pytest.mark.gpu
def test_no_step_waits_for_the_device(rand):
    noise, clean = rand(*SHAPE), rand(*SHAPE)
    known = torch.tensor([[True, False, False, False]], device=noise.device)
    schedule = respace(CHAIN, 6)

    def run():
        for generator in (None, seeded([1, 2]), seeded([1, 2], noise.device)):
            given = {"known": known, "clean": clean, "generator": generator}
            sample_ddpm(doubled, noise, schedule, **given)
            sample_ddim(doubled, noise, schedule, eta=0.5, **given)
        index = torch.full((2,), 5, device=noise.device)
        diffusion_loss(doubled, clean, index, noise, schedule, known=known)

    run()  # the first moves the tables
    try:
        torch.cuda.set_sync_debug_mode("error")
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
