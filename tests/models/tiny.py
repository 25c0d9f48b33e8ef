"""A VDT small enough for every test, and how its outputs are judged."""

import torch

from fastvid.models.vdt import VDTConfig

TINY = VDTConfig(height=8, width=12, frames=6, dim=32, depth=2, heads=2, drop_labels=False)


def redraw(model, std=0.1):
    """Zero layers hide mistakes: draw every parameter anew."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * std)
    return model


def close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * max(1, b.abs().max().item())
