"""`masked_attention` against what users have: slices, a dense mask, FlexAttention, no mask at all.

"eager" is SDPA with a dense mask. "dense" rivals hide nothing, so they compute something else and
never match: they say what the visible share is taken of.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, backward_of, forward_of
from benchmarks.rivals import packages
from benchmarks.rivals.sdpa import by_backend, heads_first, sdpa
from fastvid.functional import FrameLayout, Visibility, masked_attention
from fastvid.kernels._shared import intervals
from fastvid.kernels.masked_attention import reference, vendor

CHUNK = 1024  # query rows that the float64 oracle takes at a time


def identity(lengths: list[int], given: int, device) -> Visibility:
    """The first `given` frames are known."""
    known = [frame < given for frame in range(len(lengths))]
    return Visibility.identity(FrameLayout(lengths, device=device), known)


def every_other(lengths: list[int], device) -> Visibility:
    """The frames 0, 2, 4 and so on are known."""
    known = [frame % 2 == 0 for frame in range(len(lengths))]
    return Visibility.identity(FrameLayout(lengths, device=device), known)


def causal(lengths: list[int], device) -> Visibility:
    """Frame-causal."""
    return Visibility.causal(FrameLayout(lengths, device=device))


def own_frame(lengths: list[int], device) -> Visibility:
    """Spatial attention: every frame by itself."""
    return Visibility.window(FrameLayout(lengths, device=device), 0, 0)


def dense(lengths: list[int], device) -> Visibility:
    """Nothing is hidden, but said by a table, so that it is our kernel that runs."""
    return Visibility.window(FrameLayout(lengths, device=device), len(lengths), len(lengths))


def pyramid(lengths: list[int], device) -> Visibility:
    """Text in front, then the history of a pyramid and the frame that is made."""
    layout = FrameLayout(lengths, device=device)
    return Visibility.text_and_frames(layout, torch.full((1,), lengths[0], device=device))


HISTORY = [128, *[240] * 28, 960, 3840, 3840]  # Pyramid Flow, last unit at 768 x 1280
# name: (visibility, B, heads, E)
GPU = {
    "dense 64": (lambda d: dense([1024] * 16, d), 1, 16, 64),
    "dense 72": (lambda d: dense([1024] * 16, d), 1, 16, 72),
    "dense 128": (lambda d: dense([1024] * 16, d), 1, 16, 128),
    "known 4 of 16": (lambda d: identity([1024] * 16, 4, d), 1, 16, 64),
    "causal 16": (lambda d: causal([1024] * 16, d), 1, 16, 64),
    "known 12 of 16": (lambda d: identity([1024] * 16, 12, d), 1, 16, 64),
    "MarDini G joint": (lambda d: identity([4096] * 13, 5, d), 1, 16, 64),
    "MarDini G spatial": (lambda d: own_frame([4096] * 13, d), 1, 16, 64),
    "MarDini P joint": (lambda d: identity([1024] * 13, 5, d), 1, 32, 128),
    "Pyramid last unit": (lambda d: pyramid(HISTORY, d), 2, 30, 64),
    "VDT spatial": (lambda d: own_frame([256] * 16, d), 4, 16, 72),
    "VDT causal": (lambda d: causal([256] * 16, d), 4, 16, 72),
    "identity 9 of 17": (lambda d: identity([256] * 17, 9, d), 4, 16, 72),
}
CPU = {
    "identity 9 of 17, 1024": (lambda d: identity([1024] * 17, 9, d), 1, 1, 64),
    "causal, 1024": (lambda d: causal([1024] * 16, d), 1, 1, 64),
    "identity 9 of 17, 256": (lambda d: identity([256] * 17, 9, d), 1, 4, 64),
    "every other of 17, 256": (lambda d: every_other([256] * 17, d), 1, 4, 64),
    "causal, 256": (lambda d: causal([256] * 16, d), 1, 4, 64),
    "identity 9 of 17, 128": (lambda d: identity([128] * 17, 9, d), 1, 8, 64),
    "every other of 17, 128": (lambda d: every_other([128] * 17, d), 1, 8, 64),
    "causal, 128": (lambda d: causal([128] * 16, d), 1, 8, 64),
    "identity 9 of 17, 64": (lambda d: identity([64] * 17, 9, d), 1, 8, 64),
    "every other of 17, 64": (lambda d: every_other([64] * 17, d), 1, 8, 64),
    "causal, 64": (lambda d: causal([64] * 16, d), 1, 8, 64),
    "MarDini P joint": (lambda d: identity([256] * 13, 5, d), 1, 4, 128),
    "Pyramid last unit": (lambda d: pyramid([n // 4 for n in HISTORY], d), 1, 4, 64),
    "VDT spatial": (lambda d: own_frame([256] * 16, d), 1, 16, 72),
}
# On a CPU the time of these is held against what is visible, forward and with the backward.
PROPORTIONAL = {name for name in CPU if name.startswith(("identity", "causal"))}
QUICK = {"causal": (lambda d: causal([16] * 4, d), 1, 2, 16)}


def bytes_moved(direction: str, B: int, N: int, heads: int, E: int, itemsize: int) -> int:
    """q, k, v and out; backward reads dout as well and writes dq, dk, dv."""
    tensors = {"forward": 4, "backward": 8, "forward and backward": 12}
    return tensors[direction] * B * N * heads * E * itemsize


def flops(direction: str, pairs: float, B: int, heads: int, E: int) -> int:
    """Two products of each visible pair; backward has five, with the scores made anew."""
    products = {"forward": 2, "backward": 5, "forward and backward": 7}
    return round(2 * products[direction] * B * heads * E * pairs)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Forward and backward of every case, of the proportional ones also both together; tables."""
    found = QUICK if quick else GPU if device.type == "cuda" else CPU
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attention = [
        _case(f"{name} {direction}", direction, *case, dtype, device, quick)
        for name, case in found.items()
        for direction in BINDS
        if direction != "forward and backward" or (found is CPU and name in PROPORTIONAL)
    ]
    return attention if quick else [*attention, tables(device)]


