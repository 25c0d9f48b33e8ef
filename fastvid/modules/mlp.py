"""The feed-forward half of a transformer block."""

from torch import Tensor, nn

from fastvid.modules.linear import Deferred, apply_linear, apply_linear_gelu


class MLP(nn.Module):
    """Linear, GELU (tanh form), linear over the last axis."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor | Deferred) -> Tensor:
        return apply_linear(self.fc2, apply_linear_gelu(self.fc1, x))
