"""The promises of `masked_attention`. Those of its kernels have a file of their own."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastvid.functional import FrameLayout, Visibility, masked_attention
from fastvid.kernels.masked_attention import grouped, reference
from tests.kernels.masked_attention_cases import (
    BACKWARD,
    MASKS,
    OP,
    check_budget,
    oracle,
    ours,
    tables,
    visibility_of,
)  # fmt: skip

# ---- the reference, and what the op computes on this machine


@pytest.mark.parametrize("mask", MASKS)
def test_written_gradient_is_the_gradient(mask):
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 2, 16, 2, 8, dtype=torch.float64)
    pairs = visibility_of(mask).dense(16, 16)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out, _ = reference.forward(*leaves, pairs, 0.3)
    automatic = torch.autograd.grad(out, leaves, dout)
    written = reference.backward(dout, q, k, v, pairs, 0.3)
    torch.testing.assert_close(written, automatic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
def test_cpu_rounds_no_worse_than_eager(within_budget, mask, dtype):
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 2, 256, 2, 64).to(dtype)
    visibility = visibility_of(mask, 64)
    found = ours(q, k, v, visibility, dout)
    assert found[0].is_contiguous()
    check_budget(within_budget, found, q, k, v, visibility, dout, 0.125)


def test_other_keys_than_queries():
    torch.manual_seed(0)
    q, dout = torch.randn(2, 2, 6, 2, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, 9, 2, 16, dtype=torch.float64)
    table = torch.tensor([[True, False, True], [False, True, False]])
    visibility = Visibility(table, FrameLayout([2, 4]), FrameLayout([3, 5, 1]))
    found, wanted = (f(q, k, v, visibility, dout, 0.25) for f in (ours, oracle))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("mask", MASKS)
def test_gradcheck(mask):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 16, 1, 16, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    visibility = visibility_of(mask)
    assert torch.autograd.gradcheck(
        lambda *a: masked_attention(*a, visibility), (q, k, v), fast_mode=True
    )


def test_all_visible_is_dense_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 48, 2, 32)
    out = masked_attention(q, k, v, Visibility.full(FrameLayout([16] * 3)))
    wanted = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    torch.testing.assert_close(out, wanted.transpose(1, 2))


def test_what_sees_nothing_is_zero_and_gives_none():
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 1, 16, 1, 16)
    out, lse, *grads = ours(q, k, v, visibility_of("nothing"), dout)
    assert (lse == -torch.inf).all()
    assert not any(tensor.any() for tensor in (out, *grads))


@pytest.mark.parametrize("launcher", ["op", "kernel"])
def test_known_frames_do_not_depend_on_others(request, launcher):
    """Bit for bit, even on NaN."""
    forward = OP
    if launcher == "kernel":
        request.getfixturevalue("interpreter")
        from fastvid.kernels.masked_attention.kernel import launch_forward

        def forward(q, k, v, rows, row_spans, _columns, _column_spans, scale):
            return launch_forward(q, k, v, rows, row_spans, scale)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = FrameLayout([5, 3, 6], device=device)
    q, k, v = torch.randn(3, 1, 14, 2, 16, device=device)
    for rows in ("self_token", "self_frame"):
        visibility = Visibility.identity(layout, [True, False, True], rows=rows)
        out, lse = forward(q, k, v, *tables(visibility), 0.25)
        changed = [tensor.clone() for tensor in (q, k, v)]
        for tensor in changed:
            tensor[:, 5:8] = torch.nan
        after, after_lse = forward(*changed, *tables(visibility), 0.25)
        known = [*range(5), *range(8, 14)]
        assert torch.equal(after[:, known], out[:, known])
        assert torch.equal(after_lse[:, :, known], lse[:, :, known])
        assert after[:, 5:8].isnan().all()
    token = masked_attention(q, k, v, Visibility.identity(layout, [True, False, True]))
    assert torch.equal(token[:, known], v[:, known])


def test_work_is_what_is_visible(monkeypatch):
    """The pairs given to SDPA are the visible ones, each once, forward and backward."""
    counted = []

    def counting(function, queries_at):
        def call(*arguments):
            q, k = arguments[queries_at], arguments[queries_at + 1]
            counted.append(q.shape[0] * q.shape[1] * k.shape[1])
            return function(*arguments)

        return call

    monkeypatch.setattr(grouped, "_flash", counting(grouped._flash, 0))
    monkeypatch.setattr(grouped, "_flash_backward", counting(grouped._flash_backward, 1))
    q, k, v, dout = torch.randn(4, 2, 1200, 1, 16)
    for mask in MASKS:
        visibility = visibility_of(mask, 300)
        pairs = visibility.dense(1200, 1200).expand(2, -1, -1).sum().item()
        if visibility.self_only is not None:
            pairs -= 600  # copied, not computed
        counted.clear()
        ours(q, k, v, visibility, dout)
        assert sum(counted) == 2 * pairs, mask


@pytest.mark.parametrize("mask", ["identity", "causal"])
def test_forward_holds_little_beside_its_result(monkeypatch, mask):
    """What a call returns, before it is put in its place, is smaller than the call's scratch."""
    returned, plain = [], grouped._flash

    def flash(*arguments):
        found = plain(*arguments)
        returned.append(found[0].numel())
        return found

    monkeypatch.setattr(grouped, "_flash", flash)
    q, k, v = torch.randn(3, 2, 1600, 8, 64)
    masked_attention(q, k, v, visibility_of(mask, 400))
    assert max(returned) <= grouped.MOST_NUMBERS * torch.get_num_threads()


