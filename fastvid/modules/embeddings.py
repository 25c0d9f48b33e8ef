"""Fixed sinusoidal tables for positions and timesteps, and the timestep network."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos_table(positions: int | Tensor, dim: int) -> Tensor:
    """Positions as [sin(dim/2), cos(dim/2)], frequencies 10000^(-k / (dim/2)).

    Args:
        positions: (length,) in cells, fractions allowed; a number means 0, 1, ..., length - 1.
    Returns:
        (length, dim) float32, rounded once from float64.
    """
    if not isinstance(positions, Tensor):
        positions = torch.arange(positions)
    steps = torch.arange(dim // 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[:, None] * 10000.0 ** -(steps / (dim // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def sincos_grid(height: int, width: int, dim: int) -> Tensor:
    """Two-axis table: the first half of the channels encodes the column, the second the row.

    Returns:
        (height, width, dim) float32.
    """
    column = sincos_table(width, dim // 2).expand(height, -1, -1)
    row = sincos_table(height, dim // 2)[:, None].expand(-1, width, -1)
    return torch.cat([column, row], dim=-1)


def resize_grid(table: Tensor, height: int, width: int) -> Tensor:
    """Resize a position table (H, W, D) to (height, width, D): bicubic, corners not aligned."""
    planes = table.movedim(-1, 0)[None]
    resized = F.interpolate(planes, (height, width), mode="bicubic", align_corners=False)
    return resized[0].movedim(0, -1)


def resize_line(table: Tensor, length: int) -> Tensor:
    """Stretch a position table (T, D) linearly to (length, D); first and last entries stay."""
    rows = table.T[None]
    return F.interpolate(rows, length, mode="linear", align_corners=True)[0].T


def timestep_sinusoid(timestep: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """Timesteps (B,) as [cos(dim/2), sin(dim/2)] in float32, whatever the model computes in."""
    steps = torch.arange(dim // 2, dtype=torch.float32, device=timestep.device)
    angles = timestep.float()[:, None] * torch.exp(-math.log(max_period) / (dim // 2) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Timesteps (B,) to conditions (B, D): sinusoid, linear, SiLU, linear."""

    def __init__(self, dim: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.fc1 = nn.Linear(frequencies, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, timestep: Tensor) -> Tensor:
        sinusoid = timestep_sinusoid(timestep, self.frequencies).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(sinusoid)))
