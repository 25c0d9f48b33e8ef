import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastvid.diffusion.losses import _discretised_nll, diffusion_loss
from fastvid.diffusion.process import add_noise, target_of
from fastvid.diffusion.schedule import linear, rescale_zero_terminal_snr, respace

SHAPE = (2, 3, 4, 6, 6)
CHAIN = linear()
INDEX = torch.tensor([0, 537])
AVERAGES = ("unknown", "all")


def returns(output):
    """A model that always returns this."""
    return lambda latents, timestep, known: output


@pytest.fixture
def pair(rand):
    """Data within [-1, 1], and noise."""
    return rand(*SHAPE).cpu().clamp(-1, 1), rand(*SHAPE).cpu()


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_a_perfect_prediction_costs_nothing(pair, prediction):
    """Defect Q5 of the official code: the loss could not do without given cells."""
    clean, noise = pair
    perfect = target_of(clean, noise, INDEX, CHAIN, prediction)
    loss = diffusion_loss(returns(perfect), clean, INDEX, noise, CHAIN, prediction=prediction)
    assert set(loss) == {"loss", "mse"}
    assert torch.equal(loss["loss"], torch.zeros(2))
    # At the bottom of the variance range the step is the posterior itself: no bits but at index 0.
    learned = torch.cat([perfect, -torch.ones(SHAPE)], 1)
    loss = diffusion_loss(returns(learned), clean, INDEX, noise, CHAIN, prediction=prediction)
    assert loss["vb"][1] == pytest.approx(0, abs=1e-6)
    assert loss["vb"][0] > 0


