"""The promises of `qk_norm_rope`. Without a GPU its Triton kernels run in the interpreter."""

import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastvid.functional import Rotary, qk_norm_rope, rotary_table
from fastvid.kernels._shared import paths
from fastvid.kernels.qk_norm_rope import reference
from tests.kernels.qk_norm_rope_cases import (
    BACKWARD,
    NORMS,
    OP,
    TURNS,
    arguments,
    check_budget,
    gradients,
    make_affine,
    make_rotary,
    options,
)

HARDEST = ("layer across heads", "three axes, partial")


def make(rand, B, N, heads, E, norm, turn, dtype=torch.float32):
    """q, k, the gradients of both results, weights and biases, rotary."""
    q, k, *douts = (rand(B, N, heads, E, dtype=dtype) for _ in range(4))
    affine = make_affine(functools.partial(rand, dtype=dtype), norm, heads, E)
    return q, k, douts, affine, make_rotary(turn, B, N, q.device)


# ---- the tables and the reference


def test_tables_are_exact_far_out_and_between_cells():
    cos, sin = rotary_table(16385, 8)
    angle = 16384 * torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    torch.testing.assert_close(cos[-1], angle.cos().float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[-1], angle.sin().float(), rtol=0, atol=1e-7)
    half, _ = rotary_table(torch.tensor([0.5, 2.5]), 4, theta=100.0)
    torch.testing.assert_close(half[1], torch.tensor([2.5, 0.25]).cos())


@pytest.mark.parametrize("interleaved", [True, False])
def test_reference_is_the_textbook_rotary(rand, interleaved):
    x = rand(2, 6, 3, 16, dtype=torch.float64).cpu()
    index = torch.arange(6, dtype=torch.int32).view(1, 6, 1)
    rotary = Rotary.of([rotary_table(6, 16)], index, interleaved=interleaved)
    found, _ = reference.qk_norm_rope(x, x, norm=None, rotary=rotary)
    for n in range(6):
        for j in range(8):
            a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + 8)
            angle = torch.tensor(n * 10000.0 ** (-2 * j / 16))
            turn = torch.polar(torch.ones(()), angle)
            wanted = torch.complex(x[:, n, :, a], x[:, n, :, b]) * turn
            both = torch.complex(found[:, n, :, a], found[:, n, :, b])
            torch.testing.assert_close(both, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_reference_is_pytorchs_norm(rand, norm):
    q, k, _, affine, _ = make(rand, 2, 5, 3, 16, norm, "none", torch.float64)
    found = reference.qk_norm_rope(q, k, **affine, **options(norm))
    kind, across, _ = NORMS[norm]
    for name, x, y in zip("qk", (q, k), found, strict=True):
        rows = x.flatten(2) if across else x
        weight, bias = affine.get(f"{name}_weight"), affine.get(f"{name}_bias")
        if kind == "layer":
            rows = F.layer_norm(rows, rows.shape[-1:], weight, bias, 1e-6)
        elif kind == "rms":
            rows = F.rms_norm(rows, rows.shape[-1:], weight, 1e-6)
        torch.testing.assert_close(y, rows.view(x.shape))


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("norm", NORMS)
def test_written_gradient_is_the_gradient(rand, norm, turn):
    q, k, douts, affine, rotary = make(rand, 2, 5, 3, 24, norm, turn, torch.float64)
    f = functools.partial(reference.qk_norm_rope, **options(norm, rotary))
    automatic = gradients(f, douts, q, k, affine)
    weights = {name: t for name, t in affine.items() if "weight" in name}
    dq, dk, *rows = reference.qk_norm_rope_backward(
        *douts, q, k, **weights, **options(norm, rotary)
    )
    named = dict(zip(("q_weight", "k_weight", "q_bias", "k_bias"), rows, strict=True))
    torch.testing.assert_close((dq, dk, *(named[name] for name in affine)), automatic)


# ---- what the op computes on this machine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("width", [40, 64])  # not all vectors divide the first
def test_cpu_rounds_no_worse_than_eager(within_budget, cpu_path, width, norm, turn, dtype):
    torch.manual_seed(0)
    inputs = make(lambda *s, dtype: torch.randn(s).to(dtype), 2, 37, 3, width, norm, turn, dtype)
    q, k, douts, affine, rotary = inputs
    check_budget(within_budget, OP, BACKWARD, q, k, douts, norm, affine, rotary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [40, 64])
@pytest.mark.parametrize("turn", ["three axes, partial", "halves of two axes, partial"])
@pytest.mark.parametrize("norm", ["rms per head", "layer across heads"])
def test_other_instruction_sets_round_no_worse(within_budget, vectors, norm, turn, width, dtype):
    torch.manual_seed(0)
    inputs = make(lambda *s, dtype: torch.randn(s).to(dtype), 2, 37, 3, width, norm, turn, dtype)
    q, k, douts, affine, rotary = inputs
    check_budget(within_budget, OP, BACKWARD, q, k, douts, norm, affine, rotary)


@pytest.mark.parametrize("turn", ["none", "three axes, partial", "halves"])
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm, turn):
    torch.manual_seed(0)

    def draw(*shape, dtype):
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    q, k, _, affine, rotary = make(draw, 2, 3, 2, 24, norm, turn, torch.float64)

    def f(q, k, *rows):
        named = dict(zip(affine, rows, strict=True))
        return qk_norm_rope(q, k, **named, **options(norm, rotary))

    assert torch.autograd.gradcheck(f, (q, k, *affine.values()), fast_mode=True)