def allocated_at_most(function):
    """Bytes that the allocator held at once, beyond what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("mask", ["known 9 of 17", "every other known", "causal over 16"])
def test_memory_is_that_of_dense_attention(mask):
    """Training on a packed qkv holds no more; forward, one call's result and queries besides."""
    frames = 16 if "causal" in mask else 17
    layout = FrameLayout([256] * frames)
    visibility = {
        "known 9 of 17": lambda: Visibility.identity(layout, [f < 9 for f in range(17)]),
        "every other known": lambda: Visibility.identity(layout, [f % 2 == 0 for f in range(17)]),
        "causal over 16": lambda: Visibility.causal(layout),
    }[mask]()
    qkv = torch.randn(1, 256 * frames, 3, 4, 64)
    dout = torch.randn(1, 256 * frames, 4, 64)

    def dense(q, k, v):
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    def masked(q, k, v):
        return masked_attention(q, k, v, visibility)

    def train(attend):
        leaf = qkv.detach().requires_grad_()
        attend(*leaf.unbind(2)).backward(dout)

    forward = [allocated_at_most(lambda f=f: f(*qkv.unbind(2))) for f in (masked, dense)]
    training = [allocated_at_most(lambda f=f: train(f)) for f in (masked, dense)]
    numbers = grouped.MOST_NUMBERS + grouped.MOST_TOKENS  # out and lse of one call
    one_call = torch.get_num_threads() * numbers * qkv.itemsize
    assert forward[0] <= forward[1] + (2 * one_call if "other" in mask else one_call)
    assert training[0] <= 1.001 * training[1]  # the tables


@pytest.mark.parametrize("most", [1, 200, 400, 800])
@pytest.mark.parametrize("mask", MASKS)
def test_cpu_by_few_samples_and_heads(monkeypatch, mask, most):
    monkeypatch.setattr(grouped, "MOST_NUMBERS", most)
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 2, 16, 3, 16, dtype=torch.float64)
    visibility = visibility_of(mask)
    found, wanted = (f(q, k, v, visibility, dout, 0.25) for f in (ours, oracle))
    torch.testing.assert_close(found, wanted)


