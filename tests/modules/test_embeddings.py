"""Position and timestep tables."""

import numpy as np
import torch

from fastvid.modules.embeddings import (
    resize_grid,
    resize_line,
    sincos_grid,
    sincos_table,
    timestep_sinusoid,
)


def test_line_is_sines_then_cosines():
    table = sincos_table(5, 8)
    angles = np.arange(5)[:, None] * 10000.0 ** -(np.arange(4) / 4)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    np.testing.assert_allclose(table.numpy(), expected, atol=1e-7)


def test_positions_may_be_fractions():
    table = sincos_table(torch.tensor([0.0, 0.5, 3.0]), 8)
    assert torch.equal(table[[0, 2]], sincos_table(4, 8)[[0, 3]])
    angles = 0.5 * 10000.0 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(table[1].numpy(), [*np.sin(angles), *np.cos(angles)], atol=1e-7)


def test_grid_has_the_column_before_the_row():
    table = sincos_grid(3, 5, 16)
    assert table.shape == (3, 5, 16)
    assert torch.equal(table[2, :, :8], sincos_table(5, 8))
    assert torch.equal(table[:, 4, 8:], sincos_table(3, 8))


def test_timesteps_are_cosines_then_sines_even_beside_bfloat16():
    sinusoid = timestep_sinusoid(torch.tensor([0, 999]))
    assert sinusoid.shape == (2, 256)
    assert sinusoid.dtype == torch.float32
    assert torch.equal(sinusoid[0], torch.tensor([1.0] * 128 + [0.0] * 128))
    angles = 999 * np.exp(-np.log(10000) * np.arange(128) / 128)
    np.testing.assert_allclose(sinusoid[1, 128:].numpy(), np.sin(angles), atol=1e-4)


def test_resizing_to_the_same_size_changes_nothing(rand):
    grid, line = rand(3, 4, 6), rand(5, 6)
    assert torch.allclose(resize_grid(grid, 3, 4), grid, atol=1e-6)
    assert torch.allclose(resize_line(line, 5), line, atol=1e-6)
    assert resize_grid(grid, 5, 2).shape == (5, 2, 6)
    assert torch.allclose(resize_line(line, 9)[::2], line, atol=1e-6)
