"""The promises of `masked_attention`. Without a GPU its Triton kernels run in the interpreter."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastvid.functional import FrameLayout, Visibility, masked_attention
from fastvid.kernels._shared import paths
from fastvid.kernels.masked_attention import grouped, op, reference

OP = torch.ops.fastvid.masked_attention.default
BACKWARD = torch.ops.fastvid.masked_attention_backward.default


def tables(visibility):
    v = visibility
    return v.rows, v.row_spans, v.columns, v.column_spans


def random_visibility(seed, batch=2, frames=4, longest=4, device="cpu"):
    """Ragged and empty frames, several runs a row, rows that see nothing, lonely ones, padding."""
    generator = torch.Generator().manual_seed(seed)

    def chance(share, *shape):
        return torch.rand(shape, generator=generator) < share

    lengths = torch.randint(0, longest + 1, (frames,), generator=generator)
    layout = FrameLayout([1 + seed % 3, *lengths.tolist()])
    size = layout.frames
    alone = chance(0.3, batch, size) if seed % 2 else None
    valid = torch.randint(0, longest + 1, (1, size), generator=generator) if seed % 5 == 0 else None
    visibility = Visibility(
        chance(0.5, 1 + seed % batch, size, size), layout, self_only=alone, key_lengths=valid
    )
    return visibility.to(device)


def visibility_of(name, tokens=4, device="cpu"):
    """The masks of the models, over four frames."""
    layout = FrameLayout([tokens] * 4)
    known = [[True, False, True, False], [False] * 4]
    made = {
        "full": lambda: Visibility.full(layout),
        "causal": lambda: Visibility.causal(layout),
        "identity": lambda: Visibility.identity(layout, known),
        "own frame": lambda: Visibility.identity(layout, known, rows="self_frame"),
        "text": lambda: Visibility.text_and_frames(FrameLayout([5, 2, 4, tokens * 4 - 11]), [3, 5]),
        "nothing": lambda: Visibility(torch.zeros(4, 4, dtype=torch.bool), layout),
        "ragged": lambda: Visibility.causal(FrameLayout([tokens * 2, 0, 1, tokens * 2 - 1])),
        "tail": lambda: Visibility.causal(FrameLayout([[tokens, 1], [tokens, tokens * 3]])),
    }
    return made[name]().to(device)


MASKS = ["full", "causal", "identity", "own frame", "text", "nothing", "ragged", "tail"]


def oracle(q, k, v, visibility, dout, scale):
    """out, lse, dq, dk, dv in float64."""
    q, k, v, dout = (tensor.double() for tensor in (q, k, v, dout))
    pairs = visibility.dense(q.shape[1], k.shape[1])
    forward = reference.forward(q, k, v, pairs, scale)
    return *forward, *reference.backward(dout, q, k, v, pairs, scale)


def eager(q, k, v, visibility, dout, scale):
    """What users write today, in the dtype of `q`: SDPA with a dense mask; blind rows set to 0."""
    pairs = visibility.dense(q.shape[1], k.shape[1])[:, None]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
    heads_first = (tensor.transpose(1, 2) for tensor in leaves)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=pairs, scale=scale)
    out = torch.where(pairs.any(-1, keepdim=True), out, 0.0).transpose(1, 2)
    return out, *torch.autograd.grad(out, leaves, dout)


def ours(q, k, v, visibility, dout, scale=None):
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out, lse = masked_attention(*leaves, visibility, scale=scale, return_lse=True)
    return out, lse, *torch.autograd.grad(out, leaves, dout)


def check_budget(within_budget, found, q, k, v, visibility, dout, scale):
    out, lse, *grads = found
    exact, exact_lse, *exact_grads = oracle(q, k, v, visibility, dout, scale)
    plain = eager(q, k, v, visibility, dout, scale)
    triples = zip((out, *grads), plain, (exact, *exact_grads), strict=True)
    for name, (actual, same, wanted) in zip(("out", "dq", "dk", "dv"), triples, strict=True):
        if q.dtype == torch.float32:
            error = (actual.double() - wanted).abs().max()
            assert error <= 1e-5 * wanted.abs().max(), f"{name}: {error:.3g}"
        else:
            within_budget(actual, same, wanted, name)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-3, atol=2e-3)


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


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
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


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(4)))
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


def test_full_visibility_may_go_to_pytorch(monkeypatch, caplog):
    """The rule of the GPU, forced here; a caller who wants the lse gets the op."""
    paths.announce.cache_clear()
    monkeypatch.setattr(op, "_vendor_serves", lambda q, visibility: visibility.sees_all)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 16, 2, 16)
    full = visibility_of("full")
    with caplog.at_level(logging.DEBUG, "fastvid.kernels"):
        out = masked_attention(q, k, v, full)
        wanted, _ = masked_attention(q, k, v, full, return_lse=True)
    torch.testing.assert_close(out, wanted)
    assert out.is_contiguous()
    assert "masked_attention: SDPA, since nothing is hidden" in caplog.messages
    assert "masked_attention: SDPA per group of frames" in caplog.messages


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


# ---- the kernels


def launched(q, k, v, visibility, dout, scale):
    from fastvid.kernels.masked_attention.kernel import launch_backward, launch_forward

    out, lse = launch_forward(q, k, v, *tables(visibility)[:2], scale)
    return out, lse, *launch_backward(dout, q, k, v, out, lse, *tables(visibility), scale)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("E", [64, 72, 128])
def test_kernels_round_no_worse_than_eager(within_budget, device, rand, E, dtype):
    """Each launch configuration of the models, over frames that are longer than a tile."""
    visibility = Visibility.causal(FrameLayout([131, 2], device=device))
    q, k, v, dout = (rand(1, 133, 1, E, dtype=dtype) for _ in range(4))
    found = launched(q, k, v, visibility, dout, E**-0.5)
    check_budget(within_budget, found, q, k, v, visibility, dout, E**-0.5)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("E", [16, 24, 40, 136, 256])
def test_kernels_at_other_head_widths(within_budget, device, rand, E):
    visibility = visibility_of("identity", 3, device)
    q, k, v, dout = (rand(2, 12, 1, E, dtype=torch.float16) for _ in range(4))
    found = launched(q, k, v, visibility, dout, 0.2)
    check_budget(within_budget, found, q, k, v, visibility, dout, 0.2)


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize(
    ("mask", "dtype"),
    [*((mask, torch.float16) for mask in MASKS), ("identity", torch.float32)],
)
def test_kernels_serve_every_mask(within_budget, device, rand, mask, dtype):
    visibility = visibility_of(mask, 4, device)
    heads = 2 if mask == "identity" else 1
    q, k, v = rand(2, 16, 3, heads, 16, dtype=dtype).unbind(2)
    dout = rand(2, heads, 16, 16, dtype=dtype).transpose(1, 2)
    found = launched(q, k, v, visibility, dout, 0.25)
    assert not any(tensor.isnan().any() for tensor in found)
    check_budget(within_budget, found, q, k, v, visibility, dout, 0.25)


@pytest.mark.usefixtures("interpreter")
@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_kernels_serve_any_layout_and_table(seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    visibility = random_visibility(seed, device=device)
    torch.manual_seed(seed)
    q, k, v, dout = torch.randn(4, 2, visibility.queries.tokens, 1, 16, device=device)
    found, wanted = (f(q, k, v, visibility, dout, 0.25) for f in (launched, oracle))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreter")
def test_kernels_share_expanded_keys_and_repeat_their_bits(device, rand):
    visibility = visibility_of("causal", 3, device)
    q, dout = rand(2, 12, 1, 24), rand(2, 12, 1, 24)
    k, v = (rand(1, 12, 1, 24).expand(2, -1, -1, -1) for _ in range(2))
    first, second = (launched(q, k, v, visibility, dout, 0.25) for _ in range(2))
    copied = launched(q, k.contiguous(), v.contiguous(), visibility, dout, 0.25)
    for a, b, c in zip(first, second, copied, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.usefixtures("interpreter")
def test_kernels_stay_inside_their_tensors(device, rand, guard_bands):
    visibility = visibility_of("ragged", 3, device)
    q, k, v, dout = (rand(2, 12, 1, 24) for _ in range(4))
    launched(q, k, v, visibility, dout, 0.25)
    guard_bands()


@pytest.mark.usefixtures("interpreter")
def test_kernels_on_nothing(device, rand):
    visibility = Visibility.causal(FrameLayout([0, 0], device=device))
    q = rand(2, 0, 1, 16)
    assert all(tensor.numel() == 0 for tensor in launched(q, q, q, visibility, q, 0.25))


def test_one_compilation_serves_every_layout(compilations):
    printed = compilations("""
