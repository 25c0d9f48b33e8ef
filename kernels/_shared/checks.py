"""Checks of a caller's tensors. A message names the argument, its contract and what came."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def expect_shape(
    name: str, tensor: Tensor, layout: str, sizes: dict[str, int] | None = None
) -> dict[str, int]:
    """Check the shape of `tensor` against `layout` and return its sizes by letter.

    Args:
        name: the argument as its caller spells it.
        layout: one word per axis: a letter, a number, or `B|1` for a size that may broadcast: 1,
            or B where `sizes` has settled it (else any size, which becomes B).
        sizes: sizes that are settled already; a letter found there must agree.
    Returns:
        `sizes` and the letters that `layout` adds.
    Raises:
        TypeError: not a tensor.
        ValueError: `scale must be (B, D), B=2 D=8, got (2, 9)`.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    found = dict(sizes) if sizes else {}
    words = layout.split()
    agrees = len(words) == tensor.dim()
    if agrees:
        for word, size in zip(words, tensor.shape, strict=True):
            if word in found:
                wanted = found[word]
            elif word.isalpha():
                wanted = found[word] = size
            elif word.isdecimal():
                wanted = int(word)
            else:
                wanted = 1 if size == 1 else found.setdefault(word.removesuffix("|1"), size)
            agrees = agrees and size == wanted
    if not agrees:
        settled = "".join(f" {k}={v}" for k, v in (sizes or {}).items() if k in layout)
        raise ValueError(
            f"{name} must be ({', '.join(words)}),{settled}{',' if settled else ''}"
            f" got {tuple(tensor.shape)}"
        )
    return found


def expect_float(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is float32, float16, bfloat16 or (on the CPU) float64."""
    if tensor.dtype not in FLOATS or (tensor.dtype == torch.float64 and tensor.is_cuda):
        raise TypeError(
            f"{name} must be float32, float16, bfloat16 or, on the CPU, float64,"
            f" got {tensor.dtype} on {tensor.device}"
        )


def expect_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless the two tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}"
        )
