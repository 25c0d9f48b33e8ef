"""`Visibility` and its interval tables over whatever Hypothesis draws."""

import pytest
import torch
from torch.nn.functional import pad

from fastvid.functional import FrameLayout, Visibility
from fastvid.kernels._shared import intervals

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")


def offsets(lengths):
    return pad(lengths.cumsum(-1, dtype=torch.int32), (1, 0))


@st.composite
def inputs_of_build(draw, most=4):
    """What `intervals.build` takes: ragged frames, empty ones, hidden, lonely and padded ones."""
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    same = draw(st.booleans())
    F = draw(st.integers(0, most))
    G = F if same else draw(st.integers(0, most))
    B = draw(st.integers(1, 2))

    def numbers(low, high, size):
        return torch.randint(low, high, size, generator=generator, dtype=torch.int32)

    def batch():
        return draw(st.sampled_from((1, B)))

    table = torch.rand(batch(), F, G, generator=generator) < draw(st.sampled_from((0.3, 0.8)))
    queries = numbers(0, 4, (batch(), F))
    keys = queries if same else numbers(0, 4, (batch(), G))
    alone = numbers(0, 2, (batch(), F)) == 0 if same and draw(st.booleans()) else None
    valid = numbers(-1, 5, (batch(), G)) if draw(st.booleans()) else None
    return table, offsets(queries), offsets(keys), alone, valid


def pairs_of(frames, spans, own, other):
    """The token pairs that a table of intervals describes, as booleans (B, own, other)."""
    seen = torch.zeros(len(frames), own, other, dtype=torch.bool)
    for b, entries in enumerate(frames.tolist()):
        for j, (start, end, count, alone, valid) in enumerate(entries):
            end, valid = min(end, own), min(valid, own)
            for a, z in spans[b, j, :count].tolist():
                assert not seen[b, start:valid, a:z].any(), "a pair is there twice"
                seen[b, start:valid, a:z] = True
            if alone:
                seen[b, range(start, end), range(start, end)] = True
    return seen


def pairs_by_hand(table, query_offsets, key_offsets, alone, valid):
    B = intervals.common_batch(table, query_offsets, key_offsets, alone, valid)
    N, M = int(query_offsets.max()), int(key_offsets.max())
    seen = torch.zeros(B, N, M, dtype=torch.bool)
    for b in range(B):
        one = [t if t is None else t[b % len(t)].tolist() for t in (table, alone, valid)]
        q, k = query_offsets[b % len(query_offsets)], key_offsets[b % len(key_offsets)]
        for i, row in enumerate(one[0]):
            if one[1] is not None and one[1][i]:
                seen[b, range(q[i], q[i + 1]), range(q[i], q[i + 1])] = True
                continue
            for j, visible in enumerate(row):
                length = int(k[j + 1] - k[j])
                if one[2] is not None:
                    length = max(0, min(length, one[2][j]))
                seen[b, q[i] : q[i + 1], k[j] : k[j] + length] = visible
    return seen


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(inputs_of_build(most=6))
def test_intervals_are_the_table(inputs):
    rows, row_spans, columns, column_spans = intervals.reference(*inputs)
    wanted = pairs_by_hand(*inputs)
    _, N, M = wanted.shape
    assert torch.equal(pairs_of(rows, row_spans, N, M), wanted)
    assert torch.equal(pairs_of(columns, column_spans, M, N).mT, wanted)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 10**6), st.integers(1, 7))
def test_there_are_as_many_intervals_as_runs(seed, F):
    table = torch.rand(F, F, generator=torch.Generator().manual_seed(seed)) < 0.5
    visibility = Visibility(table, FrameLayout([3] * F))
    runs = (pad(table.int(), (1, 0)).diff(dim=-1) == 1).sum()
    assert visibility.rows[..., 2].sum() == runs
    runs = (pad(table.T.int(), (1, 0)).diff(dim=-1) == 1).sum()
    assert visibility.columns[..., 2].sum() == runs


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(inputs_of_build(most=6))
def test_most_work_comes_first(inputs):
    rows, row_spans, columns, column_spans = intervals.reference(*inputs)
    for spans in (row_spans[:, :-1], column_spans[:, :-1]):
        work = (spans[..., 1] - spans[..., 0]).sum(-1)
        assert (work.diff(dim=-1) <= 0).all()
    for frames, before in ((rows, inputs[1]), (columns, inputs[2])):
        starts = before[:, :-1].expand(len(frames), -1).sort(-1).values
        assert torch.equal(frames[:, :-1, 0].sort(-1).values, starts)


@pytest.mark.usefixtures("interpreter")
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(inputs_of_build(), st.sampled_from((2, 64)))
def test_kernel_builds_the_same_tables(inputs, block):
    from fastvid.kernels._shared import intervals_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [t if t is None else t.to(device) for t in inputs]
    with pytest.MonkeyPatch.context() as patch:  # small blocks, so that few frames make several
        sizes = {"BLOCK_OWN": min(block, 16), "BLOCK_OTHER": block}
        patch.setattr(intervals_kernel, "BLOCKS", sizes)
        found = intervals_kernel.launch(*inputs)
    for table, wanted in zip(found, intervals.reference(*inputs), strict=True):
        assert torch.equal(table, wanted)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_visible_share_is_the_mean_of_the_pairs(seed, lonely, padded):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (5,), generator=generator) + 1
    alone = torch.rand(2, 5, generator=generator) < 0.3 if lonely else None
    valid = torch.randint(-1, 5, (1, 5), generator=generator) if padded else None
    table = torch.rand(5, 5, generator=generator) < 0.5
    visibility = Visibility(table, FrameLayout(lengths), self_only=alone, key_lengths=valid)
    N = visibility.queries.tokens
    wanted = visibility.dense(N, N).double().mean().item()
    assert visibility.visible_share() == pytest.approx(wanted)
