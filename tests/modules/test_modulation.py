"""The gated residual: the formula, and whose memory the sum is in."""

import pytest
import torch

from fastvid.modules.modulation import gated_residual


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_the_sum_is_in_x_only_where_asked(rand, gated, in_place):
    x, branch, gate = rand(2, 3, 5, 8), rand(2, 3, 5, 8), rand(2, 8)
    before, exact = x.clone(), x + branch * (gate[:, None, None] if gated else 1)
    with torch.no_grad():
        y = gated_residual(x, branch, gate if gated else None, in_place=in_place)
    torch.testing.assert_close(y, exact)
    assert (y.data_ptr() == x.data_ptr()) is in_place
    assert torch.equal(x, y if in_place else before)