from fastvid.kernels._shared import intervals
from fastvid.kernels.masked_attention import kernel
for B, frames, tokens in ((1, 3, 5), (2, 4, 4), (3, 16, 1), (1, 1, 1)):
    ends = (torch.arange(frames + 1) * tokens).int()[None]
    table = torch.ones(1, frames, frames, dtype=torch.bool)
    tables = intervals.reference(table, ends, ends, None, None)
    q, k, v = torch.zeros(B, frames * tokens, 3, 2, 16).unbind(2)
    out, lse = kernel.launch_forward(q, k, v, *tables[:2], 1.0)
    kernel.launch_backward(out, q, k, v, out, lse, *tables, 1.0)
print(*(count(getattr(kernel, name)) for name in ("_forward", "_backward_q", "_backward_kv")))
""")
    # A batch or a length of 1 gives a stride of 0, which Triton knows as a multiple of 16 as well.
    assert printed.split() == ["1", "1", "1"]


# ---- on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("E", [64, 72, 128])
@pytest.mark.parametrize("mask", MASKS)
def test_gpu_bf16_at_real_sizes(within_budget, rand, mask, E):
    visibility = visibility_of(mask, 1000, "cuda")
    q, k, v = rand(2, 4000, 3, 2, E, dtype=torch.bfloat16).unbind(2)
    dout = rand(2, 4000, 2, E, dtype=torch.bfloat16)
    found = ours(q, k, v, visibility, dout)
    check_budget(within_budget, found, q, k, v, visibility, dout, E**-0.5)


@pytest.mark.gpu
def test_gpu_float32_is_float32(rand):
    visibility = visibility_of("identity", 300, "cuda")
    q, k, v, dout = (rand(2, 1200, 2, 64) for _ in range(4))
    found, wanted = (f(q, k, v, visibility, dout, 0.125) for f in (ours, oracle))
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).abs().max() <= 1e-5 * b[b.isfinite()].abs().max()


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_numbers():
    N, heads, E = 2**20 + 512, 32, 64
    qkv = torch.empty(1, N, 3, heads, E, dtype=torch.bfloat16, device="cuda").normal_()
    layout = FrameLayout([64] * (N // 64), device="cuda")
    ends = Visibility.window(FrameLayout([64] * 8, device="cuda"), 0, 0)
    frames = torch.arange(layout.frames, device="cuda")
    start = layout.offsets[:, :-1]
    rows = torch.stack([start, start + 64, start * 0 + 1, start * 0, start + 64], -1)
    rows = torch.cat([rows, rows[:, -1:] * 0 + 2**31 - 1], 1).int()
    spans = torch.zeros(1, len(frames) + 1, 1, 2, dtype=torch.int32, device="cuda")
    spans[0, :-1, 0, 0], spans[0, :-1, 0, 1] = start[0], start[0] + 64
    q, k, v = qkv.unbind(2)
    out, _ = OP(q, k, v, rows, spans, rows, spans, 0.125)
    near, _ = OP(*(t[:, -512:].contiguous() for t in (q, k, v)), *tables(ends), 0.125)
    assert torch.equal(out[:, -512:], near)


@pytest.mark.gpu
def test_gpu_graph_capture(rand):
    visibility = visibility_of("identity", 256, "cuda")
    q, k, v = rand(2, 1024, 3, 2, 64, dtype=torch.bfloat16).unbind(2)
    masked_attention(q, k, v, visibility)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = masked_attention(q, k, v, visibility)
    q.copy_(rand(2, 1024, 2, 64))
    graph.replay()
    assert torch.equal(out, masked_attention(q, k, v, visibility))


@pytest.mark.gpu
def test_gpu_backward_repeats_its_bits(rand):
    visibility = visibility_of("causal", 512, "cuda")
    q, k, v, dout = (rand(2, 2048, 4, 64, dtype=torch.bfloat16) for _ in range(4))
    runs = [ours(q, k, v, visibility, dout) for _ in range(10)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.gpu
def test_gpu_compiles_once_and_launches_one_variant(rand):
    from fastvid.kernels.masked_attention import kernel

    def step(q, k, v, known, lengths):
        return masked_attention(q, k, v, Visibility.identity(FrameLayout(lengths), known))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    seen = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for frames, tokens in ((6, 100), (9, 100), (6, 256)):
            lengths = torch.full((frames,), tokens, device="cuda")
            known = torch.arange(frames, device="cuda") % 2 == 0
            q, k, v = rand(2, frames * tokens, 3, 4, 96, dtype=torch.bfloat16).unbind(2)
            found, wanted = (f(q, k, v, known, lengths) for f in (compiled, step))
            torch.testing.assert_close(found, wanted)
            seen.append(sum(len(cache[0]) for cache in kernel._forward.device_caches.values()))
    assert seen[0] == seen[-1]
