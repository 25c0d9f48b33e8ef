"""`masked_attention` over whatever Hypothesis draws."""

import pytest
import torch

from fastvid.functional import FrameLayout, Visibility, masked_attention
from fastvid.kernels.masked_attention import grouped
from tests.kernels.masked_attention_cases import launched, oracle, ours, random_visibility

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")


@hypothesis.settings(max_examples=120, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    frames=st.integers(0, 6),
    longest=st.sampled_from((2, 9)),
    threshold=st.sampled_from((0, 8, 768)),
    most=st.sampled_from((3, 1024)),
    heads=st.integers(1, 3),
    E=st.sampled_from((16, 24, 72)),
)
def test_any_layout_and_table_in_float64(seed, frames, longest, threshold, most, heads, E):
    torch.manual_seed(seed)
    visibility = random_visibility(seed, 2, frames, longest)
    N = visibility.queries.tokens
    q, k, v = torch.randn(2, N, 3, heads, E, dtype=torch.float64).unbind(2)
    dout = torch.randn(2, N, heads, E, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:  # so that few tokens reach every branch
        patch.setattr(grouped, "FULL_RATE_ROWS", threshold)
        patch.setattr(grouped, "MOST_TOKENS", most)
        found = ours(q, k, v, visibility, dout, 0.4)
    torch.testing.assert_close(found, oracle(q, k, v, visibility, dout, 0.4), rtol=1e-9, atol=1e-9)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 10**6), order=st.permutations(range(4)))
def test_permuting_frames_permutes_the_output(seed, order):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 4, 3, 2, 16, dtype=torch.float64, generator=generator)
    table = torch.rand(4, 4, generator=generator) < 0.5
    alone = torch.rand(4, generator=generator) < 0.3
    layout, order = FrameLayout([3] * 4), list(order)

    def run(q, k, v, table, alone):
        flat = (tensor.reshape(1, 12, 2, 16) for tensor in (q, k, v))
        out = masked_attention(*flat, Visibility(table, layout, self_only=alone))
        return out.reshape(1, 4, 3, 2, 16)

    moved = run(*(t[:, order] for t in (q, k, v)), table[order][:, order], alone[order])
    torch.testing.assert_close(moved, run(q, k, v, table, alone)[:, order])


@pytest.mark.usefixtures("interpreter")
@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 10**6))
def test_kernels_serve_any_layout_and_table(seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    visibility = random_visibility(seed, device=device)
    torch.manual_seed(seed)
    q, k, v, dout = torch.randn(4, 2, visibility.queries.tokens, 1, 16, device=device)
    found, wanted = (f(q, k, v, visibility, dout, 0.25) for f in (launched, oracle))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
