"""Rotary positions: tables of cosines and sines, and which rows of them each token takes."""

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._shared.checks import expect_device, expect_float, expect_shape

MOST_AXES = 3


def rotary_table(
    positions: int | Tensor, dim: int, *, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `position * theta ** (-2 j / dim)` for j < dim / 2.

    Args:
        positions: (length,) in cells, fractions allowed; a number means 0, 1, ..., length - 1.
        dim: channels that turn, even.
        theta: the slowest pair turns by about 1 / theta per cell.
    Returns:
        `(cos, sin)`, each (length, dim / 2) float32 on the device of `positions`, computed in
        float64: in float32 an angle at position 16384 is off by 6e-4.
    Raises:
        ValueError: `dim` is not even and positive, or `positions` is not one axis.
    Source: Su et al., arXiv:2104.09864.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"dim must be even and positive, got {dim}")
    if not isinstance(positions, Tensor):
        positions = torch.arange(positions)
    expect_shape("positions", positions, "length")
    pair = torch.arange(dim // 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[:, None] * theta ** (-2 * pair / dim)
    return angles.cos().float(), angles.sin().float()


class Rotary(NamedTuple):
    """Where tokens stand on one to three axes; make it with `Rotary.of`. A pytree of its fields."""

    cos: Tensor  # (length, sum of dims / 2): the tables of the axes side by side
    sin: Tensor
    rows: Tensor  # (B or 1, N, axes) int32: of the table of each axis, the row that is a token's
    dims: tuple[int, ...]  # channels that each axis turns
    interleaved: bool = True

    @classmethod
    def of(
        cls, tables: Sequence[tuple[Tensor, Tensor]], rows: Tensor, *, interleaved: bool = True
    ) -> "Rotary":
        """Join one table per axis.

        Args:
            tables: of each of one to three axes `(cos, sin)`, both (length, dim / 2), any float
                dtype, such as `rotary_table` makes. Axis 0 turns the first channels of a head,
                axis 1 those behind them; channels behind the last axis are not turned.
            rows: (B or 1, N, axes) int32, of the tables. Positions that are fractions are
                rows of a table like any other. A row behind the end of its table makes NaN; one
                below 0 or behind the longest is refused on the CPU, a GPU does not check it.
            interleaved: pairs of an axis are its channels (0, 1), (2, 3), ...; else
                (0, dim / 2), (1, dim / 2 + 1), ...
        Raises:
            TypeError: an argument is not a tensor, or its dtype is not the one above.
            ValueError: a shape or device is not the one above, or there are no or too many axes.
        """
        _expect_axes("tables", len(tables))
        length = 0
        for axis, (cos, sin) in enumerate(tables):
            sizes = expect_shape(f"tables[{axis}][0]", cos, "length pairs")
            expect_shape(f"tables[{axis}][1]", sin, "length pairs", sizes)
            length = max(length, sizes["length"])
        cos, sin = (  # behind the end of a shorter table there is no position, so no number
            torch.cat(
                [pad(pair[i], (0, 0, 0, length - len(pair[i])), value=nan) for pair in tables],
                dim=1,
            )
            for i in range(2)
        )
        rotary = cls(cos, sin, rows, tuple(2 * c.shape[1] for c, _ in tables), interleaved)
        expect_rotary(rotary, {})
        return rotary


def expect_rotary(rotary: Rotary, sizes: dict[str, int]) -> None:
    """Check the fields of `rotary` against `sizes` (B, N and E), where they are settled."""
    if not isinstance(rotary, Rotary):
        raise TypeError(f"rotary must be a Rotary, got {type(rotary).__name__}")
    cos, sin, rows, dims, _ = rotary
    _expect_axes("rotary.dims", len(dims))
    expect_shape("rotary.rows", rows, f"B|1 N {len(dims)}", sizes)
    if rows.dtype != torch.int32:
        raise TypeError(f"rotary.rows must be int32, got {rows.dtype}")
    if not all(dim > 0 and dim % 2 == 0 for dim in dims):
        raise ValueError(f"rotary.dims must be even and positive, got {dims}")
    if "E" in sizes and sum(dims) > sizes["E"]:
        raise ValueError(f"rotary.dims must add up to no more than E={sizes['E']}, got {dims}")
    table = expect_shape("rotary.cos", cos, "length pairs", {"pairs": sum(dims) // 2})
    expect_shape("rotary.sin", sin, "length pairs", table)
    for name, tensor in (("rotary.cos", cos), ("rotary.sin", sin)):
        expect_float(name, tensor)
        expect_device(name, tensor, "rotary.rows", rows)


def _expect_axes(name: str, axes: int) -> None:
    if not 1 <= axes <= MOST_AXES:
        raise ValueError(f"{name} must be of 1 to {MOST_AXES} axes, got {axes}")
