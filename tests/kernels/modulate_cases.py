"""What the tests of `norm_modulate` share: what users write, layouts, the budget."""

import torch
import torch.nn.functional as F

import fastvid.functional  # noqa: F401  registers the ops
from fastvid.kernels.modulate import reference

GRANULARITIES = ["sample", "frame", "token"]
OP = torch.ops.fastvid.norm_modulate.default
BACKWARD = torch.ops.fastvid.norm_modulate_backward.default
LAYOUTS = {
    "contiguous": lambda t: t,
    "columns of a wider row": lambda t: torch.cat([t, t, t], -1)[
        ..., t.shape[-1] : 2 * t.shape[-1]
    ],
    "batch and tokens swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other row": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "width not last in memory": lambda t: t.mT.contiguous().mT,
    "one sample, expanded": lambda t: t[:1].expand(t.shape),
}


def modulation_shape(B, N, D, granularity, frames=3):
    return {"sample": (B, D), "frame": (B, frames, D), "token": (B, N, D)}[granularity]


def eager(x, shift, scale, rms, eps=1e-6):
    """What users write today, in the dtype of its arguments."""
    norm = F.rms_norm if rms else F.layer_norm
    normed = norm(x, x.shape[-1:], eps=eps)
    return normed * (1 + reference.per_token(scale, x)) + reference.per_token(shift, x)


def gradients(f, dy, *inputs):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(f(*inputs), inputs, dy)


def check_budget(within_budget, forward, backward, x, shift, scale, dy, rms):
    """Hold `forward(x, shift, scale) -> y, mean, rstd` and its backward to float64."""
    exact = [tensor.double() for tensor in (x, shift, scale, dy)]
    y, mean, rstd = forward(x, shift, scale)
    assert y.is_contiguous()
    within_budget(y, eager(x, shift, scale, rms), reference.norm_modulate(*exact[:3], rms=rms), "y")
    plain = gradients(lambda *a: eager(*a, rms), dy.to(x.dtype), x, shift, scale)
    wanted = reference.norm_modulate_backward(exact[3], exact[0], exact[2], rms=rms)
    found = backward(dy, x, scale, mean, rstd)
    for name, *triple in zip(("dx", "dshift", "dscale"), found, plain, wanted, strict=True):
        within_budget(*triple, name)
