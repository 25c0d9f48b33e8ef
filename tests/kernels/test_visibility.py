"""The promises of `FrameLayout` and `Visibility`, and of the interval tables behind them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad
from torch.utils import _pytree as pytree

from fastvid.functional import FrameLayout, Visibility
from fastvid.kernels._shared import intervals

SIX = FrameLayout([2, 3, 1, 2, 4, 2])


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


@settings(max_examples=150, deadline=None, derandomize=True)
@given(inputs_of_build(most=6))
def test_intervals_are_the_table(inputs):
    rows, row_spans, columns, column_spans = intervals.reference(*inputs)
    wanted = pairs_by_hand(*inputs)
    _, N, M = wanted.shape
    assert torch.equal(pairs_of(rows, row_spans, N, M), wanted)
    assert torch.equal(pairs_of(columns, column_spans, M, N).mT, wanted)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_there_are_as_many_intervals_as_runs(seed, F):
    table = torch.rand(F, F, generator=torch.Generator().manual_seed(seed)) < 0.5
    visibility = Visibility(table, FrameLayout([3] * F))
    runs = (pad(table.int(), (1, 0)).diff(dim=-1) == 1).sum()
    assert visibility.rows[..., 2].sum() == runs
    runs = (pad(table.T.int(), (1, 0)).diff(dim=-1) == 1).sum()
    assert visibility.columns[..., 2].sum() == runs


@settings(max_examples=50, deadline=None, derandomize=True)
@given(inputs_of_build(most=6))
def test_most_work_comes_first(inputs):
    rows, row_spans, columns, column_spans = intervals.reference(*inputs)
    for spans in (row_spans[:, :-1], column_spans[:, :-1]):
        work = (spans[..., 1] - spans[..., 0]).sum(-1)
        assert (work.diff(dim=-1) <= 0).all()
    for frames, before in ((rows, inputs[1]), (columns, inputs[2])):
        starts = before[:, :-1].expand(len(frames), -1).sort(-1).values
        assert torch.equal(frames[:, :-1, 0].sort(-1).values, starts)


@pytest.mark.usefixtures("interpreter")
@settings(max_examples=15, deadline=None, derandomize=True)
@given(inputs_of_build(), st.sampled_from((2, 64)))
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


def test_one_compilation_serves_every_number_of_frames(compilations):
    printed = compilations("""
from fastvid.kernels._shared import intervals_kernel as kernel
for B, F, G in ((1, 1, 1), (2, 16, 16), (3, 100, 7)):
    alone = torch.zeros(B, F, dtype=torch.bool) if F == G else None
    valid = torch.zeros(1, G, dtype=torch.int32) if B == 3 else None
    table = torch.zeros(1, F, G, dtype=torch.bool)
    ends = (torch.zeros(B, n + 1, dtype=torch.int32) for n in (F, G))
    kernel.launch(table, *ends, alone, valid)
