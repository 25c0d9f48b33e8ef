"""The feed-forward half of a transformer block."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.modules.linear import Deferred, apply_linear, apply_linear_gelu


class MLP(nn.Module):
    """Linear, GELU (tanh form) or another `activation`, linear over the last axis."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.activation = activation

    def forward(self, x: Tensor | Deferred) -> Tensor:
        if self.activation is None:
            return apply_linear(self.fc2, apply_linear_gelu(self.fc1, x))
        return apply_linear(self.fc2, self.activation(apply_linear(self.fc1, x)))


class GatedMLP(nn.Module):
    """SwiGLU: the product of two linear layers, SiLU on the first, then linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)  # rows ordered gate, value
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = apply_linear(self.fc1, x).chunk(2, -1)
        return apply_linear(self.fc2, F.silu(gate) * value)
