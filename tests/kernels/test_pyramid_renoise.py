"""The promises of the pyramid's ops on the CPU, and inside PyTorch."""

import logging

import pytest
import torch
from einops import rearrange

from fastvid.functional import (
    latent_pyramid,
    noise_pyramid,
    pyramid_renoise,
    stage_endpoints,
)
from fastvid.kernels._shared import paths
from fastvid.kernels.pyramid_renoise import reference
from tests.kernels.noising_cases import LAYOUTS
from tests.kernels.pyramid_renoise_cases import (
    ENDPOINTS,
    GAMMAS,
    HALVE,
    KINDS,
    LEVELS,
    RENOISE,
    check_endpoints,
    check_halve,
    check_renoise,
    noise_of,
)

SHAPES = [(2, 3, 2, 4, 6), (1, 2, 3, 5, 7), (2, 1, 1, 12, 20), (1, 2, 1, 3, 300)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# ---- the reference


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_root_is_that_of_the_covariance(gamma):
    root = reference.block_root(gamma, torch.empty(0, dtype=torch.float64))
    wanted = (1 + gamma) * torch.eye(4, dtype=torch.float64) - gamma
    torch.testing.assert_close(root @ root.T, wanted, rtol=0, atol=1e-15)
    assert torch.equal(root, root.tril())


@pytest.mark.parametrize("kind", ["normals", "blocks"])
def test_written_gradient_is_the_gradient(kind):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    noise = noise_of(kind, x, torch.float64)[1].requires_grad_()
    out = reference.pyramid_renoise(x, *LEVELS, 0.2, noise)
    dout = torch.randn_like(out)
    written = reference.pyramid_renoise_backward(dout, *LEVELS, 0.2, kind == "normals")
    torch.testing.assert_close(written, torch.autograd.grad(out, (x, noise), dout))
    small = reference.pyramid_halve(out, 2.0)
    dsmall = torch.randn_like(small)
    written = reference.pyramid_halve_backward(dsmall, 2.0)
    torch.testing.assert_close((written,), torch.autograd.grad(small, out, dsmall))


# ---- what the ops compute


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_cpu_rounds_no_worse_than_eager(within_budget, cpu_path, gamma, kind, dtype):
    torch.manual_seed(0)
    for shape in SHAPES:
        check_renoise(within_budget, RENOISE, torch.randn(shape).to(dtype), gamma, kind)


@pytest.mark.parametrize("kind", ["normals", "blocks"])
def test_noise_may_be_finer_than_the_latents(within_budget, cpu_path, kind):
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        x = torch.randn(2, 3, 2, 4, 6).to(dtypes[0])
        check_renoise(within_budget, RENOISE, x, 1 / 3, kind, dtypes[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_reduces_no_worse_than_eager(within_budget, cpu_path, dtype):
    torch.manual_seed(0)
    for B, C, T, H, W in SHAPES:
        x = torch.randn(B, C, T, 2 * H, 2 * W).to(dtype)
        check_halve(within_budget, HALVE, x, 2.0)
        check_halve(within_budget, HALVE, x, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("endpoints", [False, True])
def test_cpu_endpoints_round_no_worse_than_eager(within_budget, cpu_path, endpoints, lowest, dtype):
    torch.manual_seed(0)
    for B, C, T, H, W in SHAPES:
        latents, noise = torch.randn(2, B, C, T, 2 * H, 2 * W).to(dtype)
        lower = None if lowest else torch.randn(B, C, T, H, W).to(dtype)
        check_endpoints(within_budget, ENDPOINTS, latents, lower, noise, endpoints)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_sum_to_zero_at_a_third(cpu_path, dtype):
    """Where the covariance is singular, and a Cholesky in float32 fails."""
    x = torch.zeros(1, 4, 2, 24, 40, dtype=dtype)
    for gamma in (1 / 3, float(torch.tensor(1 / 3))):  # a float32 third is a little more
        noise = pyramid_renoise(x, 1.0, 1.0, gamma=gamma, seed=0)
        assert reference.block_sums(noise).abs().max() < 1e-5


@pytest.mark.parametrize("gamma", GAMMAS)
def test_drawn_blocks_have_the_covariance(cpu_path, gamma):
    n = 4 * 64 * 64
    noise = pyramid_renoise(torch.zeros(1, 4, 1, 64, 64), 0.0, 1.0, gamma=gamma, seed=11).double()
    blocks = rearrange(noise[0, :, 0], "c (h p) (w q) -> c h w (p q)", p=2, q=2)
    flat = blocks.reshape(-1, 4)
    wanted = (1 + gamma) * torch.eye(4, dtype=torch.float64) - gamma
    assert (flat.T @ flat / n - wanted).abs().max() < 5 / n**0.5
    assert flat.mean(0).abs().max() < 4 / n**0.5
    for one, other in ((blocks[:, 1:], blocks[:, :-1]), (blocks[:, :, 1:], blocks[:, :, :-1])):
        one, other = one.reshape(-1, 4), other.reshape(-1, 4)
        assert (one.T @ other / len(one)).abs().max() < 5 / len(one) ** 0.5
    assert (blocks[1:].reshape(-1, 4).T @ blocks[:-1].reshape(-1, 4) / n).abs().max() < 5 / n**0.5


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_jump_leaves_white_noise_of_its_level(gamma):
    """What the stage before leaves, upsampled, plus the noise of the jump, is white."""
    before, n = 0.667, 4 * 64 * 64
    alpha = 1 / ((1 + 1 / gamma) ** 0.5 * before + 1 - before)
    beta = alpha * before / gamma**0.5
    x = before * torch.randn(1, 4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    after = pyramid_renoise(x, alpha, beta, gamma=gamma, seed=3).double()
    blocks = rearrange(after[0, :, 0], "c (h p) (w q) -> (c h w) (p q)", p=2, q=2)
    level = 1 - alpha * (1 - before)
    wanted = level**2 * torch.eye(4, dtype=torch.float64)
    assert (blocks.T @ blocks / n - wanted).abs().max() < 5 / n**0.5


def test_a_samples_noise_is_that_of_its_seed(cpu_path):
    x = torch.zeros(3, 2, 2, 5, 7)
    whole = pyramid_renoise(x, *LEVELS, seed=5, stream=2)
    alone = pyramid_renoise(x[1:2], *LEVELS, seed=torch.tensor([6]), stream=2)
    assert torch.equal(whole[1:2], alone)
    seeds = torch.tensor([5, 0, 6, 0, 7, 0])[::2]
    assert torch.equal(whole, pyramid_renoise(x, *LEVELS, seed=seeds, stream=2))
    assert not torch.equal(whole, pyramid_renoise(x, *LEVELS, seed=5, stream=3))
    assert not torch.equal(whole[0], whole[1])


def test_both_cpu_paths_draw_the_same(monkeypatch):
    from fastvid.kernels._shared import native

    x = torch.randn(2, 3, 2, 9, 15)
    ours = pyramid_renoise(x, *LEVELS, seed=-1, stream=2**32 - 1)
    monkeypatch.setattr(native, "loaded", lambda: False)
    plain = pyramid_renoise(x, *LEVELS, seed=-1, stream=2**32 - 1)
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_any_strides(cpu_path, layout):
    torch.manual_seed(0)
    x, big, eps = (LAYOUTS[layout](torch.randn(2, 3, 4, 2 * n, 4 * n)) for n in (2, 4, 4))
    for kind in KINDS:
        own, _ = noise_of(kind, x)
        wanted = RENOISE(x.contiguous(), *LEVELS, 0.2, *own)
        assert torch.equal(RENOISE(x, *LEVELS, 0.2, *own), wanted)
    assert torch.equal(HALVE(big, 1.0), HALVE(big.contiguous(), 1.0))
    ratio = torch.tensor([0.25, 0.5])
    found = ENDPOINTS(big, x, eps, 0.8, 0.3, ratio, True)
    wanted = ENDPOINTS(*(t.contiguous() for t in (big, x, eps)), 0.8, 0.3, ratio, True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_given_noise_of_any_strides(cpu_path):
    x = torch.randn(2, 3, 4, 5, 6)
    for shape in ((2, 3, 4, 5, 6, 4), (2, 3, 4, 10, 12)):
        noise = torch.randn(*shape[:3], *reversed(shape[3:])).permute(
            0, 1, 2, *reversed(range(3, len(shape)))
        )
        found = pyramid_renoise(x, *LEVELS, noise=noise)
        assert torch.equal(found, pyramid_renoise(x, *LEVELS, noise=noise.contiguous()))


def test_one_frame_is_a_clip_of_one(cpu_path):
    x, noise = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 8, 12)
    for own in ({"seed": 1}, {"noise": noise}):
        clip = {k: v.unsqueeze(2) if k == "noise" else v for k, v in own.items()}
        found = pyramid_renoise(x, *LEVELS, **own)
        assert torch.equal(found, pyramid_renoise(x.unsqueeze(2), *LEVELS, **clip)[:, :, 0])
    normals = torch.randn(2, 3, 4, 6, 4)
    assert pyramid_renoise(x, *LEVELS, noise=normals).shape == (2, 3, 8, 12)
    frames = zip(latent_pyramid(noise, 3), latent_pyramid(noise.unsqueeze(2), 3), strict=True)
    assert all(torch.equal(a, b[:, :, 0]) for a, b in frames)


def test_pyramids_have_a_level_per_stage(cpu_path):
    x = torch.randn(2, 3, 4, 64, 96)
    for pyramid, spread in ((latent_pyramid, 0.25), (noise_pyramid, 1.0)):
        levels = pyramid(x, 3)
        assert [level.shape[-2:] for level in levels] == [(16, 24), (32, 48), (64, 96)]
        assert levels[-1] is x
        assert abs(levels[0].std() - spread) < 0.02
        assert len(pyramid(x, 1)) == 1
    mean = rearrange(x, "b c t (h p) (w q) -> b c t h w (p q)", p=4, q=4).mean(-1)
    torch.testing.assert_close(latent_pyramid(x, 3)[0], mean)
    torch.testing.assert_close(noise_pyramid(x, 3)[0], 4 * mean)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 4), (2, 2, 0, 4, 4), (2, 0, 3, 4, 4)])
def test_empty(cpu_path, shape):
    x = torch.zeros(shape)
    big = (*shape[:3], 8, 8)
    assert pyramid_renoise(x, *LEVELS, seed=0).shape == big
    assert pyramid_renoise(x, *LEVELS, noise=torch.zeros(big)).shape == big
    assert latent_pyramid(x, 3)[0].shape == (*shape[:3], 1, 1)
    ends = stage_endpoints(
        torch.zeros(big), x, torch.zeros(big), start_sigma=0.8, end_sigma=0.3, ratio=torch.ones(1)
    )
    assert all(end.shape == big for end in ends)


def test_threads_do_not_change_the_bits(cpu_path):
    x = torch.randn(2, 4, 3, 40, 40)
    big, threads, found = torch.randn(2, 4, 3, 80, 80), torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            ends = stage_endpoints(
                big, x, big, start_sigma=0.8, end_sigma=0.3, ratio=torch.ones(2) / 3
            )
            found.append([pyramid_renoise(x, *LEVELS, seed=1), HALVE(big, 1.0), *ends])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_path_is_logged_once(cpu_path, caplog):
    paths.announce.cache_clear()
    x = torch.ones(1, 1, 1, 2, 2)
    with caplog.at_level(logging.DEBUG, "fastvid.kernels"):
        for _ in range(3):
            pyramid_renoise(latent_pyramid(x, 2)[0], *LEVELS, seed=0)
    name = {"compiled": "C++", "pytorch": "PyTorch"}[cpu_path]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"pyramid_halve: {name}", f"pyramid_renoise: {name}"]


# ---- inside PyTorch


def test_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    for kind in ("normals", "blocks"):
        noise = noise_of(kind, x, torch.float64)[1].requires_grad_()
        given = lambda x, n: pyramid_renoise(x, *LEVELS, gamma=0.2, noise=n)  # noqa: E731
        assert torch.autograd.gradcheck(given, (x, noise))
    assert torch.autograd.gradcheck(lambda x: pyramid_renoise(x, *LEVELS, seed=3), (x,))
    big = torch.randn(2, 2, 1, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: latent_pyramid(x, 3)[:2], (big,))
    assert torch.autograd.gradgradcheck(lambda x: noise_pyramid(x, 3)[:2], (big,))


def test_opcheck(rand, device):
    x, big = rand(2, 3, 2, 2, 4), rand(2, 3, 2, 4, 8)
    for kind in KINDS:
        own, _ = noise_of(kind, x)
        torch.library.opcheck(RENOISE, (x.clone().requires_grad_(), *LEVELS, 0.2, *own))
    torch.library.opcheck(HALVE, (big.clone().requires_grad_(), 2.0))
    ratio = torch.tensor([0.25, 0.5], device=device)
    for lower, sigma, endpoints in ((x, 0.8, True), (None, 1.0, False)):
        torch.library.opcheck(ENDPOINTS, (big, lower, big, sigma, 0.3, ratio, endpoints))


def stage(x, alpha, beta, seed, ratio):
    up = pyramid_renoise(x, alpha, beta, seed=seed)
    low, same = latent_pyramid(up, 2)
    ends = stage_endpoints(same, low, up, start_sigma=0.8, end_sigma=0.3, ratio=ratio)
    return ends.sample + ends.end


def test_compiles_once_for_all_sizes(device, rand):
    torch._dynamo.reset()
    step = torch.compile(stage, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, T, H in ((2, 4, 6), (3, 5, 10)):
            x, ratio = rand(B, 3, T, H, H + 2), torch.linspace(0, 1, B, device=device)
            arguments = (x, *LEVELS, torch.tensor(B, device=device), ratio)
            torch.testing.assert_close(step(*arguments), stage(*arguments))


def test_exports_with_free_sizes(device, rand):
    class Stage(torch.nn.Module):
        def forward(self, x, seed, ratio):
            return stage(x, *LEVELS, seed, ratio)

    def example(B, T, H):
        ratio = torch.linspace(0, 1, B, device=device)
        return rand(B, 3, T, H, H), torch.tensor(1, device=device), ratio

    B, T = torch.export.Dim("B", min=2), torch.export.Dim("T", min=2)
    shapes = {"x": {0: B, 2: T}, "seed": None, "ratio": {0: B}}
    exported = torch.export.export(Stage(), example(2, 4, 6), dynamic_shapes=shapes).module()
    other = example(3, 5, 6)
    torch.testing.assert_close(exported(*other), stage(other[0], *LEVELS, *other[1:]))


def test_meta_tensors_pass_through():
    x = torch.empty(2, 3, 4, 5, 6, device="meta", requires_grad=True)
    out = pyramid_renoise(x, *LEVELS, seed=1)
    latent_pyramid(out, 2)[0].sum().backward()
    assert out.shape == (2, 3, 4, 10, 12)
    assert x.grad.shape == x.shape


# ---- refusals

X, BIG, RATIO = torch.zeros(2, 3, 4, 6, 10), torch.zeros(2, 3, 4, 12, 20), torch.ones(2)
ENDS = {"start_sigma": 0.8, "end_sigma": 0.3, "ratio": RATIO}


@pytest.mark.parametrize(
    ("x", "options", "error", "says"),
    [
        (X[0, 0], {"seed": 1}, ValueError, r"x must be \(B, C, T, H, W\), got \(4, 6, 10\)"),
        (X.long(), {"seed": 1}, TypeError, "x must be float32"),
        (X, {}, ValueError, "noise or seed must be given, and not both, got neither"),
        (X, {"seed": 1, "noise": BIG}, ValueError, "and not both, got both"),
        (X, {"noise": BIG[..., :-1, :]}, ValueError, r"noise must be .*2H=12.* 11, 20\)"),
        (X, {"noise": BIG[0]}, ValueError, r"noise must be \(B, C, T, 2H, 2W\)"),
        (X, {"noise": X[..., None]}, ValueError, r"noise must be \(B, C, T, H, W, 4\)"),
        (X, {"noise": BIG.long()}, TypeError, "noise must be float32"),
        (X, {"noise": BIG.to("meta")}, ValueError, "noise must be on the device of x, cpu"),
        (X, {"seed": 1, "gamma": 0.34}, ValueError, r"gamma must be in \(0, 1/3\], got 0.34"),
        (X, {"seed": 1, "gamma": 0.0}, ValueError, r"gamma must be in \(0, 1/3\], got 0"),
        (X, {"seed": 1.0}, TypeError, "seed must be an int or an int64 Tensor, got float"),
        (X, {"seed": torch.zeros(3).long()}, ValueError, r"seed must be \(\), \(1,\) or \(2,\)"),
        (X, {"seed": 1, "stream": -1}, ValueError, "stream must be in"),
    ],
)
def test_pyramid_renoise_refuses(x, options, error, says):
    with pytest.raises(error, match=says):
        pyramid_renoise(x, *LEVELS, **options)


@pytest.mark.parametrize("pyramid", [latent_pyramid, noise_pyramid])
def test_pyramids_refuse(pyramid):
    name = pyramid.__name__.removesuffix("_pyramid")
    with pytest.raises(ValueError, match=f"{name}s? must have H and W divisible by 4, got H=6"):
        pyramid(X, 3)
    with pytest.raises(ValueError, match="divisible by 2, got H=6 W=9"):
        pyramid(X[..., :9], 2)
    with pytest.raises(ValueError, match="stages must be at least 1, got 0"):
        pyramid(X, 0)
    with pytest.raises(TypeError, match="must be float32"):
        pyramid(X.int(), 2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((X[0], X, X), {}, ValueError, r"latents must be \(B, C, T, H, W\)"),
        ((BIG, X, X), {}, ValueError, r"noise must be .*got \(2, 3, 4, 6, 10\)"),
        ((BIG, BIG, BIG), {}, ValueError, r"lower must be .*H/2=6"),
        ((BIG[..., :11, :], X, BIG[..., :11, :]), {}, ValueError, "divisible by 2, got H=11"),
        ((BIG, None, BIG), {}, ValueError, "start_sigma must be 1 where lower is None, got 0.8"),
        ((BIG, X.half(), BIG), {}, TypeError, "lower must have the dtype of latents"),
        ((BIG, X, BIG.to("meta")), {}, ValueError, "noise must be on the device of latents"),
        ((BIG, X, BIG), {"ratio": torch.ones(3)}, ValueError, r"ratio must be \(B\|1\)"),
        ((BIG, X, BIG), {"ratio": RATIO.double()}, TypeError, "ratio must be float32"),
        ((BIG, X, BIG.clone().requires_grad_()), {}, RuntimeError, "detach its arguments"),
    ],
)
def test_stage_endpoints_refuses(arguments, options, error, says):
    with pytest.raises(error, match=says):
        stage_endpoints(*arguments, **ENDS | options)
