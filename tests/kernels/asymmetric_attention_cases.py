"""What the tests of `asymmetric_attention` share: who shares keys, layouts, the float64 oracle."""

import functools

import torch

from fastvid.kernels.asymmetric_attention import reference

SCALE = 0.3

# Sizes of the keys' batch and frames, given those of the queries.
SHARING = {
    "own": lambda B, T: (B, T),
    "one sample": lambda B, T: (1, T),
    "one frame": lambda B, T: (B, 1),
    "one of both": lambda B, T: (1, 1),
}

LAYOUTS = {
    "contiguous": lambda x: x,
    "packed": lambda x: torch.stack([x, x], dim=3)[:, :, :, 1],
    "heads first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "samples last": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "every other frame": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "part of each frame": lambda x: torch.cat([x, x[:, :, :1]], dim=2)[:, :, :-1],
    "width not last in memory": lambda x: x.mT.contiguous().mT,
    "odd steps": lambda x: torch.cat([x, x[..., :3]], -1)[..., : x.shape[-1]],
}


def draw(rand, B, T, Nq, Nk, heads, E, sharing="own", dtype=torch.float32):
    """q, k, v and the gradient of the result."""
    q, dout = (rand(B, T, Nq, heads, E, dtype=dtype) for _ in range(2))
    k, v = (rand(*SHARING[sharing](B, T), Nk, heads, E, dtype=dtype) for _ in range(2))
    return q, k, v, dout


def some_known(B, T, device="cpu"):
    """A third of the frames, another one in each sample; at least one frame is not known."""
    return ((torch.arange(B)[:, None] + torch.arange(T)) % 3 == 1).to(device)


def gradients(f, dout, *inputs):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(f(*inputs), inputs, dout)


def oracle(q, k, v, dout, **rule):
    """out, dq, dk and dv in float64."""
    q, k, v, dout = (tensor.double() for tensor in (q, k, v, dout))
    backward = reference.asymmetric_attention_backward(dout, q, k, v, **rule)
    return reference.asymmetric_attention(q, k, v, **rule), *backward


def check_budget(within_budget, found, q, k, v, dout, **rule):
    """Hold out, dq, dk and dv to float64: float32 to 1e-5, others to the definition's own error."""
    eager = functools.partial(reference.asymmetric_attention, **rule)
    plain = eager(q, k, v), *gradients(eager, dout, q, k, v)
    exact = oracle(q, k, v, dout, **rule)
    for name, *triple in zip(("out", "dq", "dk", "dv"), found, plain, exact, strict=True):
        actual, _, wanted = triple
        if actual.dtype == torch.float32 and wanted.numel():
            error = (actual.double() - wanted).abs().max()
            assert error <= 1e-5 * wanted.abs().max(), f"{name}: {error:.3g}"
        else:
            within_budget(*triple, name)
