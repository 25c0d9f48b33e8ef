import pytest
import torch

from fastvid.diffusion.process import (
    add_noise,
    learned_log_variance,
    mix_known,
    posterior,
    predict_eps,
    predict_x0,
    split_variance,
    target_of,
)
from fastvid.diffusion.schedule import linear, rescale_zero_terminal_snr, respace, scaled_linear
from fastvid.diffusion.steps import ddpm_step

SHAPE = (2, 3, 4, 5, 6)
CHAIN = linear()
ZERO = rescale_zero_terminal_snr(scaled_linear())


@pytest.mark.parametrize("index", [0, 537, 999, torch.tensor([3, 999]), torch.tensor([500])])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_predictions_give_back_data_and_noise(rand, prediction, index):
    x0, noise = rand(*SHAPE, dtype=torch.float64), rand(*SHAPE, dtype=torch.float64)
    x = add_noise(x0, noise, index, CHAIN)
    output = target_of(x0, noise, index, CHAIN, prediction)
    torch.testing.assert_close(predict_x0(output, x, index, CHAIN, prediction), x0)
    torch.testing.assert_close(predict_eps(output, x, index, CHAIN, prediction), noise)


def test_velocity_has_the_sign_of_the_noise(rand):
    x0, noise, index = rand(*SHAPE), rand(*SHAPE), 400
    alpha = CHAIN.sqrt_alphas_cumprod[index].float()
    sigma = CHAIN.sqrt_one_minus_alphas_cumprod[index].float()
    v = target_of(x0, noise, index, CHAIN, "v")
    torch.testing.assert_close(v, alpha * noise - sigma * x0)


@pytest.mark.parametrize("index", [1, 500, 999])
def test_posterior_is_the_product_of_its_two_gaussians(rand, index):
    # q(x_{t-1} | x_t, x0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x0), by adding precisions.
    x0, x = rand(*SHAPE, dtype=torch.float64), rand(*SHAPE, dtype=torch.float64)
    beta, before = CHAIN.betas[index], CHAIN.alphas_cumprod_prev[index]
    precision = (1 - beta) / beta + 1 / (1 - before)
    pull = (1 - beta).sqrt() / beta * x + before.sqrt() / (1 - before) * x0
    mean, variance, log_variance = posterior(x0, x, index, CHAIN)
    torch.testing.assert_close(mean, pull / precision)
    assert variance.item() == pytest.approx(1 / precision.item(), rel=1e-9)
    assert log_variance.exp().item() == pytest.approx(1 / precision.item(), rel=1e-6)