def tables(device: torch.device, frames: int = 16) -> Case:
    """What a Visibility costs: the intervals of a random table of frames, both directions."""
    offsets = FrameLayout([256] * frames, device=device).offsets

    def intervals_by(build):
        return lambda table: lambda: build(table.bool(), offsets, offsets, None, None)

    fields = 2 * (frames + 1) * (intervals.FIELDS + 2 * frames)
    return Case(
        room="masked_attention",
        name="tables",
        shape={"B": 1, "F": frames},
        dtype=torch.bool,
        make_inputs=lambda device: (torch.rand(1, frames, frames, device=device) < 0.5,),
        rivals={
            "fastvid": intervals_by(intervals.build), "eager": intervals_by(intervals.reference),
        },
        oracle=intervals_by(lambda *given: [t.double() for t in intervals.reference(*given)]),
        nbytes=frames * frames + 2 * offsets.nbytes + 4 * fields,
    )  # fmt: skip


def both_of(function: Callable[..., Tensor]) -> Callable[..., Callable[[], Any]]:
    """Time `function(*inputs)` and its gradients; the last input is that of its result."""

    def bind(*inputs):
        *leaves, dout = (tensor.detach() for tensor in inputs)
        for leaf in leaves:
            leaf.requires_grad_()
        return lambda: torch.autograd.grad(function(*leaves), leaves, dout)

    return bind


BINDS = {"forward": forward_of, "backward": backward_of, "forward and backward": both_of}


def _case(name, direction, make_visibility, B, heads, E, dtype, device, quick) -> Case:
    visibility = make_visibility(device)
    N = visibility.queries.tokens
    forward = direction == "forward"
    bind = BINDS[direction]
    rivals = {"fastvid": lambda q, k, v: masked_attention(q, k, v, visibility)}
    rivals["eager"] = with_dense_mask(visibility, N)
    rivals["sliced"] = sliced(visibility)
    rivals |= by_backend("dense", sdpa) if device.type == "cuda" else {"dense": sdpa}
    if not quick and (forward or device.type == "cuda"):  # FlexAttention has no backward on a CPU
        rivals["flex"] = flex(visibility, N)
    if forward and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        rivals["fastvid, tensor descriptors"] = by_descriptors(visibility)
    plans = vendor.grouped(visibility, N, N)
    if forward and device.type == "cuda" and plans is not None:
        rivals["fastvid, SDPA by group"] = lambda q, k, v: vendor.attend(q, k, v, plans, E**-0.5)
    here, missing = packages.split_by_presence(device, from_packages(visibility))
    rivals |= here

    def make_inputs(device):
        q, k, v = torch.randn(B, N, 3, heads, E, device=device).to(dtype).unbind(2)
        return (q, k, v) if forward else (q, k, v, torch.randn_like(q))

    pairs = visibility.visible_share() * N * N
    return Case(
        room="masked_attention",
        name=name,
        shape={"B": B, "N": N, "heads": heads, "E": E},
        dtype=dtype,
        make_inputs=make_inputs,
        rivals={rival: bind(function) for rival, function in rivals.items()},
        oracle=lambda *inputs: lambda: exact(visibility, *inputs),
        nbytes=bytes_moved(direction, B, N, heads, E, dtype.itemsize),
        flops=flops(direction, pairs, B, heads, E),
        missing=missing,
    )