def test_rows_behind_the_end_of_a_shorter_table_are_no_numbers(cpu_path):
    rows = torch.tensor([[1, 4], [2, 4]], dtype=torch.int32)[None]
    rotary = Rotary.of([rotary_table(2, 8), rotary_table(5, 8)], rows)
    turned, _ = qk_norm_rope(*torch.ones(2, 1, 2, 1, 24), norm=None, rotary=rotary)
    assert turned[0, 0].isfinite().all()
    assert turned[0, 1, 0, :8].isnan().all()
    assert turned[0, 1, 0, 8:].isfinite().all()


def test_position_zero_and_channels_behind_the_axes_are_not_turned(cpu_path):
    q, k = torch.randn(2, 1, 4, 2, 24)
    rotary = Rotary.of([rotary_table(5, 16)], torch.tensor([0, 1, 2, 0]).int().view(1, 4, 1))
    turned, _ = qk_norm_rope(q, k, norm=None, rotary=rotary)
    assert torch.equal(turned[:, [0, 3]], q[:, [0, 3]])
    assert torch.equal(turned[..., 16:], q[..., 16:])
    assert not torch.equal(turned[:, 1, :, :16], q[:, 1, :, :16])


def test_scores_depend_on_differences_of_positions(cpu_path):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 6, 2, 16)
    table = rotary_table(20, 16)
    scores = []
    for start in (0, 11):
        index = torch.arange(start, start + 6).int().view(1, 6, 1)
        a, b = qk_norm_rope(q, k, rotary=Rotary.of([table], index))
        scores.append(torch.einsum("bnhe,bmhe->bhnm", a, b))
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


def test_weights_may_be_one_tensor_and_results_may_go_unused(cpu_path):
    torch.manual_seed(0)
    q, k, w = torch.randn(1, 5, 2, 16), torch.randn(1, 5, 2, 16), torch.randn(16)

    def run(f):
        leaves = [t.clone().requires_grad_() for t in (q, w)]
        both = f(leaves[0], k, q_weight=leaves[1], k_weight=leaves[1])
        return torch.autograd.grad(both[0].sum(), leaves)

    torch.testing.assert_close(run(qk_norm_rope), run(reference.qk_norm_rope))


def test_a_turn_alone_keeps_nothing_for_the_backward():
    q, k = (torch.randn(1, 4, 2, 16, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        qk_norm_rope(q, k, norm=None, rotary=make_rotary("none", 1, 4))
    assert not kept
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        qk_norm_rope(q, k)
    assert kept == [q.shape, k.shape]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(0, 4, 2, 24), (2, 0, 2, 24), (2, 4, 0, 24)])
def test_empty(cpu_path, shape, norm):
    q, k, douts, affine, rotary = make(
        lambda *s, dtype: torch.zeros(s), *shape, norm, "three axes, partial"
    )
    f = functools.partial(qk_norm_rope, **options(norm, rotary))
    assert [y.shape for y in f(q, k, **affine)] == [shape, shape]
    found = gradients(f, douts, q, k, affine)
    assert [t.shape for t in found[2:]] == [t.shape for t in affine.values()]
    assert not any(t.any() for t in found)


def test_extreme_values_stay_finite(cpu_path):
    q = torch.stack([torch.full((64,), 7.0), torch.full((64,), 1e-20), torch.arange(64) * 1e15])
    q = q.view(1, 3, 1, 64)
    for norm in ("rms", "layer"):
        assert all(y.isfinite().all() for y in qk_norm_rope(q, q, norm=norm))
    q[0, 1] = torch.nan
    assert qk_norm_rope(q, q)[0].isnan().sum() == 64