def test_an_int_index_and_a_tensor_agree(rand):
    x0, noise = rand(*SHAPE), rand(*SHAPE)
    for index in (0, 250, 999):
        batch = torch.full((2,), index)
        ours = add_noise(x0, noise, index, CHAIN)
        torch.testing.assert_close(ours, add_noise(x0, noise, batch, CHAIN))
        torch.testing.assert_close(
            posterior(x0, ours, index, CHAIN)[0], posterior(x0, ours, batch, CHAIN)[0]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept(rand, dtype):
    x0, noise, index = rand(*SHAPE, dtype=dtype), rand(*SHAPE, dtype=dtype), torch.tensor([3, 800])
    x = add_noise(x0, noise, index, CHAIN)
    assert {x.dtype, posterior(x0, x, index, CHAIN)[0].dtype} == {dtype}
    for prediction in ("eps", "v", "x0"):
        assert target_of(x0, noise, index, CHAIN, prediction).dtype == dtype
        assert predict_x0(noise, x, index, CHAIN, prediction).dtype == dtype
        assert predict_eps(noise, x, index, CHAIN, prediction).dtype == dtype


def test_learned_variance_runs_between_its_bounds(rand):
    x, output = rand(*SHAPE, dtype=torch.float64), rand(*SHAPE, dtype=torch.float64)
    noise, short = torch.ones_like(x), respace(CHAIN, 10)
    for index in range(1, 10):
        for fraction, bound in ((-1, short.posterior_log_variance_clipped), (1, short.log_betas)):
            said = torch.full_like(x, float(fraction))
            whole = torch.full((2,), index, device=x.device)
            for place in (index, whole):
                torch.testing.assert_close(
                    learned_log_variance(said, place, short),
                    torch.full_like(x, bound[index].item()),
                )
            learned = torch.cat([output, said], 1)
            mean = ddpm_step(learned, x, index, short, noise=None)
            spread = ddpm_step(learned, x, index, short, noise=noise) - mean
            torch.testing.assert_close(spread.square().log(), torch.full_like(x, bound[index]))


def test_fixed_variance_is_small_or_large(rand):
    x, output = rand(*SHAPE, dtype=torch.float64), rand(*SHAPE, dtype=torch.float64)
    mean = ddpm_step(output, x, 5, CHAIN, noise=None)
    for fixed, table in (("small", CHAIN.posterior_variance), ("large", CHAIN.betas)):
        step = ddpm_step(output, x, 5, CHAIN, noise=torch.ones_like(x), fixed_variance=fixed)
        torch.testing.assert_close((step - mean).square(), torch.full_like(x, table[5]))
    for noise in (None, x):
        with pytest.raises(ValueError, match="fixed_variance must be small or large, got 'medium'"):
            ddpm_step(output, x, 5, CHAIN, noise=noise, fixed_variance="medium")


def test_clipping_bounds_x0_and_moves_the_mean(rand):
    x, output = rand(*SHAPE), rand(*SHAPE)
    x0 = predict_x0(output, x, 700, CHAIN, "eps").clamp(-0.5, 0.5)
    mean = ddpm_step(output, x, 700, CHAIN, noise=None, clip=0.5)
    torch.testing.assert_close(mean, posterior(x0, x, 700, CHAIN)[0])


def test_variance_is_read_off_the_channel_count(rand):
    prediction, fraction = split_variance(rand(2, 8, 3, 4, 4), 4)
    assert prediction.shape == fraction.shape == (2, 4, 3, 4, 4)
    assert split_variance(prediction, 4)[1] is None
    with pytest.raises(ValueError, match="output must have 4 or 8 channels, got 5"):
        split_variance(rand(2, 5, 3, 4, 4), 4)


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 4, 5, 6), (1, 4, 5, 6)])
def test_known_cells_come_clean_and_unknown_ones_are_never_looked_at(rand, shape):
    noisy, clean, known = rand(*SHAPE), rand(*SHAPE), rand(*shape) > 0
    whole = known.reshape(*shape, *[1] * (4 - len(shape))).unsqueeze(1).expand(SHAPE)
    mixed = mix_known(noisy, clean.masked_fill(~whole, float("nan")), known)
    assert torch.equal(mixed[whole], clean[whole])
    assert torch.equal(mixed[~whole], noisy[~whole])
    assert mix_known(noisy, clean, None) is noisy


def test_known_of_another_type_or_shape_is_refused(rand):
    noisy = rand(*SHAPE)
    for wrong in (torch.ones(2, 4), torch.ones(2, 4, 5, 6, dtype=torch.uint8)):
        with pytest.raises(TypeError, match="known must be bool with True = given, got torch"):
            mix_known(noisy, noisy, wrong)
    for shape in [(4,), (3, 4), (2, 5), (2, 1, 4, 5, 6), (2, 4, 6, 5), (2, 3, 4)]:
        with pytest.raises(ValueError, match=r"known must be \(B, T\) or \(B, T, H, W\), B=1 or 2"):
            mix_known(noisy, noisy, torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("index", [999, torch.tensor([3, 4])])
def test_noise_prediction_is_refused_at_zero_terminal_snr(rand, index):
    x = rand(*SHAPE)
    with pytest.raises(ValueError, match=r"prediction must be v or x0 .* zero terminal SNR"):
        predict_x0(x, x, index, ZERO, "eps")
    assert predict_x0(x, x, 998, ZERO, "eps").isfinite().all()


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr_is_finite_otherwise(rand, prediction):
    x0, noise = rand(*SHAPE), rand(*SHAPE)
    x = add_noise(x0, noise, 999, ZERO)
    assert torch.equal(x, noise)
    output = target_of(x0, noise, 999, ZERO, prediction)
    assert torch.equal(predict_x0(output, x, 999, ZERO, prediction), x0)
    assert torch.equal(predict_eps(output, x, 999, ZERO, prediction), noise)
    assert ddpm_step(output, x, 999, ZERO, noise=noise, prediction=prediction).isfinite().all()


def test_an_unknown_prediction_is_refused(rand):
    x = rand(*SHAPE)
    for call in (predict_x0, predict_eps):
        with pytest.raises(ValueError, match="prediction must be eps, v or x0, got 'epsilon'"):
            call(x, x, 0, CHAIN, "epsilon")
    with pytest.raises(ValueError, match="prediction must be"):
        target_of(x, x, 0, CHAIN, "flow")