print(count(kernel._intervals))
""")
    assert printed.split() == ["1"]


def test_op_registration():
    table = torch.rand(2, 3, 3) < 0.5
    ends = offsets(torch.tensor([[2, 0, 3]]))
    alone, valid = torch.tensor([[True, False, False]]), torch.tensor([[1, 1, 1]]).int()
    torch.library.opcheck(intervals.build, (table, ends, ends, alone, valid))


# ---- the constructors


def frames_of(visibility):
    """The table of frames, read off the token pairs."""
    pairs = visibility.dense(visibility.queries.tokens, visibility.keys.tokens)
    q, k = visibility.queries.offsets[0, :-1], visibility.keys.offsets[0, :-1]
    return pairs[:, q][:, :, k].int().tolist()


def test_constructors_mean_what_they_say():
    layout = FrameLayout([2, 2, 2])
    assert frames_of(Visibility.full(layout)) == [[[1, 1, 1]] * 3]
    assert frames_of(Visibility.full(layout, FrameLayout([1, 5]))) == [[[1, 1]] * 3]
    assert frames_of(Visibility.causal(layout)) == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
    assert frames_of(Visibility.window(layout, 1, 0)) == [[[1, 0, 0], [1, 1, 0], [0, 1, 1]]]
    assert frames_of(Visibility.window(layout, 0, 1)) == [[[1, 1, 0], [0, 1, 1], [0, 0, 1]]]
    assert frames_of(Visibility.segments(layout, [5, 9, 5])) == [[[1, 0, 1], [0, 1, 0], [1, 0, 1]]]


def test_identity_hides_all_but_the_token_or_the_frame():
    layout = FrameLayout([2, 1])
    token = Visibility.identity(layout, [[True, False], [False, True]])
    assert token.dense(3, 3).int().tolist() == [
        [[1, 0, 0], [0, 1, 0], [1, 1, 1]],
        [[1, 1, 1], [1, 1, 1], [0, 0, 1]],
    ]
    frame = Visibility.identity(layout, [True, False], rows="self_frame")
    assert frame.dense(3, 3).int().tolist() == [[[1, 1, 0], [1, 1, 0], [1, 1, 1]]]


def test_text_and_frames_is_pyramid_flows_rule():
    visibility = Visibility.text_and_frames(FrameLayout([3, 2, 2]), torch.tensor([2, 3]))
    short, full = visibility.dense(7, 7).int().tolist()
    assert full == [[1, 1, 1, 1, 1, 0, 0]] * 5 + [[1, 1, 1, 1, 1, 1, 1]] * 2
    assert short == [[1, 1, 0, 1, 1, 0, 0]] * 5 + [[1, 1, 0, 1, 1, 1, 1]] * 2


def test_and_or_combine_what_is_seen():
    causal, window = Visibility.causal(SIX), Visibility.window(SIX, 1, 1)
    both, either = (causal & window).dense(14, 14), (causal | window).dense(14, 14)
    assert torch.equal(both, causal.dense(14, 14) & window.dense(14, 14))
    assert torch.equal(either, causal.dense(14, 14) | window.dense(14, 14))
    alone = Visibility.identity(SIX, [True] + [False] * 5)
    assert (causal & alone).dense(14, 14)[0, :2].sum() == 2  # one self-only side is enough
    assert torch.equal((causal | alone).dense(14, 14)[0, :2], causal.dense(14, 14)[0, :2])
    assert (alone | alone).dense(14, 14)[0, :2].sum() == 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_visible_share_is_the_mean_of_the_pairs(seed, lonely, padded):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (5,), generator=generator) + 1
    alone = torch.rand(2, 5, generator=generator) < 0.3 if lonely else None
    valid = torch.randint(0, 5, (1, 5), generator=generator) if padded else None
    table = torch.rand(5, 5, generator=generator) < 0.5
    visibility = Visibility(table, FrameLayout(lengths), self_only=alone, key_lengths=valid)
    N = visibility.queries.tokens
    wanted = visibility.dense(N, N).double().mean().item()
    assert visibility.visible_share() == pytest.approx(wanted)


def test_tokens_behind_a_shorter_sample_belong_to_no_frame():
    layout = FrameLayout([[1, 2], [2, 2]])
    assert layout.tokens == 4
    assert layout.frame_of_token(4).tolist() == [[0, 1, 1, 2], [0, 0, 1, 1]]
    pairs = Visibility.full(layout).dense(4, 4)
    assert not pairs[0, 3].any()
    assert not pairs[0, :, 3].any()
    assert pairs[1].all()


def test_full_knows_that_it_sees_all():
    assert Visibility.full(SIX).sees_all
    assert not Visibility.full(FrameLayout([[1, 2], [2, 2]])).sees_all
    assert not Visibility.causal(SIX).sees_all
    assert not (Visibility.full(SIX) & Visibility.causal(SIX)).sees_all


def test_repr_is_a_picture():
    visibility = Visibility.causal(FrameLayout([1] * 3)) & Visibility.identity(
        FrameLayout([1] * 3), [False, True, False]
    )
    size, *picture = repr(visibility).splitlines()
    assert size.startswith("Visibility: 3 frames on 3, 55.6% visible")
    assert [line.strip() for line in picture] == ["█··", "·╲·", "███"]
    assert repr(FrameLayout([2, 3])) == "FrameLayout([2, 3])"
    assert "…" in repr(Visibility.full(FrameLayout([1] * 40)))


def test_both_are_pytrees_and_move():
    visibility = Visibility.identity(SIX, [True] * 3 + [False] * 3)
    leaves, tree = pytree.tree_flatten(visibility)
    again = pytree.tree_unflatten(leaves, tree)
    assert torch.equal(again.dense(14, 14), visibility.dense(14, 14))
    assert again.keys is again.queries
    assert tree == pytree.tree_flatten(Visibility.identity(SIX, [False] * 6))[1]
    moved = Visibility.full(SIX).to("meta")
    assert moved.rows.is_meta
    assert (moved.sees_all, moved.queries.tokens) == (True, 14)


def test_it_is_built_on_the_meta_device():
    layout = FrameLayout(torch.ones(2, 7, dtype=torch.int64, device="meta"))
    visibility = Visibility.causal(layout)
    assert visibility.rows.shape == (2, 8, 5)
    assert visibility.column_spans.shape == (2, 8, 7, 2)
    assert layout.tokens is None


# ---- refusals


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: FrameLayout([1.5]), TypeError, "lengths must be whole numbers"),
        (lambda: FrameLayout([[1, 2], [1]]), ValueError, "lists of one size"),
        (lambda: FrameLayout([-1, 2]), ValueError, "lengths must be >= 0"),
        (lambda: FrameLayout(torch.ones(1, 1, 1).int()), ValueError, r"must be \(F,\) or \(B, F\)"),
        (lambda: Visibility(torch.ones(6, 6), SIX), TypeError, "table must be boolean"),
        (
            lambda: Visibility(torch.ones(5, 6).bool(), SIX),
            ValueError,
            r"table must be \(B or 1, 6, 6\), got \(5, 6\)",
        ),
        (
            lambda: Visibility(torch.ones(2, 6, 6).bool(), SIX, self_only=torch.ones(3, 6).bool()),
            ValueError,
            "one batch size",
        ),
        (
            lambda: Visibility(torch.ones(6, 6).bool(), SIX, FrameLayout([1] * 6), [True] * 6),
            ValueError,
            "self_only needs queries and keys of one layout",
        ),
        (lambda: Visibility.identity(SIX, [1] * 6), TypeError, "known must be boolean"),
        (lambda: Visibility.identity(SIX, [True] * 6, rows="row"), ValueError, "self_token"),
        (lambda: Visibility.window(SIX, -1, 0), ValueError, "back and forward must be >= 0"),
        (lambda: Visibility.segments(SIX, [1, 2]), ValueError, "ids must be"),
        (lambda: Visibility.text_and_frames(SIX, [[1]]), ValueError, r"text_lengths must be \(B,"),
        (
            lambda: Visibility.full(SIX) & Visibility.full(FrameLayout([1] * 6)),
            ValueError,
            "both sides must have the same queries",
        ),
        (
            lambda: Visibility.full(SIX) | Visibility.text_and_frames(SIX, [1]),
            ValueError,
            "one key_lengths",
        ),
    ],
)
def test_refusals(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.gpu
def test_gpu_builds_without_a_sync_and_in_a_graph():
    layout = FrameLayout([256] * 16, device="cuda")
    known = torch.zeros(16, dtype=torch.bool, device="cuda")
    Visibility.identity(layout, known)
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = Visibility.identity(layout, known)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = Visibility.identity(layout, known)
    known[3] = True
    graph.replay()
    assert not torch.equal(captured.rows, eager.rows)
    assert torch.equal(captured.rows, Visibility.identity(layout, known).rows)
