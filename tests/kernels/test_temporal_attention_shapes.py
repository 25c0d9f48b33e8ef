"""`temporal_attention` over whatever Hypothesis draws."""

import functools

import pytest
import torch

from fastvid.functional import temporal_attention
from fastvid.kernels.temporal_attention import reference
from tests.kernels.temporal_attention_cases import LAYOUTS, RULES, gradients

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

FIXTURES = hypothesis.HealthCheck.function_scoped_fixture  # cpu_path holds through all examples


@hypothesis.settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[FIXTURES]
)
@hypothesis.given(
    B=st.integers(1, 3),
    T=st.integers(1, 20),
    N=st.integers(1, 5),
    heads=st.integers(1, 3),
    E=st.sampled_from([8, 16, 24, 40, 72, 96]),
    rule=st.sampled_from(sorted(RULES)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape_stride_and_dtype(
    within_budget, cpu_path, B, T, N, heads, E, rule, layout, dtype
):
    torch.manual_seed(B * T * N)
    q, k, v = LAYOUTS[layout](*torch.randn(3, B, T, N, heads, E).to(dtype))
    dout = torch.randn(B, T, N, heads, E).to(dtype)
    rule = exact_rule = RULES[rule](B, T, E)
    if "rotary" in rule:
        exact_rule = {**rule, "rotary": tuple(table.double() for table in rule["rotary"])}
    exact = [tensor.double() for tensor in (q, k, v)]
    wanted = (
        reference.temporal_attention(*exact, **exact_rule),
        *reference.temporal_attention_backward(dout.double(), *exact, **exact_rule),
    )
    found, plain = (
        (f(q, k, v, **rule), *gradients(functools.partial(f, **rule), dout, q, k, v))
        for f in (temporal_attention, reference.temporal_attention)
    )
    for name, *triple in zip(("out", "dq", "dk", "dv"), found, plain, wanted, strict=True):
        assert triple[0].dtype == dtype
        within_budget(*triple, name)
