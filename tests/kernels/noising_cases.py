"""What the tests of `noising` and `masked_mse` share: draws, layouts, what users write."""

import torch

import fastvid.functional  # noqa: F401  registers the ops
from fastvid.kernels._shared.planes import known_cells
from fastvid.kernels.noising import reference

NOISING = torch.ops.fastvid.noising.default
MSE = torch.ops.fastvid.masked_mse.default
MSE_BACKWARD = torch.ops.fastvid.masked_mse_backward.default
TARGETS = ["eps", "v", "flow"]
KNOWN = ["nothing", "frames", "frames for all", "cells", "cells for all"]
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels of more": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "every other frame": lambda t: t.repeat_interleave(2, dim=2)[:, :, ::2],
    "frames before channels": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "a crop": lambda t: torch.nn.functional.pad(t, (1, 1, 1, 1))[..., 1:-1, 1:-1],
    "one sample, expanded": lambda t: t[:1].expand(t.shape),
}


def draw_known(kind, B, T, H, W, device="cpu"):
    """Neither all nor nothing in any sample, unless T is 1."""
    if kind == "nothing":
        return None
    B = 1 if kind.endswith("for all") else B
    generator = torch.Generator().manual_seed(T)
    if kind.startswith("frames"):
        known = torch.rand(B, T, generator=generator) < 0.5
        known[:, 0], known[:, -1] = True, False
    else:
        known = torch.rand(B, T, H, W, generator=generator) < 0.5
        known[:, -1, -1, -1] = False
    return known.to(device)


def draw_levels(B, T=1, device="cpu", dtype=torch.float32):
    """alpha and sigma (B, T) on the circle."""
    angle = torch.linspace(0.2, 1.4, B * T, dtype=dtype, device=device).view(B, T)
    return angle.cos(), angle.sin()


def eager(x0, alpha, sigma, noise, known=None, known_alpha=None, known_sigma=None, target="v"):
    """What users write today, in the dtype of its arguments."""
    levels = (t[:, None, :, None, None].to(x0.dtype) for t in (alpha, sigma))
    a, s = levels
    if known is not None and known_alpha is not None:
        cells = known_cells(known)
        own = (t[:, None, :, None, None].to(x0.dtype) for t in (known_alpha, known_sigma))
        a, s = (torch.where(cells, own, level) for own, level in zip(own, (a, s), strict=True))
    noisy = a * x0 + s * noise
    if known is not None and known_alpha is None:
        cells = known_cells(known)
        noisy = torch.where(cells, x0, noisy)
        one = torch.ones((), dtype=x0.dtype, device=x0.device)
        a, s = torch.where(cells, one, a), torch.where(cells, 0 * one, s)
    made = {"eps": noise, "flow": noise - x0, "v": a * noise - s * x0}[target]
    return noisy, made


def eager_mse(pred, target, known=None, average="unknown"):
    """What users write today."""
    squares = (pred - target).square()
    if known is None:
        return squares.flatten(1).mean(1)
    unknown = (~known_cells(known)).to(pred.dtype)
    if average == "all":
        return (squares * unknown).flatten(1).mean(1)
    return (squares * unknown).flatten(1).sum(1) / unknown.expand(pred.shape).flatten(1).sum(1)


def gradients(f, grads, *inputs):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(f(*inputs), inputs, grads)


def check_noising(within_budget, launch, x0, noise, levels, known, own, target):
    """Hold a launch with given noise to float64."""
    own = own or (None, None)
    found = launch(x0, *levels, noise, None, 0, known, *own, target)
    exact = reference.noising(
        x0.double(), *(t.double() for t in levels), noise.double(), known, *own, target
    )
    plain = eager(x0, *levels, noise, known, *own, target)
    for name, *triple in zip(("noisy", "target"), found, plain, exact, strict=True):
        assert triple[0].is_contiguous()
        within_budget(*triple, name)
    if known is not None and own[0] is None:
        cells = known_cells(known).expand(x0.shape)
        assert torch.equal(found[0][cells], x0[cells])


def check_mse(within_budget, forward, backward, pred, target, known, average):
    """Hold the loss and its gradient to float64; both come with float32 or wider sums."""
    loss, weight = forward(pred, target, known, average)
    dloss = torch.linspace(1, 2, len(loss), dtype=loss.dtype, device=loss.device)
    wide = pred.double(), target.double()
    exact = reference.masked_mse(*wide, known, average)
    plain = eager_mse(pred.to(loss.dtype), target.to(loss.dtype), known, average)
    # Of a handful of numbers the root mean square is luck: the largest error alone is judged.
    error, allowed = ((t.double() - exact).abs().max() for t in (loss, plain))
    assert error <= 2 * allowed + torch.finfo(loss.dtype).eps * exact.abs().max()
    slope = reference.masked_mse_backward(dloss.double(), *wide, known, average)
    (plain,) = gradients(lambda p: eager_mse(p, target, known, average), dloss, pred)
    found = backward(dloss, pred, target, known, weight)
    assert found.is_contiguous()
    if found.dtype == torch.float64:  # no finer reference to judge it by
        torch.testing.assert_close(found, slope, rtol=1e-14, atol=1e-17)
    else:
        within_budget(found, plain, slope, "dpred")