@pytest.mark.usefixtures("poisoned")
def test_threads_do_not_change_the_bits(cpu_path):
    """Those of PyTorch are the same for one number of threads, ours for any."""
    torch.manual_seed(0)
    q, k, *douts = torch.randn(4, 2, 300, 3, 24)
    affine = {name: torch.randn(72) for name in ("q_weight", "k_weight", "q_bias", "k_bias")}
    f = functools.partial(qk_norm_rope, **options(HARDEST[0], make_rotary(HARDEST[1], 2, 300)))
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            found.append(gradients(f, douts, q, k, affine))
    finally:
        torch.set_num_threads(threads)
    pairs = zip(found[0], found[1], strict=True) if cpu_path == "compiled" else ()
    for a, b in (*pairs, *zip(found[1], found[2], strict=True)):
        assert torch.equal(a, b)


def test_path_is_logged_once(cpu_path, caplog):
    paths.announce.cache_clear()
    q = torch.ones(1, 2, 1, 16)
    with caplog.at_level(logging.DEBUG, "fastvid.kernels"):
        for _ in range(3):
            qk_norm_rope(q, q)
    name = {"compiled": "C++", "pytorch": "PyTorch"}[cpu_path]
    assert [record.getMessage() for record in caplog.records] == [f"qk_norm_rope: {name}"]


# ---- inside PyTorch


