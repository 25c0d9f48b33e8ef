"""PyTorch's fused attention, on (B, tokens, heads, E), by each of its backends."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {  # of a GPU; the fourth, plain products, would need a number for every pair
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "effic.": SDPBackend.EFFICIENT_ATTENTION,
}


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """(B, heads, tokens, E), views."""
    return [tensor.transpose(1, 2) for tensor in tensors]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query sees every key."""
    return F.scaled_dot_product_attention(*heads_first(q, k, v)).transpose(1, 2)


def by_backend(prefix: str, attend: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """`{"PREFIX flash": ...}`: a function that calls SDPA, under each backend."""

    def under(backend: SDPBackend) -> Callable[..., Tensor]:
        def attend_under(*inputs: Tensor, **rule: Any) -> Tensor:
            with sdpa_kernel(backend):
                return attend(*inputs, **rule)

        return attend_under

    return {f"{prefix} {name}": under(backend) for name, backend in BACKENDS.items()}