def by_descriptors(visibility: Visibility) -> Callable[..., Tensor]:
    """The forward kernel that no launch table chooses before it is measured."""
    from fastvid.kernels.masked_attention.kernel import launch_forward

    tables = visibility.rows, visibility.row_spans
    return lambda q, k, v: launch_forward(q, k, v, *tables, q.shape[-1] ** -0.5, True)[0]


def with_dense_mask(visibility: Visibility, tokens: int) -> Callable[..., Tensor]:
    """SDPA with the boolean of every pair, made beforehand."""
    pairs = functools.cache(lambda: visibility.dense(tokens, tokens)[:, None])

    def attend(q, k, v):
        out = F.scaled_dot_product_attention(*heads_first(q, k, v), attn_mask=pairs())
        return out.transpose(1, 2)

    return attend


def sliced(visibility: Visibility, one: packages.Attention = sdpa) -> Callable[..., Tensor]:
    """As a user writes it: frame after frame, on the keys it sees; known frames copy their v."""
    ends = visibility.queries.offsets[0].tolist()
    frames = list(itertools.pairwise(ends))
    table = visibility.table[0].tolist()
    alone = [False] * len(frames)
    if visibility.self_only is not None:
        alone = visibility.self_only[0].tolist()

    def attend(q, k, v):
        parts = []
        for (start, end), row, is_alone in zip(frames, table, alone, strict=True):
            if is_alone:
                parts.append(v[:, start:end])
                continue
            if all(row):
                keys, values = k, v
            else:
                seen = [slice(a, b) for (a, b), visible in zip(frames, row, strict=True) if visible]
                if len(seen) == seen_span(row):  # neighbours: a view does
                    seen = [slice(seen[0].start, seen[-1].stop)]
                keys, values = (
                    t[:, seen[0]] if len(seen) == 1 else torch.cat([t[:, s] for s in seen], 1)
                    for t in (k, v)
                )
            parts.append(one(q[:, start:end], keys, values))
        return torch.cat(parts, 1)

    return attend


def seen_span(row: list[bool]) -> int:
    """Frames from the first visible one to the last."""
    return len(row) - row.index(True) - row[::-1].index(True)


def from_packages(visibility: Visibility) -> dict[str, Callable[[], packages.Attention]]:
    """One call where every frame sees itself alone, else one call per frame, as `sliced`."""
    lengths = visibility.queries.lengths[0].tolist()
    alone = visibility.table[0].equal(
        torch.eye(len(lengths), device=visibility.table.device).bool()
    )
    if alone and visibility.self_only is None:
        return {
            "flash-attn": lambda: packages.flash_attn_by_segment(lengths),
            "xformers": lambda: packages.xformers_by_segment(lengths),
        }
    return {
        "flash-attn": lambda: sliced(visibility, packages.flash_attn()),
        "xformers": lambda: sliced(visibility, packages.xformers()),
    }


def flex(visibility: Visibility, tokens: int) -> Callable[..., Tensor]:
    """FlexAttention, compiled; its block mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = visibility.queries.device
    frame = visibility.queries.frame_of_token(tokens)[0]
    table = visibility._open_table()[0]
    alone = visibility.self_only
    alone = torch.zeros_like(table[0]) if alone is None else alone[0]

    def visible(b, h, query, key):
        return table[frame[query], frame[key]] | (alone[frame[query]] & (query == key))

    @functools.cache
    def block_mask():
        return create_block_mask(visible, None, None, tokens, tokens, device=device.type)

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q, k, v):
        return compiled(*heads_first(q, k, v), block_mask=block_mask()).transpose(1, 2)

    return attend


def exact(visibility: Visibility, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The reference over all heads, some query rows at a time: its memory stays O(tokens)."""
    (q, k, v), dout = inputs[:3], inputs[3:]
    _, N, heads, E = q.shape
    frame = visibility.queries.frame_of_token(N)[0]
    table = visibility._open_table()[0]
    at = torch.arange(N, device=q.device)
    alone = None if visibility.self_only is None else visibility.self_only[0]
    results = [torch.zeros_like(q) for _ in range(3 if dout else 1)]
    for start in range(0, N, CHUNK):
        rows = slice(start, start + CHUNK)
        pairs = table[frame[rows]][:, frame]
        if alone is not None:
            pairs = pairs | (alone[frame[rows]][:, None] & (at[rows, None] == at))
        for h in range(heads):
            head = slice(h, h + 1)
            some = q[:, rows, head], k[:, :, head], v[:, :, head], pairs[None], E**-0.5
            if not dout:
                results[0][:, rows, head] = reference.forward(*some)[0]
                continue
            dq, dk, dv = reference.backward(dout[0][:, rows, head], *some)
            results[0][:, rows, head] = dq
            results[1][:, :, head] += dk
            results[2][:, :, head] += dv
    return tuple(results) if dout else results[0]
