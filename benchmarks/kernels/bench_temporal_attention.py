"""`temporal_attention` against what users write: SDPA behind permutes, SDPA on views, einsum.

Who sees whom is made beforehand for all rivals; q and k are turned by plain PyTorch in theirs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, backward_of, forward_of
from benchmarks.rivals import packages
from benchmarks.rivals.sdpa import by_backend
from fastvid.functional import temporal_attention
from fastvid.kernels.temporal_attention import reference

# VDT-L/2 at 64, 256 and 1024 tokens a frame; MarDini's generator at 512 px.
SHAPES = [(1, 16, 64, 16, 72), (1, 16, 256, 16, 72), (1, 16, 1024, 16, 72), (1, 13, 4096, 16, 64)]
GPU_SHAPES = [(16, 16, 64, 16, 72), (16, 16, 256, 16, 72), (1, 13, 4096, 16, 64)]
QUICK = [(1, 5, 8, 2, 24)]
# By the arguments that say who sees whom and what turns, on MarDini's generator at 256 px.
RULED, GPU_RULED = (1, 13, 1024, 16, 64), (1, 13, 4096, 16, 64)
RULES: dict[str, Callable[..., dict[str, Any]]] = {
    "known": lambda T, E, device: {"known": known(T, device)},
    "window": lambda T, E, device: {"window": (2, 2)},
    "rotary": lambda T, E, device: {"rotary": tables(T, E, device)},
    "known and rotary": lambda T, E, device: {
        "known": known(T, device), "rotary": tables(T, E, device),
    },
}  # fmt: skip


def known(T: int, device: torch.device) -> Tensor:
    """(1, T): the first 5 of 13."""
    return torch.arange(T, device=device)[None] < 5 * T // 13


def tables(T: int, E: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (T, E / 2) of the usual frequencies."""
    angles = torch.arange(T).double()[:, None] * 10000 ** (-torch.arange(0, E, 2).double() / E)
    return angles.cos().to(device, torch.float32), angles.sin().to(device, torch.float32)


def eager(q, k, v, visible=None, rotary=None):
    """The two products of the definition, in the dtype of the inputs."""
    q, k = turned(rotary, q, k)
    scores = torch.einsum("btnhe,bsnhe->bnhts", q, k) * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    return torch.einsum("bnhts,bsnhe->btnhe", scores.softmax(-1), v)


def permuted_sdpa(q, k, v, visible=None, rotary=None, attend=F.scaled_dot_product_attention):
    """Positions into the batch by a copy, as most models do it; a dense mask."""
    q, k = turned(rotary, q, k)
    B, T, N, heads, E = q.shape
    q, k, v = (x.permute(0, 2, 3, 1, 4).reshape(B * N, heads, T, E) for x in (q, k, v))
    out = attend(q, k, v) if visible is None else attend(q, k, v, attn_mask=visible[:, None])
    return out.view(B, N, heads, T, E).permute(0, 3, 1, 2, 4).contiguous()


def strided_sdpa(q, k, v, visible=None, rotary=None):
    """Every position and head a head of its own: views, as far as the strides allow."""
    q_, k_ = turned(rotary, q, k)
    q_, k_, v_ = (x.flatten(2, 3).transpose(1, 2) for x in (q_, k_, v))
    bias = None if visible is None else visible[:, None]
    out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=bias)
    return out.transpose(1, 2).reshape(q.shape)


def turned(rotary, *tensors):
    return tensors if rotary is None else [reference.rotate(x, rotary) for x in tensors]


