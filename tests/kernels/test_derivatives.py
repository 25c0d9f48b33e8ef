"""What every room promises of derivatives."""

import pytest
import torch

from fastvid.functional import (
    FrameLayout,
    Visibility,
    masked_attention,
    norm_modulate,
    temporal_attention,
)

OPS = {
    "norm_modulate": ((2, 6, 8), lambda x: norm_modulate(x, x[:, 0], x[:, 0])),
    "masked_attention": (
        (2, 6, 1, 16),
        lambda x: masked_attention(x, x, x, Visibility.causal(FrameLayout([2] * 3))),
    ),
    "temporal_attention": ((2, 3, 2, 1, 16), lambda x: temporal_attention(x, x, x)),
}


@pytest.mark.parametrize("name", OPS)
def test_second_derivative_is_refused(name):
    shape, f = OPS[name]
    x = torch.randn(shape, requires_grad=True)
    (dx,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name} has no second derivative"):
        dx.square().sum().backward()
