"""The promises of `FrameLayout` and `Visibility`, and of the interval tables behind them."""

import copy
import operator
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from fastvid.functional import FrameLayout, Visibility
from fastvid.kernels._shared import intervals

SIX = FrameLayout([2, 3, 1, 2, 4, 2])


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
    ends = torch.tensor([[0, 2, 2, 5]]).int()
    alone, valid = torch.tensor([[True, False, False]]), torch.tensor([[1, 1, 1]]).int()
    torch.library.opcheck(intervals.build, (table, ends, ends, alone, valid))


def test_what_the_caller_writes_later_changes_nothing():
    lengths = torch.tensor([2, 3, 1], dtype=torch.int32)
    table, known = torch.ones(3, 3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    valid = torch.tensor([[2, 1, 1]], dtype=torch.int32)
    layout = FrameLayout(lengths)
    made = [
        Visibility(table, layout, key_lengths=valid),
        Visibility.identity(layout, known),
        Visibility.identity(layout, known, rows="self_frame"),
    ]
    before = [(each.dense(6, 6), each.visible_share()) for each in made]
    lengths[0], table[0], known[1], valid[0, 0] = 9, False, True, 0
    for each, (dense, share) in zip(made, before, strict=True):
        assert each.dense(6, 6).equal(dense)
        assert each.visible_share() == share


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


def test_text_lengths_meet_the_layouts_of_samples():
    layout = FrameLayout([[3, 2, 2], [2, 4, 1]])
    one, each = (Visibility.text_and_frames(layout, lengths) for lengths in ([1], [1, 1]))
    assert torch.equal(one.dense(7, 7), each.dense(7, 7))
    assert one.dense(7, 7)[:, :, 1].int().tolist() == [[0] * 7] * 2


def test_and_or_combine_what_is_seen():
    causal, window = Visibility.causal(SIX), Visibility.window(SIX, 1, 1)
    both, either = (causal & window).dense(14, 14), (causal | window).dense(14, 14)
    assert torch.equal(both, causal.dense(14, 14) & window.dense(14, 14))
    assert torch.equal(either, causal.dense(14, 14) | window.dense(14, 14))
    alone = Visibility.identity(SIX, [True] + [False] * 5)
    assert (causal & alone).dense(14, 14)[0, :2].sum() == 2  # one self-only side is enough
    assert torch.equal((causal | alone).dense(14, 14)[0, :2], causal.dense(14, 14)[0, :2])
    assert (alone | alone).dense(14, 14)[0, :2].sum() == 2


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


def made_on(device, lengths=(2, 3, 1), known=(True, False, False), table=((True,) * 3,) * 3):
    layout = FrameLayout(lengths if torch.is_tensor(lengths) else list(lengths), device=device)
    return {
        "full": Visibility.full(layout, FrameLayout([1, 5], device=device)),
        "causal": Visibility.causal(layout),
        "window": Visibility.window(layout, 0, 1),
        "identity": Visibility.identity(layout, known),
        "own frame": Visibility.identity(layout, known, rows="self_frame"),
        "table": Visibility(table, layout, self_only=known, key_lengths=[1, 2, 1]),
    }


@pytest.mark.parametrize("name", made_on("cpu"))
def test_the_host_keeps_what_it_was_told(name):
    """Another device's tables again on the CPU, once; copied and pickled along."""
    wanted, there = made_on("cpu")[name], made_on("meta")[name]
    assert wanted.on_host() is wanted
    assert wanted.to("meta").on_host() is wanted
    for visibility in (there, copy.deepcopy(there), pickle.loads(pickle.dumps(there))):
        found = visibility.on_host()
        assert found is visibility.on_host()
        for table in ("rows", "row_spans", "columns", "column_spans"):
            assert torch.equal(getattr(found, table), getattr(wanted, table))
    leaves, tree = pytree.tree_flatten(there)
    assert pytree.tree_unflatten(leaves, tree).on_host() is None


def test_the_host_does_not_know_what_only_a_device_holds():
    lengths, known = torch.tensor([2, 3, 1]), torch.tensor([True, False, False])
    assert all(v.on_host() is None for v in made_on("meta", lengths.to("meta")).values())
    of_known = made_on("meta", known=known.to("meta"))
    untold = {name for name, v in of_known.items() if v.on_host() is None}
    assert untold == {"identity", "own frame", "table"}


def test_a_list_that_changes_later_changes_nothing():
    known = torch.tensor([True, False, False])
    there = made_on("meta", known=known)["identity"]
    known[1] = True
    assert there.on_host().self_only.tolist() == [[True, False, False]]


def test_it_is_built_on_the_meta_device():
    layout = FrameLayout(torch.ones(2, 7, dtype=torch.int64, device="meta"))
    visibility = Visibility.causal(layout)
    assert visibility.rows.shape == (2, 8, 5)
    assert visibility.column_spans.shape == (2, 8, 7, 2)
    assert layout.tokens is None


def test_no_frames_at_all():
    for layout in (FrameLayout([]), FrameLayout(torch.empty(0, dtype=torch.int32))):
        assert (layout.frames, layout.tokens, tuple(layout.offsets.shape)) == (0, 0, (1, 1))
        assert Visibility.full(layout).rows.shape == (1, 1, 5)
        assert Visibility.full(layout, SIX).dense(0, 14).shape == (1, 0, 14)


def test_union_of_a_self_only_frame_follows_the_other_row():
    alone = Visibility.identity(SIX, [True] + [False] * 5)
    hidden = Visibility(~torch.eye(6, dtype=torch.bool), SIX)
    assert not (hidden | hidden).dense(14, 14)[0, 0, 0]
    assert alone.dense(14, 14)[0, 0, 0]
    assert not (alone | hidden).dense(14, 14)[0, 0, 0]


# ---- refusals


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: FrameLayout([1.5]), TypeError, "lengths must be whole numbers"),
        (lambda: FrameLayout([[1, 2], [1]]), ValueError, "lists of one size"),
        (lambda: FrameLayout([-1, 2]), ValueError, "lengths must be >= 0"),
        (lambda: FrameLayout(torch.ones(1, 1, 1).int()), ValueError, r"must be \(F,\) or \(B, F\)"),
        (lambda: FrameLayout(torch.ones(2)), TypeError, "lengths must be whole numbers"),
        (
            lambda: Visibility(torch.ones(6, 6).bool(), SIX, key_lengths=[1.5] * 6),
            TypeError,
            "key_lengths must be whole numbers, int32 or int64, got torch.float32",
        ),
        (
            lambda: Visibility(torch.ones(6, 6).bool(), SIX, key_lengths=[True] * 6),
            TypeError,
            "key_lengths must be whole numbers, int32 or int64, got torch.bool",
        ),
        (
            lambda: Visibility.text_and_frames(SIX, [1.5]),
            TypeError,
            "text_lengths must be whole numbers, int32 or int64, got torch.float32",
        ),
        (
            lambda: Visibility(torch.ones(6, 6).bool(), SIX, FrameLayout([1] * 6, device="meta")),
            ValueError,
            "queries and keys must be on one device, got cpu and meta",
        ),
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
            lambda: Visibility.text_and_frames(FrameLayout([[1, 2], [2, 2]]), [1, 1, 1]),
            ValueError,
            r"text_lengths must be \(B,\), the layout has B=2, got \(3,\)",
        ),
        *(
            (
                lambda combine=combine: combine(
                    Visibility.identity(SIX, torch.ones(2, 6).bool()),
                    Visibility.identity(SIX, torch.ones(3, 6).bool()),
                ),
                ValueError,
                "both sides must have one batch size, or 1, got 2 and 3",
            )
            for combine in (operator.and_, operator.or_)
        ),
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
