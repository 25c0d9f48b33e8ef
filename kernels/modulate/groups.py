"""What the room's kernels have in common: groups of tokens, their chunks, the sums over chunks.

The tokens that share a row of modulation are a group: group `g` of sample `b` owns the tokens
`g * rows ... (g + 1) * rows`. Backward a program sums over a chunk of one group, and the partial
rows are added up here, in a fixed order.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._shared.variants import Variant

# Backward: enough programs to fill a large GPU, but no chunk so short that its partial sums
# (two fp32 rows) weigh against the rows it reads.
PROGRAMS, SHORTEST_CHUNK = 1024, 8


@triton.jit(do_not_specialize=["terms", "chunks", "groups"])
def _sum_partials(
    shift_parts_ptr, scale_parts_ptr, dshift_ptr, dscale_ptr, terms, chunks, groups,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add `terms` rows per group: its chunks, and those of every sample that shares it."""
    group = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live_d = d < D
    dshift = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dscale = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, terms, BLOCK_R):
        term = start + tl.arange(0, BLOCK_R)
        row = (term // chunks * groups + group) * chunks + term % chunks
        at = row[:, None] * D + d[None, :]  # [BLOCK_R, BLOCK_D]
        live = (term < terms)[:, None] & live_d[None, :]
        dshift += tl.load(shift_parts_ptr + at, mask=live, other=0.0)
        dscale += tl.load(scale_parts_ptr + at, mask=live, other=0.0)
    at = group * D + d
    dshift, dscale = tl.sum(dshift, axis=0), tl.sum(dscale, axis=0)
    tl.store(dshift_ptr + at, dshift.to(dshift_ptr.dtype.element_ty), mask=live_d)
    tl.store(dscale_ptr + at, dscale.to(dscale_ptr.dtype.element_ty), mask=live_d)


def chunks_of(groups: int, rows: int) -> tuple[int, int]:
    """Tokens per chunk of a group, and chunks per group."""
    wanted = min(triton.cdiv(PROGRAMS, groups), triton.cdiv(rows, SHORTEST_CHUNK))
    chunk = triton.cdiv(rows, wanted)
    return chunk, triton.cdiv(rows, chunk)


def sum_chunks(
    shift_parts: Tensor, scale_parts: Tensor, dshift: Tensor, dscale: Tensor,
    B: int, groups: int, chunks: int,
) -> None:  # fmt: skip
    """Add the partial sums of the chunks, and of the samples where they share a modulation."""
    samples, D = B // len(dshift), dshift.shape[-1]
    _sum_partials[(B * groups // samples, triton.cdiv(D, 32))](
        shift_parts, scale_parts, dshift, dscale, samples * chunks, chunks, groups,
        D=D, BLOCK_R=32, BLOCK_D=32, num_warps=4,
    )  # fmt: skip


def split(N: int, D: int, modulation: Tensor) -> tuple[int, int, int]:
    """Groups per sample, tokens per group, BLOCK_D."""
    groups = modulation.shape[1] if modulation.dim() == 3 else 1
    return groups, N // groups, block_d_of(D)


def block_d_of(D: int) -> int:
    return max(512, triton.next_power_of_2(D))


def strides(tensor: Tensor) -> tuple[int, int]:
    """Steps along the batch and along tokens or groups; 0 where the size is 1.

    The stride of a size-1 axis is arbitrary, and Triton would compile anew for a 1.
    """
    middle = tensor.stride(1) if tensor.dim() == 3 and tensor.shape[1] > 1 else 0
    return tensor.stride(0) if tensor.shape[0] > 1 else 0, middle


SUM_PARTIALS = Variant(
    "sum_partials_1152",
    _sum_partials,
    dict.fromkeys(("shift_parts_ptr", "scale_parts_ptr"), "*fp32:16")
    | dict.fromkeys(("dshift_ptr", "dscale_ptr"), "*bf16:16")
    | dict.fromkeys(("terms", "chunks", "groups"), "i32"),
    {"D": 1152, "BLOCK_R": 32, "BLOCK_D": 32},
    num_warps=4,
)
