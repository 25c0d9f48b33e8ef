"""Noise by number: Philox 4x32-10 and Box-Muller, the definition that every kernel follows.

The noise of a sample is a function of its seed (the key), the stream (which draw: stage, step) and
the place of the number in the sample, so it depends neither on tiles nor on the device nor on the
rest of the batch. Counter c gives the numbers 4c to 4c + 3. Bits are the same everywhere; here the
normals are made in float64, the float32 of `philox_kernel.py` and `csrc/_shared/philox.h` stay
within 1e-6.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import math

import torch
from torch import Tensor

_WORD = 2**32 - 1


def philox(counter: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """Four random words of every counter.

    Args:
        counter: four int64 tensors that hold 32 bits each and broadcast, lowest word first.
        seed: int64, all 64 bits of it; broadcasts with them.
    Returns:
        four int64 tensors in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps; all its 64 bits are right
        c0, c2 = (b >> 32 & _WORD) ^ c1 ^ k0, (a >> 32 & _WORD) ^ c3 ^ k1
        c1, c3 = b & _WORD, a & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3


def box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals, float32, from two words of 32 bits."""
    uniform = (first.to(torch.float32) + 1) * 2.0**-32  # in (0, 1], rounded as in every twin
    radius = (-2 * uniform.double().log()).sqrt()
    angle = second.double() * (2 * math.pi / 2**32)
    return (radius * angle.cos()).float(), (radius * angle.sin()).float()


def normal(seed: Tensor, count: int, stream: int) -> Tensor:
    """The first `count` numbers of each sample's noise.

    Args:
        seed: (B,) int64.
        stream: in [0, 2^32).
    Returns:
        (B, count) float32.
    """
    index = torch.arange(-(-count // 4), device=seed.device)
    counter = index & _WORD, index >> 32, torch.full_like(index, stream), torch.zeros_like(index)
    words = philox(counter, seed.unsqueeze(1))
    numbers = [*box_muller(*words[:2]), *box_muller(*words[2:])]
    return torch.stack(numbers, dim=2).flatten(1)[:, :count]


def sample_seeds(seed: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """One seed per sample: (B,) int64 on `device`, contiguous as the kernels read them.

    Args:
        seed: an int, or int64 of shape () or (1,): sample b draws with `seed + b`; or (B,) int64:
            each its own. A tensor is read on its device when the noise is drawn, so a captured
            graph gets fresh noise where the tensor is advanced.
    Raises:
        TypeError, ValueError: anything else.
    """
    if not isinstance(seed, Tensor):
        if isinstance(seed, bool) or not isinstance(seed, int | torch.SymInt):
            raise TypeError(f"seed must be an int or an int64 Tensor, got {type(seed).__name__}")
        if not torch.compiler.is_compiling() and not -(2**63) <= seed < 2**63 - batch:
            raise ValueError(f"seed must fit in 64 bits, with a sign, got {seed}")
        return torch.arange(seed, seed + batch, device=device)
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be int64, got {seed.dtype}")
    if seed.device != device:
        raise ValueError(f"seed must be on {device}, got {seed.device}")
    if seed.dim() == 1 and seed.shape[0] == batch:
        return seed.contiguous()
    if seed.dim() > 1 or seed.numel() != 1:
        raise ValueError(f"seed must be (), (1,) or ({batch},), got {tuple(seed.shape)}")
    return seed + torch.arange(batch, device=device)


def expect_stream(stream: int) -> None:
    """Raise TypeError or ValueError unless `stream` is an int that fits in the counter's word."""
    if isinstance(stream, bool) or not isinstance(stream, int | torch.SymInt):
        raise TypeError(f"stream must be an int, got {type(stream).__name__}")
    if not 0 <= stream <= _WORD:
        raise ValueError(f"stream must be in [0, 2**32), got {stream}")
