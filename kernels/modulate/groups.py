"""What the room's kernels have in common: groups of tokens, their chunks, the sums over chunks.

The tokens that share a row of modulation are a group. Group `g` of sample `b` owns the tokens
`starts[b, g] ... starts[b, g + 1]`, or without `starts` the g-th of equal parts. A program owns a
chunk of one group. Backward it sums over the chunk, and the partial rows are added up here, in a
fixed order.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._shared.variants import Variant

# Backward: enough programs to fill a large GPU, but no chunk so short that its partial sums
# (two fp32 rows) weigh against the rows it reads.
PROGRAMS, SHORTEST_CHUNK = 1024, 8


@triton.jit
def chunk_of(program, starts_ptr, starts_b, groups, N, chunks):
    """Sample and group of a program, and the first and last of its tokens in the sample."""
    b, g = program // chunks // groups, program // chunks % groups
    if starts_ptr is None:
        begin = g * (N // groups)
        end = begin + N // groups
    else:
        begin = tl.load(starts_ptr + b * starts_b + g).to(tl.int64)
        end = tl.load(starts_ptr + b * starts_b + g + 1).to(tl.int64)
    size = tl.cdiv(end - begin, chunks)
    first = begin + program % chunks * size
    return b, g, first, tl.minimum(first + size, end)


@triton.jit
def store_modulated(
    x, shift, scale, y_ptr, mean_ptr, rstd_ptr, at, live_n, live_d, eps,
    D: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """Normalise x [BLOCK_N, BLOCK_D], float32 and 0 past D, and store the rows `at`."""
    if not RMS:
        mean = tl.sum(x, axis=1) / D
        tl.store(mean_ptr + at, mean, mask=live_n)
        x = tl.where(live_d[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(rstd_ptr + at, rstd, mask=live_n)
    y = x * rstd[:, None] * (1 + scale.to(tl.float32)) + shift.to(tl.float32)
    to = at[:, None] * D + tl.arange(0, x.shape[1])[None, :]
    mask = live_n[:, None] & live_d[None, :]
    tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), mask=mask)


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


def chunks_of(groups: int, rows: int) -> int:
    """Chunks per group backward; `groups` of all samples, tokens per group."""
    return min(triton.cdiv(PROGRAMS, groups), triton.cdiv(rows, SHORTEST_CHUNK))


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
    """Groups per sample, tokens per group (of unequal groups on average), BLOCK_D."""
    groups = modulation.shape[1] if modulation.dim() == 3 else 1
    return groups, triton.cdiv(N, groups), block_d_of(D)


def starts_of(starts: Tensor | None) -> tuple[Tensor | None, int]:
    """What `chunk_of` is handed: starts (B|1, groups + 1) int32 and their step."""
    return (None, 0) if starts is None else (starts.contiguous(), strides(starts)[0])


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
