"""`qk_norm_rope` over whatever Hypothesis draws."""

import functools

import pytest
import torch

from fastvid.functional import qk_norm_rope
from fastvid.kernels.qk_norm_rope import reference
from tests.kernels.qk_norm_rope_cases import (
    LAYOUTS,
    NORMS,
    TURNS,
    doubled,
    gradients,
    make_affine,
    make_rotary,
    options,
)

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")


@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],  # it holds no state
)
@hypothesis.given(
    B=st.integers(1, 3),
    N=st.integers(1, 9),
    heads=st.integers(1, 4),
    E=st.sampled_from([24, 40, 64, 72]),
    norm=st.sampled_from(sorted(NORMS)),
    turn=st.sampled_from(sorted(TURNS)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    affine_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape_stride_and_dtype(
    cpu_path, B, N, heads, E, norm, turn, layout, dtype, affine_dtype
):
    torch.manual_seed(B * N * heads)
    q, k = LAYOUTS[layout](*torch.randn(2, B, N, heads, E).to(dtype))
    douts = list(torch.randn(2, B, N, heads, E).to(dtype))
    affine = make_affine(lambda *s: torch.randn(s).to(affine_dtype), norm, heads, E)
    rotary = make_rotary(turn, B, N)
    f = functools.partial(qk_norm_rope, **options(norm, rotary))
    found = *f(q, k, **affine), *gradients(f, douts, q, k, affine)
    exact = functools.partial(reference.qk_norm_rope, **options(norm, doubled(rotary)))
    wide = {name: row.double() for name, row in affine.items()}
    q, k = q.double(), k.double()
    wanted = (
        *exact(q, k, **wide),
        *gradients(exact, [d.double() for d in douts], q, k, wide),
    )
    for a, b in zip(found, wanted, strict=True):
        room = torch.finfo(a.dtype).eps + 1e-5  # one rounding, and float32 sums
        assert (a.double() - b).abs().max() <= room * (1 + b.abs().max())
    assert [t.dtype for t in found] == [dtype] * 4 + [affine_dtype] * len(affine)
