"""Triton kernels that store what `philox_kernel.py` makes."""

import torch
import triton
import triton.language as tl

from fastvid.kernels._shared.philox_kernel import box_muller, normals

N = 64


@triton.jit
def _draw(seed_ptr, words_ptr, normals_ptr, first, stream, N: tl.constexpr):
    at = tl.arange(0, N)
    index = first + at.to(tl.int64)
    seed = tl.load(seed_ptr)
    low = index.to(tl.uint32)
    third = low * 0 + stream.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, (index >> 32).to(tl.uint32), third, low * 0)
    n0, n1, n2, n3 = normals(seed, index, stream)
    tl.store(words_ptr + 4 * at, w0.to(tl.int64))
    tl.store(words_ptr + 4 * at + 1, w1.to(tl.int64))
    tl.store(words_ptr + 4 * at + 2, w2.to(tl.int64))
    tl.store(words_ptr + 4 * at + 3, w3.to(tl.int64))
    tl.store(normals_ptr + 4 * at, n0)
    tl.store(normals_ptr + 4 * at + 1, n1)
    tl.store(normals_ptr + 4 * at + 2, n2)
    tl.store(normals_ptr + 4 * at + 3, n3)


@triton.jit
def _transform(first_ptr, second_ptr, out_ptr, count, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    live = at < count
    first = tl.load(first_ptr + at, mask=live, other=0).to(tl.uint32)
    second = tl.load(second_ptr + at, mask=live, other=0).to(tl.uint32)
    x, y = box_muller(first, second)
    tl.store(out_ptr + at, x, mask=live)
    tl.store(out_ptr + count + at, y, mask=live)


def draw(seed, first, stream, device):
    """Words (N, 4) int64 and normals (N, 4) of the counters from `first` on."""
    seed = torch.tensor([seed], device=device)
    words = torch.empty(N, 4, dtype=torch.int64, device=device)
    noise = torch.empty(N, 4, device=device)
    _draw[(1,)](seed, words, noise, first, stream, N=N)
    return words, noise


def transform(first, second):
    """Box-Muller of two int64 vectors, (2, count) float32."""
    out = torch.empty(2, first.numel(), device=first.device)
    _transform[(triton.cdiv(first.numel(), 2**14),)](first, second, out, first.numel(), N=2**14)
    return out