def test_a_fixed_variance_trains_with_as_many_frames_as_channels():
    """Defect Q4 of the official code: channels and frames changed places in the output."""
    clean, noise = torch.randn(2, 2, 4, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    swapped = noise.transpose(1, 2)
    right, wrong = (
        diffusion_loss(returns(output), clean, INDEX, noise, CHAIN) for output in (noise, swapped)
    )
    assert set(right) == {"loss", "mse"}  # no variance was learned
    assert (right["loss"] == 0).all()
    assert (wrong["loss"] > 0.5).all()


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("cells", [(4,), (4, 6, 6)])
def test_known_cells_teach_nothing(pair, average, cells):
    clean, noise = pair
    known = torch.rand(2, *cells, generator=torch.Generator().manual_seed(0)) < 0.5
    output = torch.zeros(2, 6, *SHAPE[2:], requires_grad=True)
    terms = diffusion_loss(
        returns(output), clean, INDEX, noise, CHAIN, known=known, average=average
    )
    (slope,) = torch.autograd.grad(terms["loss"].sum(), output)
    whole = known.reshape(2, 1, *cells, *[1] * (3 - len(cells))).expand(SHAPE)
    assert (slope[:, :3][whole] == 0).all()
    assert (slope[:, :3][~whole] != 0).all()
    assert (slope[:, 3:][whole] == 0).all() == (average == "unknown")
    assert (slope[:, 3:][~whole] != 0).all()


def test_averages_differ_by_the_share_to_generate(pair):
    clean, noise = pair
    known = torch.tensor([[True, True, True, False], [False] * 4])

    def terms(average):
        model = returns(torch.zeros(SHAPE))
        return diffusion_loss(model, clean, INDEX, noise, CHAIN, known=known, average=average)[
            "mse"
        ]

    torch.testing.assert_close(terms("unknown")[0], noise[0, :, 3].square().mean())
    torch.testing.assert_close(terms("all")[0], noise[0, :, 3].square().sum() / noise[0].numel())
    torch.testing.assert_close(terms("unknown")[1], terms("all")[1])


def test_the_model_sees_known_cells_clean_and_its_own_timesteps(pair):
    clean, noise = pair
    known, short = torch.tensor([[True, False, False, True]]), respace(CHAIN, "ddim10")
    index = torch.tensor([2, 9])
    seen = {}

    def model(latents, timestep, **condition):
        seen.update(latents=latents, timestep=timestep, **condition)
        return latents

    diffusion_loss(model, clean, index, noise, short, known=known, condition={"text": 3})
    noisy = add_noise(clean, noise, index, short)
    assert torch.equal(seen["latents"][:, :, [0, 3]], clean[:, :, [0, 3]])
    assert torch.equal(seen["latents"][:, :, [1, 2]], noisy[:, :, [1, 2]])
    assert seen["timestep"].tolist() == [200, 900]
    assert seen["known"] is known
    assert seen["text"] == 3


def test_the_variational_term_trains_only_the_variance(pair):
    clean, noise = pair
    output = torch.zeros(2, 6, *SHAPE[2:], requires_grad=True)
    terms = diffusion_loss(returns(output), clean, INDEX, noise, CHAIN)
    (slope,) = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    assert (slope[:, :3] == 0).all()
    assert (slope[:, 3:] != 0).all()
    (slope,) = torch.autograd.grad(terms["mse"].sum(), output)
    assert (slope[:, :3] != 0).all()
    assert (slope[:, 3:] == 0).all()


def test_the_variational_term_is_the_kl_in_bits(pair):
    clean, noise = pair
    fraction = torch.full(SHAPE, 0.3)
    terms = diffusion_loss(
        returns(torch.cat([torch.zeros(SHAPE), fraction], 1)), clean, INDEX, noise, CHAIN
    )
    at = 537
    x = add_noise(clean, noise, INDEX, CHAIN)[1]
    gap = CHAIN.posterior_mean_coef1[at] * (clean[1] - x / CHAIN.sqrt_alphas_cumprod[at])
    low, high = CHAIN.posterior_variance[at].log(), CHAIN.betas[at].log()
    true = torch.distributions.Normal(torch.zeros_like(gap), (low / 2).exp())
    ours = torch.distributions.Normal(gap, ((low + 0.65 * (high - low)) / 2).exp())
    bits = torch.distributions.kl_divergence(true, ours).mean() / math.log(2)
    assert terms["vb"][1].item() == pytest.approx(bits.item(), rel=1e-4)


def test_the_variational_term_can_be_weighed_and_left_out(pair):
    clean, noise = pair
    model = returns(torch.zeros(2, 6, *SHAPE[2:]))
    whole, part, none = (
        diffusion_loss(model, clean, INDEX, noise, CHAIN, variational=factor)
        for factor in (1.0, 0.25, 0.0)
    )
    torch.testing.assert_close(part["vb"], whole["vb"] / 4)
    torch.testing.assert_close(part["loss"], part["mse"] + part["vb"])
    assert set(none) == {"loss", "mse"}
    assert torch.equal(none["loss"], whole["mse"])


def test_equal_models_of_any_prediction_have_equal_bits(pair):
    clean, noise = pair
    guess = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))  # of the noise
    x = add_noise(clean, noise, INDEX, CHAIN)
    alpha, sigma = (
        CHAIN.gather(name, INDEX, x)
        for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    )
    x0 = (x - sigma * guess) / alpha
    outputs = {"eps": guess, "v": alpha * guess - sigma * x0, "x0": x0}
    bits = [
        diffusion_loss(
            returns(torch.cat([output, torch.zeros(SHAPE)], 1)),
            clean,
            INDEX,
            noise,
            CHAIN,
            prediction=prediction,
        )["vb"]
        for prediction, output in outputs.items()
    ]
    torch.testing.assert_close(bits[0], bits[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bits[0], bits[2], rtol=1e-4, atol=1e-5)


def test_the_bins_at_index_0_share_all_probability():
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, sigma in ((0.0, 0.3), (0.9, 0.02), (-1.5, 0.5)):
        nll = _discretised_nll(
            bins, torch.full_like(bins, mean), torch.full_like(bins, math.log(sigma))
        )
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-9)
    near = _discretised_nll(*torch.tensor([[0.1], [0.1], [math.log(0.1)]], dtype=torch.float64))
    density = 2 / 255 / (0.1 * math.sqrt(2 * math.pi))
    assert near.item() == pytest.approx(-math.log(density), rel=1e-3)