LAYOUTS = {
    "contiguous": lambda t: t,
    "a third of a wider row": lambda t: torch.stack([t] * 3, 2)[:, :, 1],
    "heads before tokens": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "width not last in memory": lambda t: t.mT.contiguous().mT,
    "one sample, expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_strides(layout):
    torch.manual_seed(0)
    q, k, v, dout = (LAYOUTS[layout](t) for t in torch.randn(4, 2, 16, 3, 16))
    for mask in ("identity", "causal"):
        visibility = visibility_of(mask)
        wanted = ours(*(t.contiguous() for t in (q, k, v)), visibility, dout.contiguous())
        torch.testing.assert_close(ours(q, k, v, visibility, dout), wanted)


@pytest.mark.parametrize("shape", [(0, 8, 2, 16), (2, 0, 2, 16), (2, 8, 0, 16)])
def test_empty(shape):
    layout = FrameLayout([shape[1] // 2] * 2)
    x = torch.zeros(shape, requires_grad=True)
    out = masked_attention(x, x, x, Visibility.causal(layout))
    out.sum().backward()
    assert out.shape == x.grad.shape == shape


@pytest.mark.usefixtures("poisoned")
def test_cpu_leaves_no_scratch_unwritten():
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 2, 16, 1, 16)
    for mask in MASKS:
        for tensor in ours(q, k, v, visibility_of(mask), dout):
            assert not tensor.isnan().any(), mask


# ---- registration and graphs


@pytest.mark.parametrize("mask", ["identity", "causal"])
def test_op_registration(mask):
    torch.manual_seed(0)
    args = [*torch.randn(3, 2, 16, 2, 16), *tables(visibility_of(mask)), 0.25]
    out, lse = OP(*args)
    for tensor in args[:3]:
        tensor.requires_grad_()
    torch.library.opcheck(OP, args)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    gradient = [torch.randn_like(out), *detached[:3], out.detach(), lse, *detached[3:]]
    torch.library.opcheck(BACKWARD, gradient)


def test_compiles_once_for_all_sizes():
    def given(q, k, v, visibility):
        return masked_attention(q, k, v, visibility)

    def built_inside(q, k, v, known, lengths):
        return masked_attention(q, k, v, Visibility.identity(FrameLayout(lengths), known))

    for function in (given, built_inside):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for frames, tokens in ((6, 4), (9, 4), (6, 7), (8, 10)):
                lengths = torch.full((frames,), tokens)
                more = torch.arange(frames) % 2 == 0, lengths
                if function is given:
                    more = (Visibility.causal(FrameLayout(lengths)),)
                qkv = torch.randn(2, frames * tokens, 3, 2, 16, requires_grad=True)
                found, wanted = (f(*qkv.unbind(2), *more) for f in (compiled, function))
                torch.testing.assert_close(found, wanted)
                grads = (torch.autograd.grad(out.sum(), qkv)[0] for out in (found, wanted))
                torch.testing.assert_close(*grads)


def test_exports_with_dynamic_sizes():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v, visibility):
            return masked_attention(q, k, v, visibility)

    def sizes(node):
        if isinstance(node, FrameLayout | Visibility):
            flat = torch.utils._pytree.SUPPORTED_NODES[type(node)].flatten_fn(node)[0]
            return [sizes(child) for child in flat]
        if node is None:
            return None
        auto = torch.export.Dim.AUTO
        return {axis: auto for axis, size in enumerate(node.shape) if size > 1}

    q = torch.randn(2, 24, 2, 16)
    visibility = Visibility.causal(FrameLayout([4] * 6))
    dynamic = {1: torch.export.Dim.AUTO}
    exported = torch.export.export(
        Attend(), (q, q, q, visibility), dynamic_shapes=(*[dynamic] * 3, sizes(visibility))
    )
    q = torch.randn(2, 19, 2, 16)
    visibility = Visibility.causal(FrameLayout([3, 5, 2, 6, 1, 1, 1]))
    found = exported.module()(q, q, q, visibility)
    torch.testing.assert_close(found, masked_attention(q, q, q, visibility))


def test_meta_device():
    q = torch.empty(2, 24, 2, 16, device="meta", requires_grad=True)
    visibility = Visibility.causal(FrameLayout([4] * 6, device="meta"))
    out, lse = masked_attention(q, q, q, visibility, return_lse=True)
    out.sum().backward()
    assert (out.shape, lse.shape, q.grad.shape) == (q.shape, (2, 2, 24), q.shape)
    assert lse.dtype == torch.float32


def test_activation_checkpointing():
    torch.manual_seed(0)
    q = torch.randn(2, 16, 2, 16, requires_grad=True)
    visibility = visibility_of("identity")
    grads = [
        torch.autograd.grad(f(q).sum(), q)[0]
        for f in (
            lambda q: masked_attention(q, q, q, visibility),
            lambda q: checkpoint(masked_attention, q, q, q, visibility, use_reentrant=False),
        )
    ]
    assert torch.equal(*grads)


def test_two_runs_give_the_same_bits():
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 2, 512, 2, 32)
    visibility = visibility_of("causal", 128)
    first, second = (ours(q, k, v, visibility, dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- refusals


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"q": "no tensor"}, TypeError, "q must be a Tensor"),
        ({"k": torch.zeros(2, 16, 3, 16)}, ValueError, r"k must be .* heads=2"),
        ({"v": torch.zeros(2, 15, 2, 16)}, ValueError, r"v must be .* M=16"),
        ({"k": torch.zeros(2, 16, 2, 16).half()}, TypeError, "k must have the dtype of q"),
        ({"v": torch.zeros(2, 16, 2, 16, device="meta")}, ValueError, "v must be on the device of"),
        ({"E": 20}, ValueError, "multiple of 8, >= 16, got 20"),
        ({"E": 8}, ValueError, "multiple of 8, >= 16, got 8"),
        ({"E": 264}, NotImplementedError, "E <= 256, got 264"),
        ({"dtype": torch.int64}, TypeError, "q must be float32"),
        (
            {"visibility": torch.ones(4, 4)},
            TypeError,
            "visibility must be a Visibility, got Tensor",
        ),
        (
            {"visibility": Visibility.causal(FrameLayout([4] * 5))},
            ValueError,
            "visibility.queries must sum to 16 tokens, got 20",
        ),
        (
            {"visibility": Visibility.full(FrameLayout([16]), FrameLayout([15]))},
            ValueError,
            "visibility.keys must sum to 16 tokens, got 15",
        ),
        (
            {"visibility": Visibility.identity(FrameLayout([16]), [[True]] * 3)},
            ValueError,
            "visibility must have batch 1 or B=2, got 3",
        ),
        (
            {"visibility": Visibility.causal(FrameLayout([4] * 4, device="meta"))},
            ValueError,
            "visibility must be on the device of q",
        ),
    ],
)
def test_refusals(change, error, says):
    change = copy.copy(change)
    x = torch.zeros(2, 16, 2, change.pop("E", 16), dtype=change.pop("dtype", torch.float32))
    given = {"q": x, "k": x, "v": x, "visibility": visibility_of("causal")} | change
    with pytest.raises(error, match=says):
        masked_attention(**given)


def test_cpu_sums_over_many_frames_are_float32(within_budget):
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 1, 24 * 16, 2, 64).bfloat16()
    visibility = Visibility.causal(FrameLayout([16] * 24))
    found = ours(q, k, v, visibility, dout)
    check_budget(within_budget, found, q, k, v, visibility, dout, 0.125)
