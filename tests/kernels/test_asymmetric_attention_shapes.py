"""`asymmetric_attention` over whatever Hypothesis draws."""

import functools

import pytest
import torch

from fastvid.functional import asymmetric_attention
from tests.kernels.asymmetric_attention_cases import LAYOUTS, SHARING, draw, gradients, oracle

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    B=st.integers(1, 3),
    T=st.integers(1, 5),
    Nq=st.integers(1, 9),
    Nk=st.integers(1, 70),
    heads=st.integers(1, 3),
    E=st.sampled_from([16, 24, 64, 72, 96]),
    scope=st.sampled_from(["frame", "clip"]),
    sharing=st.sampled_from(sorted(SHARING)),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=4, max_size=4),
    known=st.one_of(st.none(), st.integers(0, 2**15 - 1)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape_stride_and_dtype(
    B, T, Nq, Nk, heads, E, scope, sharing, layouts, known, dtype
):  # fmt: skip
    generator = torch.Generator().manual_seed(B * T * Nq)

    def rand(*shape, dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = draw(rand, B, T, Nq, Nk, heads, E, sharing, dtype)
    q, k, v, dout = (LAYOUTS[name](x) for name, x in zip(layouts, inputs, strict=True))
    if known is not None:
        known = torch.tensor([known >> i & 1 for i in range(B * T)]).bool().view(B, T)
    f = functools.partial(asymmetric_attention, scope=scope, known=known)
    found = f(q, k, v), *gradients(f, dout, q, k, v)
    room = 8 * torch.finfo(dtype).eps + 1e-5  # rounded operands of the products, and the sums
    for a, b in zip(found, oracle(q, k, v, dout, scope=scope, known=known), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= room * (1 + b.abs().max())
