"""The feed-forward half of a transformer block."""

from torch import Tensor, nn

from fastvid.modules.linear import Cheap, linear, linear_gelu


class MLP(nn.Module):
    """Linear, GELU (tanh form), linear over the last axis."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor | Cheap) -> Tensor:
        hidden = linear_gelu(x, self.fc1.weight, self.fc1.bias)
        return linear(hidden, self.fc2.weight, self.fc2.bias)
