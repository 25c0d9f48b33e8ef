"""The kernels of `guided_step` in `csrc/`: C++, and CUDA where a launch outweighs the work."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._shared import native
from .._shared.planes import planes

# Numbers of the largest state that CUDA takes from Triton. Not measured yet, so it takes none.
CUDA_NUMBERS = 0


def cpu_serves(*tensors: Tensor | None) -> bool:
    """Whether the C++ kernel knows the dtypes."""
    return native.loaded() and all(
        t is None or t.dtype in (torch.float32, torch.bfloat16) for t in tensors
    )


def cuda_serves(x: Tensor, noise: Tensor | None) -> bool:
    """Whether the CUDA kernel is the faster one, knows the dtypes, and is there."""
    return (
        x.numel() <= CUDA_NUMBERS
        and x.dtype == torch.float32
        and (noise is None or noise.dtype == torch.float32)
        and native.cuda_loaded()
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def call_step(
    op: Callable[..., None],
    x: Tensor,
    prediction: Tensor,
    table: Tensor,
    step: int | Tensor,
    scales: list[float],
    clip: float | None,
    known: Tensor | None,
    clean: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    stream: int,
    out: Tensor,
) -> None:
    """Let `op` write the next state to `out`, contiguous, which may be `x`.

    The C++ op takes the row as an int and the stream of that step, CUDA the tensor and the first.
    """
    if out.numel() == 0:
        return
    first, second = (*scales, 0.0, 0.0)[:2]
    cells = known if known is None or known.dim() == 2 else planes(known)
    clean, noise = (None if t is None else planes(t) for t in (clean, noise))
    op(
        planes(x), planes(prediction), table, step, len(scales) + 1, first, second,
        torch.inf if clip is None else clip, cells, clean, noise, seeds, stream, out,
    )  # fmt: skip
