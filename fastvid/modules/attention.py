"""Self-attention over one axis of video tokens (B, T, N, D), without layout copies.

q, k and v come from three products with the thirds of one weight. Each is then a plain
(B, T, N, heads * E) tensor, of which both axes are views: over tokens the batch is (B, T) and the
heads are the heads; over frames the batch is B and every (token, head) pair is a head of its own.
The attention writes its output in the same layout, so that nothing is ever transposed in memory.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Softmax attention with a packed qkv projection, rows ordered q, k, v, then head."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _attend(self, x: Tensor, split: tuple[int, ...]) -> Tensor:
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).view(split).transpose(1, 2)
            for weight, bias in zip(weights, biases, strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class SpatialAttention(Attention):
    """Every frame attends to itself: T * B sequences of N tokens. (B, T, N, D) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        B, T, N, D = x.shape
        return self._attend(x, (B * T, N, self.heads, D // self.heads))


class TemporalAttention(Attention):
    """Every token attends to itself at all times: B * N sequences of T. (B, T, N, D) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        B, T, N, D = x.shape
        return self._attend(x, (B, T, N * self.heads, D // self.heads))
