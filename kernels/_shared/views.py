"""Views that the kernels of any device want."""

from torch import Tensor


def merges(x: Tensor, dim: int) -> bool:
    """Whether the axes `dim` and `dim + 1` are one axis without a copy."""
    outer, inner = x.shape[dim : dim + 2]
    return 1 in (outer, inner) or x.stride(dim) == inner * x.stride(dim + 1)


def rows_together(x: Tensor) -> Tensor:
    """The tensor, copied if its last stride is not 1."""
    return x if x.stride(-1) == 1 else x.contiguous()
