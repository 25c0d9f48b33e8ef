"""What the tests of `qk_norm_rope` share: norms, positions, layouts, the budget."""

import functools

import torch
import torch.nn.functional as F

from fastvid.functional import Rotary, rotary_table
from fastvid.kernels.qk_norm_rope import reference

OP = torch.ops.fastvid.qk_norm_rope.default
BACKWARD = torch.ops.fastvid.qk_norm_rope_backward.default
AFFINE = ("q_weight", "k_weight", "q_bias", "k_bias")
GRADIENTS = ("dq", "dk", "dq_weight", "dk_weight", "dq_bias", "dk_bias")

# Norm, across heads, which of the weights and biases.
NORMS = {
    "rms per head": ("rms", False, AFFINE[:2]),
    "rms across heads, no weight": ("rms", True, ()),
    "layer per head": ("layer", False, AFFINE),
    "layer across heads": ("layer", True, AFFINE),
    "layer, only one bias": ("layer", False, AFFINE[3:]),
    "none": (None, False, ()),
}

# Channels of each axis, of 24 or more; interleaved or halves.
TURNS = {
    "none": None,
    "one axis": ((24,), True),
    "three axes, partial": ((8, 4, 10), True),
    "halves": ((24,), False),
    "halves of two axes, partial": ((8, 12), False),
    "halves of three axes": ((6, 8, 10), False),
}

LAYOUTS = {
    "contiguous": lambda q, k: (q, k),
    "packed qkv": lambda q, k: torch.stack((q, k, q), dim=2).unbind(2)[:2],
    "heads, then q k v": lambda q, k: torch.stack((q, k, q), dim=3).unbind(3)[:2],
    "heads first": lambda *t: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in t],
    "every other token": lambda *t: [x.repeat_interleave(2, dim=1)[:, ::2] for x in t],
    "width not last in memory": lambda *t: [x.mT.contiguous().mT for x in t],
    "odd steps": lambda *t: [torch.cat([x, x[..., :3]], -1)[..., : x.shape[-1]] for x in t],
    "one sample, expanded": lambda *t: [x[:1].expand(x.shape) for x in t],
}


def make_rotary(turn, B, N, device="cpu"):
    """Positions drawn from tables of different lengths, some of them fractions."""
    if TURNS[turn] is None:
        return None
    dims, interleaved = TURNS[turn]
    lengths = [9, 5, 7][: len(dims)]
    tables = [rotary_table(torch.arange(n) * 1.5, d) for n, d in zip(lengths, dims, strict=True)]
    generator = torch.Generator().manual_seed(B * N)
    columns = [torch.randint(n, (B, N), generator=generator) for n in lengths]
    index = torch.stack(columns, -1).int()
    rotary = Rotary.of(tables, index, interleaved=interleaved)
    return rotary._replace(**{n: getattr(rotary, n).to(device) for n in ("cos", "sin", "rows")})


def make_affine(draw, norm, heads, E):
    """The weights and biases of `NORMS[norm]`, by name."""
    _, across, names = NORMS[norm]
    return {name: draw(heads * E if across else E) for name in names}


def arguments(norm, affine, rotary, eps=1e-6):
    """The arguments of the op behind q and k."""
    kind, across, _ = NORMS[norm]
    turn = (None, None, None, (), True) if rotary is None else tuple(rotary)
    return *(affine.get(name) for name in AFFINE), *turn, kind, across, eps


def options(norm, rotary=None):
    kind, across, _ = NORMS[norm]
    return {"norm": kind, "across_heads": across, "rotary": rotary}


def eager(q, k, *, norm, across_heads, rotary, eps=1e-6, **affine):
    """What users write today, in the dtype of its arguments."""

    def one(x, weight, bias):
        rows = x.flatten(2) if across_heads else x
        weight, bias = (t if t is None else t.to(x.dtype) for t in (weight, bias))
        if norm == "layer":
            rows = F.layer_norm(rows, rows.shape[-1:], weight, bias, eps)
        elif norm == "rms":
            rows = F.rms_norm(rows, rows.shape[-1:], weight, eps)
        return reference.rotate(rows.reshape(x.shape), rotary)

    return (
        one(q, affine.get("q_weight"), affine.get("q_bias")),
        one(k, affine.get("k_weight"), affine.get("k_bias")),
    )


def gradients(f, douts, q, k, affine):
    """Of q, k and each of `affine`, in the order of `AFFINE`."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, *affine.values())]
    named = dict(zip(affine, leaves[2:], strict=True))
    return torch.autograd.grad(f(*leaves[:2], **named), leaves, douts)


def doubled(rotary):
    return rotary and rotary._replace(cos=rotary.cos.double(), sin=rotary.sin.double())


def check_budget(within_budget, forward, backward, q, k, douts, norm, affine, rotary):
    """Hold `forward(q, k, *arguments)` and its backward to float64."""
    rule = arguments(norm, affine, rotary)
    found = forward(q, k, *rule)
    assert all(x.is_contiguous() for x in found)
    grads = dict(zip(GRADIENTS, backward(*douts, q, k, *rule), strict=True))
    plain = functools.partial(eager, **options(norm, rotary))
    wide = {name: t.double() for name, t in affine.items()}
    exact = functools.partial(reference.qk_norm_rope, **options(norm, doubled(rotary)))
    wanted = exact(q.double(), k.double(), **wide)
    for name, *triple in zip("qk", found, plain(q, k, **affine), wanted, strict=True):
        within_budget(*triple, name)
    names = ["dq", "dk", *(f"d{name}" for name in affine)]
    theirs = gradients(plain, douts, q, k, affine)
    wanted = gradients(exact, [d.double() for d in douts], q.double(), k.double(), wide)
    for name, *pair in zip(names, theirs, wanted, strict=True):
        within_budget(grads.pop(name), *pair, name)
    assert all(t.numel() == 0 for t in grads.values())
