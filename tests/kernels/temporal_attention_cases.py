"""What the tests of `temporal_attention` share: layouts and the rules of who sees whom."""

import torch


def tables(T, E, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(T * E)
    angles = 6 * torch.rand(T, E // 2, generator=generator, dtype=torch.float64)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def gradients(f, dout, *inputs):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(f(*inputs), inputs, dout)


RULES = {
    "all": lambda B, T, E: {},
    "known": lambda B, T, E: {"known": torch.arange(B * T).view(B, T) % 3 == 1},
    "window": lambda B, T, E: {"window": (2, 0)},
    "rotary": lambda B, T, E: {"rotary": tables(T + 2, E)},
    "everything": lambda B, T, E: {
        "known": torch.arange(T)[None] % 3 == 1, "window": (1, 3), "rotary": tables(T, E),
    },
}  # fmt: skip

LAYOUTS = {
    "contiguous": lambda *t: t,
    "packed qkv": lambda *t: torch.stack(t, dim=3).unbind(3),
    "heads, then q k v": lambda *t: torch.stack(t, dim=4).unbind(4),
    "positions first": lambda *t: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in t],
    "every other frame": lambda *t: [x.repeat_interleave(2, dim=1)[:, ::2] for x in t],
    "width not last in memory": lambda *t: [x.mT.contiguous().mT for x in t],
    "odd steps": lambda *t: [torch.cat([x, x[..., :3]], -1)[..., : x.shape[-1]] for x in t],
    "one sample, expanded": lambda *t: [x[:1].expand(x.shape) for x in t],
}
