"""The Triton side of `planes.py`: a program takes a piece of one (H, W) plane.

Its frame and sample are scalars, so what belongs to them is read once, and no number needs a
division to find its place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .planes import planes, steps

NONE, FRAMES, CELLS = 0, 1, 2  # how much `known` says


@triton.jit
def place(C, T, blocks):
    """b, c, t and piece of this program, as int64."""
    program = tl.program_id(0).to(tl.int64)
    plane = program // blocks
    return plane // (C * T), plane // T % C, plane % T, program % blocks


@triton.jit
def unknown_numbers(known_ptr, known_b, known_t, b, t, p, live, KNOWN: tl.constexpr):
    """Which numbers of a piece are unknown; all where KNOWN is 0, all or none where it is 1."""
    if KNOWN == 2:
        given = tl.load(known_ptr + b * known_b + t * known_t + p, mask=live, other=1)
        return live & (given == 0)
    if KNOWN == 1:
        return live & (tl.load(known_ptr + b * known_b + t * known_t) == 0)
    return live


def known_arguments(known: Tensor | None, like: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
    """A tensor to point at, its steps along batch and frames, and what it knows."""
    if known is None:
        return like, (0, 0), NONE
    cells = known.dim() == 4
    known = (planes(known) if cells else known).view(torch.uint8)
    return known, steps(known, 2), CELLS if cells else FRAMES
