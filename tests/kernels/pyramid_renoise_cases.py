"""What the tests of the pyramid's ops share: noise of every kind, layouts, what users write."""

import torch
from einops import rearrange

import fastvid.functional  # noqa: F401  registers the ops
from fastvid.kernels._shared import philox
from fastvid.kernels.pyramid_renoise import reference

RENOISE = torch.ops.fastvid.pyramid_renoise.default
HALVE = torch.ops.fastvid.pyramid_halve.default
ENDPOINTS = torch.ops.fastvid.stage_endpoints.default
GAMMAS = [1 / 3, 0.2, 1e-3]
KINDS = ["normals", "blocks", "drawn"]
LEVELS = 0.59988003, 0.69302812  # alpha and beta of the first jump
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels of more": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "every other frame": lambda t: t.repeat_interleave(2, dim=2)[:, :, ::2],
    "frames before channels": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "one sample, expanded": lambda t: t[:1].expand(t.shape),
}


def noise_of(kind, x, dtype=None):
    """The noise as the op takes it, and as the reference does."""
    B, C, T, H, W = x.shape
    if kind == "drawn":
        seeds = torch.arange(3, 3 + B, device=x.device)
        normals = philox.normal(seeds.cpu(), 4 * C * T * H * W, 5).view(B, C, T, H, W, 4)
        return (None, seeds, 5), normals.to(x.device)
    shape = (B, C, T, H, W, 4) if kind == "normals" else (B, C, T, 2 * H, 2 * W)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(x.device)
    noise = noise.to(dtype or x.dtype)
    return (noise, None, 0), noise


def eager(x, alpha, beta, gamma, noise):
    """What users write today, in the dtype of x: a Cholesky root in float64, rounded."""
    if noise.dim() > x.dim():
        covariance = (1 + gamma) * torch.eye(4, dtype=torch.float64) - gamma
        root = torch.linalg.cholesky(covariance + 1e-15 * torch.eye(4)).to(noise)
        noise = rearrange(noise @ root.T, "... h w (p q) -> ... (h p) (w q)", p=2)
    up = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    return alpha * up + beta * noise.to(x.dtype)


def eager_halve(x, factor):
    return factor * torch.nn.functional.avg_pool2d(x.flatten(0, 2), 2).unflatten(0, x.shape[:3])


def eager_endpoints(latents, lower, noise, start_sigma, end_sigma, ratio):
    start = start_sigma * noise
    if lower is not None:
        up = lower.repeat_interleave(2, -1).repeat_interleave(2, -2)
        start = start + (1 - start_sigma) * up
    end = end_sigma * noise + (1 - end_sigma) * latents
    ratio = ratio.view(-1, 1, 1, 1, 1).to(noise.dtype)
    return start, end, ratio * start + (1 - ratio) * end, start - end


def judge(within_budget, found, plain, exact, name="result"):
    assert found.is_contiguous()
    if found.dtype == torch.float64:  # no finer reference to judge it by
        torch.testing.assert_close(found, exact, rtol=1e-14, atol=1e-14)
    elif 0 < found.numel() < 64:  # of so few the root mean square is luck
        error, allowed = ((t.double() - exact).abs().max() for t in (found, plain))
        assert error <= 2 * allowed + torch.finfo(found.dtype).eps * exact.abs().max(), name
    else:
        within_budget(found, plain, exact, name)


def check_renoise(within_budget, launch, x, gamma, kind, dtype=None):
    """Hold a launch to float64."""
    own, noise = noise_of(kind, x, dtype)
    found = launch(x, *LEVELS, gamma, *own)
    exact = reference.pyramid_renoise(x.double(), *LEVELS, gamma, noise.double())
    judge(within_budget, found, eager(x, *LEVELS, gamma, noise.to(x.dtype)), exact)


def check_halve(within_budget, launch, x, factor):
    exact = reference.pyramid_halve(x.double(), factor)
    judge(within_budget, launch(x, factor), eager_halve(x, factor), exact)


def check_endpoints(within_budget, launch, latents, lower, noise, endpoints):
    """Hold a launch to float64."""
    B = len(latents)
    ratio = torch.linspace(0.1, 1, B, device=latents.device)
    sigmas = (0.80023995 if lower is not None else 1.0), 0.334
    found = launch(latents, lower, noise, *sigmas, ratio, endpoints)
    wide = [None if t is None else t.double() for t in (latents, lower, noise)]
    exact = reference.stage_endpoints(*wide, *sigmas, ratio.double())
    plain = eager_endpoints(latents, lower, noise, *sigmas, ratio)
    rows = zip(found, plain, exact, ("start", "end", "sample", "target"), strict=True)
    for row in list(rows)[0 if endpoints else 2 :]:
        judge(within_budget, *row)
    if not endpoints:
        assert found[0].numel() == found[1].numel() == 0