@pytest.mark.parametrize(("norm", "turn"), [HARDEST, ("rms per head", "halves"), ("none", "none")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(cpu_path, rand, norm, turn, dtype):
    q, k, douts, affine, rotary = make(rand, 2, 4, 2, 24, norm, turn, dtype)
    torch.library.opcheck(BACKWARD, (*douts, q, k, *arguments(norm, affine, rotary)))
    affine = {name: t.requires_grad_() for name, t in affine.items()}
    inputs = q.requires_grad_(), k.requires_grad_(), *arguments(norm, affine, rotary)
    torch.library.opcheck(OP, inputs)


@pytest.mark.parametrize(("norm", "turn"), [HARDEST, ("rms per head", "halves")])
def test_compiles_once_for_all_sizes(rand, norm, turn):
    torch._dynamo.reset()
    step = torch.compile(qk_norm_rope, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, N in ((2, 10), (3, 30)):
            q, k, douts, affine, rotary = make(rand, B, N, 3, 24, norm, turn)
            f, g = (functools.partial(f, **options(norm, rotary)) for f in (step, qk_norm_rope))
            found = gradients(f, douts, q, k, affine)
            torch.testing.assert_close(found, gradients(g, douts, q, k, affine))


def test_exports_with_free_sizes(rand):
    class Module(torch.nn.Module):
        def forward(self, q, k, weight, rotary):
            return qk_norm_rope(q, k, q_weight=weight, rotary=rotary)

    def example(B, N):
        q, k, _, affine, rotary = make(rand, B, N, 2, 24, "rms per head", "three axes, partial")
        return q, k, affine["q_weight"], rotary

    B, N = torch.export.Dim("B", min=2), torch.export.Dim("N", min=2)
    tokens = {0: B, 1: N}
    free = (tokens, tokens, None, Rotary(None, None, tokens, (None,) * 3, None))
    exported = torch.export.export(Module(), example(2, 4), dynamic_shapes=free).module()
    other = example(3, 7)
    torch.testing.assert_close(exported(*other), Module()(*other))


def test_meta_tensors_pass_through():
    q = torch.empty(2, 4, 2, 16, device="meta", requires_grad=True)
    weight = torch.empty(16, device="meta", requires_grad=True)
    a, b = qk_norm_rope(q, q, q_weight=weight, k_weight=weight)
    (a + b).sum().backward()
    assert (a.device.type, a.shape, q.grad.shape) == ("meta", q.shape, q.shape)
    assert weight.grad.shape == weight.shape


def test_activation_checkpointing(rand):
    q, k, douts, affine, rotary = make(rand, 2, 5, 3, 24, *HARDEST)
    f = functools.partial(qk_norm_rope, **options(HARDEST[0], rotary))
    kept = gradients(f, douts, q, k, affine)
    again = gradients(
        lambda *a, **b: checkpoint(f, *a, use_reentrant=False, **b), douts, q, k, affine
    )
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_second_derivative_is_refused():
    q = torch.randn(1, 2, 1, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(qk_norm_rope(q, q)[0].square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="qk_norm_rope has no second derivative"):
        grad.sum().backward()


# ---- refusals

Q, W = torch.zeros(2, 4, 3, 16), torch.zeros(16)
INDEX = torch.zeros(1, 4, 1, dtype=torch.int32)
ROTARY = Rotary.of([rotary_table(3, 8)], INDEX)
FOUR_AXES = Rotary(*rotary_table(3, 8), INDEX.expand(-1, -1, 4), (2, 2, 2, 2))


@pytest.mark.parametrize(
    ("q", "k", "given", "error", "says"),
    [
        (Q[0], Q, {}, ValueError, r"q must be \(B, N, heads, E\), got \(4, 3, 16\)"),
        (Q, None, {}, TypeError, "k must be a Tensor, got NoneType"),
        (Q, Q[:, :3], {}, ValueError, r"k must be .*N=4.*got \(2, 3, 3, 16\)"),
        (Q, Q.half(), {}, TypeError, "k must have the dtype of q.*float16"),
        (Q.long(), Q, {}, TypeError, "q must be float32.*int64"),
        (Q, Q.to("meta"), {}, ValueError, "k must be on the device of q, cpu, got meta"),
        (Q[..., :12], Q[..., :12], {}, NotImplementedError, "E=12"),
        (Q[..., :8], Q[..., :8], {}, NotImplementedError, "E=8"),
        (*[torch.zeros(1, 1, 1, 264)] * 2, {}, NotImplementedError, "E=264"),
        (*[torch.zeros(1, 1, 33, 256)] * 2, {}, NotImplementedError, r"8192, got 33 \* 256"),
        (Q, Q, {"norm": "batch"}, ValueError, 'norm must be "rms", "layer" or None.*batch'),
        (Q, Q, {"norm": None, "k_weight": W}, ValueError, "k_weight must be None without a norm"),
        (Q, Q, {"q_weight": W[:8]}, ValueError, r"q_weight must be \(E\).*E=16.*got \(8,\)"),
        (
            Q,
            Q,
            {"q_weight": W, "across_heads": True},
            ValueError,
            r"q_weight must be \(width\), width=48",
        ),
        (Q, Q, {"k_bias": W.long()}, TypeError, "k_bias must be float32.*int64"),
        (Q, Q, {"k_bias": W.to("meta")}, ValueError, "k_bias must be on the device of q"),
        (Q, Q, {"rotary": (W, W)}, TypeError, "rotary must be a Rotary, got tuple"),
        (
            Q,
            Q,
            {"rotary": ROTARY._replace(rows=INDEX[:, :3])},
            ValueError,
            r"rotary.rows must be \(B\|1, N, 1\).*N=4.*\(1, 3, 1\)",
        ),
        (Q, Q, {"rotary": ROTARY._replace(dims=(24,))}, ValueError, "no more than E=16.*24"),
        (Q, Q, {"rotary": ROTARY._replace(dims=(7,))}, ValueError, "even and positive.*7"),
        (Q, Q, {"rotary": FOUR_AXES}, ValueError, "rotary.dims must be of 1 to 3 axes, got 4"),
        (Q, Q, {"rotary": ROTARY._replace(dims=())}, ValueError, "1 to 3 axes, got 0"),
        (
            Q,
            Q,
            {"rotary": ROTARY._replace(rows=INDEX + 3)},
            ValueError,
            r"rows must be in \[0, 3\)",
        ),
        (Q, Q, {"rotary": ROTARY._replace(rows=INDEX - 9)}, ValueError, r"got -9 to -\d"),
    ],
)
def test_refuses(cpu_path, q, k, given, error, says):
    with pytest.raises(error, match=says):
        qk_norm_rope(q, k, **given)


@pytest.mark.parametrize(
    ("tables", "index", "error", "says"),
    [
        ([], INDEX, ValueError, "tables must be of 1 to 3 axes, got 0"),
        ([(W, W)], INDEX, ValueError, r"tables\[0\]\[0\] must be \(length, pairs\)"),
        ([(Q[0, 0], Q[0, 0, :2])], INDEX, ValueError, r"tables\[0\]\[1\] must be .*length=3"),
        ([rotary_table(3, 8)], INDEX.long(), TypeError, "rows must be int32, got torch.int64"),
        ([rotary_table(3, 8)] * 2, INDEX, ValueError, r"rows must be \(B\|1, N, 2\)"),
        ([rotary_table(3, 8)], INDEX.to("meta"), ValueError, "rotary.cos must be on the device"),
    ],
)
def test_positions_are_refused(tables, index, error, says):
    with pytest.raises(error, match=says):
        Rotary.of(tables, index)


@pytest.mark.parametrize(
    ("positions", "dim", "says"), [(4, 3, "dim must be even"), (torch.zeros(2, 2), 4, "positions")]
)
def test_tables_are_refused(positions, dim, says):
    with pytest.raises(ValueError, match=says):
        rotary_table(positions, dim)