@pytest.mark.parametrize("average", AVERAGES)
def test_all_known_is_refused_or_shows_as_nan(pair, average, monkeypatch):
    clean, noise = pair
    known = torch.tensor([[True] * 4, [True, True, True, False]])

    def loss():
        model = returns(torch.zeros(2, 6, *SHAPE[2:]))
        return diffusion_loss(model, clean, INDEX, noise, CHAIN, known=known, average=average)

    with pytest.raises(ValueError, match=r"something to generate in every sample.*\[0\]"):
        loss()
    # Where looking would wait for a device or break a graph, nothing is looked at.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert loss()["loss"].isnan().tolist() == [True, False]


@pytest.mark.parametrize("average", AVERAGES)
def test_nan_is_never_hidden(pair, average):
    clean, noise = pair
    known = torch.tensor([[True, True, False, False]])
    for frame in (0, 3):  # a known one, an unknown one
        output = torch.zeros(SHAPE)
        output[0, 0, frame, 0, 0] = float("nan")
        terms = diffusion_loss(
            returns(output), clean, INDEX, noise, CHAIN, known=known, average=average
        )
        assert terms["loss"].isnan().tolist() == [True, False]


def test_bf16_latents_are_judged_in_fp32(pair):
    clean, noise = (each.bfloat16() for each in pair)
    seen = []

    def model(latents, timestep, known):
        seen.append(latents.dtype)
        return torch.cat([latents, latents], 1)

    terms = diffusion_loss(model, clean, INDEX, noise, CHAIN)
    assert seen == [torch.bfloat16]
    assert {term.dtype for term in terms.values()} == {torch.float32}
    wide = diffusion_loss(model, clean.float(), INDEX, noise.float(), CHAIN)
    torch.testing.assert_close(terms["mse"], wide["mse"], rtol=1e-2, atol=0)


def test_zero_terminal_snr_trains_v_and_x0_only(pair):
    clean, noise = pair
    schedule, last = rescale_zero_terminal_snr(CHAIN), torch.tensor([999, 998])
    model = returns(torch.zeros(2, 6, *SHAPE[2:]))
    for prediction in ("v", "x0"):
        terms = diffusion_loss(model, clean, last, noise, schedule, prediction=prediction)
        assert all(term.isfinite().all() for term in terms.values())
    with pytest.raises(ValueError, match="prediction must be v or x0"):
        diffusion_loss(model, clean, last, noise, schedule, prediction="eps")


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_one_graph_serves_all_steps_when_compiled(pair, warm):
    clean, noise = pair
    layer, chain = torch.nn.Conv3d(3, 6, 1), linear()
    known = torch.tensor([[True, False, False, False]])

    def step(index, noise):
        model = lambda latents, timestep, known: layer(latents)  # noqa: E731
        return diffusion_loss(model, clean, index, noise, chain, known=known)["loss"].sum()

    torch.compiler.reset()
    if warm:
        step(INDEX, noise)
    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for index in (INDEX, torch.tensor([999, 3]), torch.tensor([0, 1])):
        torch.testing.assert_close(compiled(index, noise), step(index, noise))
    # A cold chain moves its tables in the first graph and finds them moved in the second.
    assert counter.frame_count == (1 if warm else 2)


def test_nonsense_is_refused_by_name(pair):
    clean, noise = pair
    model = returns(torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="average must be unknown or all, got 'masked'"):
        diffusion_loss(model, clean, INDEX, noise, CHAIN, average="masked")
    with pytest.raises(ValueError, match=r"noise must be .* like clean, got"):
        diffusion_loss(model, clean, INDEX, noise[:1], CHAIN)
    with pytest.raises(TypeError, match="known must be bool"):
        diffusion_loss(model, clean, INDEX, noise, CHAIN, known=torch.zeros(2, 4))
    with pytest.raises(TypeError, match="index must be int64"):
        diffusion_loss(model, clean, INDEX.float(), noise, CHAIN)
    for wrong in ([-1, 5], [5, 1000]):
        with pytest.raises(ValueError, match=r"index must be in \[0, 1000\), got"):
            diffusion_loss(model, clean, torch.tensor(wrong), noise, CHAIN)
    with pytest.raises(ValueError, match="output must have 3 or 6 channels, got 4"):
        diffusion_loss(returns(torch.zeros(2, 4, 4, 6, 6)), clean, INDEX, noise, CHAIN)