def flex(visible: Tensor | None, T: int, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention, compiled, behind the same permutes; its block mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    @functools.cache
    def block_mask():
        def sees(b, h, query, key):
            return visible[0, query, key]

        return create_block_mask(sees, None, None, T, T, device=device.type)

    def attend(q, k, v, attn_mask=None):
        return compiled(q, k, v, block_mask=None if attn_mask is None else block_mask())

    return functools.partial(permuted_sdpa, attend=attend)


def from_packages(rule: dict[str, Any]) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """Those that compute the rule: one has a window, none has frames that see only themselves."""
    if "known" in rule:
        return {}
    makers = {"flash-attn": functools.partial(packages.flash_attn, rule.get("window"))}
    if "window" not in rule:
        makers |= {"xformers": packages.xformers, "natten": packages.natten_over_all}

    def over_frames(make):
        attend = packages.over_frames(make())
        return lambda q, k, v: attend(*turned(rule.get("rotary"), q, k), v)

    return {name: functools.partial(over_frames, make) for name, make in makers.items()}


def bytes_moved(forward: bool, B: int, T: int, N: int, heads: int, E: int, itemsize: int) -> int:
    """q, k, v and out; backward q, k, v, dout, dq, dk and dv."""
    return (4 if forward else 7) * B * T * N * heads * E * itemsize


def flops(forward: bool, B: int, T: int, N: int, heads: int, E: int, pairs: int = 0) -> int:
    """Two products of each visible pair of frames (0: T x T), per position and head.

    Backward has five, with the scores made anew.
    """
    return (4 if forward else 10) * B * N * heads * (pairs or T * T) * E


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Forward and backward: on tensors of their own, on views of a packed projection, by rules."""
    on_gpu = device.type == "cuda"
    shapes = QUICK if quick else GPU_SHAPES if on_gpu else SHAPES
    ruled = QUICK[0] if quick else GPU_RULED if on_gpu else RULED
    dtypes = [torch.bfloat16] if on_gpu else [torch.float32, torch.bfloat16]
    return [
        _case(name, *what, dtype, device, quick)
        for name in ("forward", "backward")
        for what in (
            *((packed, "", shape) for packed in (False, True) for shape in shapes),
            *((True, rule, ruled) for rule in RULES),
        )
        for dtype in dtypes
    ]


def _case(name, packed, rule, shape, dtype, device, quick):
    forward, on_gpu = name == "forward", device.type == "cuda"
    bind = forward_of if forward else backward_of
    sizes = dict(zip(("B", "T", "N", "heads", "E"), shape, strict=True))
    T, E = sizes["T"], sizes["E"]
    arguments = RULES[rule](T, E, device) if rule else {}
    visible = None
    if "known" in arguments or "window" in arguments:
        seen = arguments.get("known"), arguments.get("window")
        visible = reference.visible(T, *seen, device)
    rivals = {"eager": eager, "strided": strided_sdpa}
    if on_gpu:
        rivals |= by_backend("permute", permuted_sdpa)
    else:
        rivals["permute"] = permuted_sdpa
    if not quick:
        rivals["compile"] = torch.compile(eager, dynamic=False)
        if forward or on_gpu:  # FlexAttention has no backward on a CPU
            rivals["flex"] = flex(visible, T, device)
    told = {"visible": visible, "rotary": arguments.get("rotary")}
    rivals = {rival: functools.partial(f, **told) for rival, f in rivals.items()}
    here, missing = packages.split_by_presence(device, from_packages(arguments))
    ours = functools.partial(temporal_attention, **arguments)

    def make_inputs(device):
        B, T, N, heads, E = shape
        inputs = torch.randn(B, T, N, 3, heads, E, device=device).to(dtype).unbind(3)
        if not packed:
            inputs = tuple(x.contiguous() for x in inputs)
        dout = torch.randn(shape, device=device).to(dtype)
        return inputs if forward else (*inputs, dout)

    return Case(
        room="temporal_attention",
        name=f"{name}{f', {rule}' if rule else ' of packed qkv' if packed else ''}",
        shape=sizes,
        dtype=dtype,
        make_inputs=make_inputs,
        rivals={r: bind(f) for r, f in ({"fastvid": ours} | rivals | here).items()},
        oracle=bind(functools.partial(reference.temporal_attention, **arguments)),
        nbytes=bytes_moved(forward, **sizes, itemsize=dtype.itemsize),
        flops=flops(forward, **sizes, pairs=0 if visible is None else int(visible.sum())),
        missing=missing,
    )
