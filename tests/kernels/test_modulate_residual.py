"""The promises of `gated_residual` and `gated_residual_norm_modulate`."""

import pytest
import torch
import torch.nn.functional as F

from fastvid.functional import gated_residual, gated_residual_norm_modulate, norm_modulate
from fastvid.kernels.modulate import reference
from tests.kernels.modulate_cases import GRANULARITIES, LAYOUTS, modulation_shape

BOTH = torch.ops.fastvid.gated_residual_norm_modulate.default
BOTH_BACKWARD = torch.ops.fastvid.gated_residual_norm_modulate_backward.default
ADD = torch.ops.fastvid.gated_residual.default
ADD_BACKWARD = torch.ops.fastvid.gated_residual_backward.default
NAMES = "total", "y", "dx", "dh", "dgate", "dshift", "dscale"


def eager(x, h, gate, shift, scale, rms=False):
    """What users write today, in the dtype of its arguments."""
    total = x + reference.per_token(gate, x) * h
    normed = (F.rms_norm if rms else F.layer_norm)(total, x.shape[-1:], eps=1e-6)
    return total, normed * (1 + reference.per_token(scale, x)) + reference.per_token(shift, x)


def drawn(B, N, D, granularity, dtype=torch.float32, shared=False):
    """x, h, gate, shift, scale and the gradients of the two results."""
    torch.manual_seed(0)
    x, h, dsum, dy = torch.randn(4, B, N, D).to(dtype)
    gate = torch.randn(modulation_shape(B, N, D, granularity)).to(dtype)
    rows = modulation_shape(1 if shared else B, N, D, granularity)
    shift, scale = torch.randn(2, *rows).to(dtype)
    return (x, h, gate, shift, scale), (dsum, dy)


def results(f, inputs, grads):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    found = f(*leaves)
    return *found, *torch.autograd.grad(found, leaves, grads)


def check_budget(within_budget, inputs, grads, rms=False):
    """Hold `gated_residual_norm_modulate` and its gradients to float64."""
    found = results(lambda *a: gated_residual_norm_modulate(*a, rms=rms), inputs, grads)
    plain = results(lambda *a: eager(*a, rms), inputs, grads)
    exact = results(
        lambda *a: reference.gated_residual_norm_modulate(*a, rms=rms),
        [tensor.double() for tensor in inputs],
        [grad.double() for grad in grads],
    )
    for name, *triple in zip(NAMES, found, plain, exact, strict=True):
        within_budget(*triple, name)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_written_gradient_is_the_gradient(granularity, rms):
    inputs, grads = drawn(2, 6, 8, granularity, torch.float64, shared=True)

    def f(*inputs):
        return reference.gated_residual_norm_modulate(*inputs, rms=rms)

    _, h, gate, _, scale = inputs
    total, _, *automatic = results(f, inputs, grads)
    written = reference.gated_residual_norm_modulate_backward(
        *grads, total.detach(), h, gate, scale, rms=rms
    )
    torch.testing.assert_close(list(written), automatic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("B", "N", "D", "shared"), [(2, 192, 96, False), (3, 39, 72, True)])
def test_cpu_rounds_no_worse_than_eager(
    within_budget, cpu_path, B, N, D, shared, granularity, rms, dtype
):
    check_budget(within_budget, *drawn(B, N, D, granularity, dtype, shared), rms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rms", [False, True])
def test_other_instruction_sets_round_no_worse(within_budget, vectors, rms, dtype):
    check_budget(within_budget, *drawn(3, 39, 70, "frame", dtype), rms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sum_alone_rounds_no_worse_than_eager(within_budget, cpu_path, granularity, dtype):
    (x, h, gate, _, _), (dsum, _) = drawn(2, 39, 72, granularity, dtype)
    found, plain, exact = (
        results(lambda *a, f=f: (f(*a),), [t.to(kind) for t in (x, h, gate)], [dsum.to(kind)])
        for f, kind in (
            (gated_residual, dtype),
            (lambda x, h, gate: x + reference.per_token(gate, x) * h, dtype),
            (reference.gated_residual, torch.float64),
        )
    )
    for name, *triple in zip(("total", "dx", "dh", "dgate"), found, plain, exact, strict=True):
        within_budget(*triple, name)


@pytest.mark.parametrize("gated", [False, True])
def test_norm_is_that_of_the_sum_returned(cpu_path, gated):
    (x, h, gate, shift, scale), _ = drawn(2, 37, 72, "sample", torch.bfloat16)
    total, y = gated_residual_norm_modulate(x, h, gate if gated else None, shift, scale)
    assert torch.equal(y, norm_modulate(total, shift, scale))
    if not gated:
        assert torch.equal(total, x + h)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_no_gate_is_a_gate_of_one(cpu_path, granularity):
    (x, h, gate, shift, scale), grads = drawn(2, 12, 40, granularity)
    one = torch.ones_like(gate)
    found = results(
        lambda x, h, *a: gated_residual_norm_modulate(x, h, None, *a), (x, h, shift, scale), grads
    )
    wanted = results(
        lambda x, h, *a: gated_residual_norm_modulate(x, h, one, *a), (x, h, shift, scale), grads
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_any_strides(cpu_path, layout):
    (x, h, *rows), grads = drawn(2, 6, 24, "frame")
    x, h, *grads = (LAYOUTS[layout](tensor) for tensor in (x, h, *grads))
    total, y = gated_residual_norm_modulate(x, h, *rows)
    packed = gated_residual_norm_modulate(x.contiguous(), h.contiguous(), *rows)
    torch.testing.assert_close((total, y), packed)
    _, _, mean, rstd = BOTH(x, h, *rows, None, False, 1e-6, x.dtype)
    found = BOTH_BACKWARD(*grads, total, h, rows[0], rows[2], None, mean, rstd, False)
    dense = [tensor.contiguous() for tensor in (*grads, total, h)]
    wanted = BOTH_BACKWARD(*dense, rows[0], rows[2], None, mean, rstd, False)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck(gated):
    inputs, _ = drawn(2, 6, 8, "frame", torch.float64)
    inputs = [tensor.requires_grad_() for tensor in inputs if gated or tensor is not inputs[2]]

    def f(x, h, *rows):
        return gated_residual_norm_modulate(x, h, *(rows if gated else (None, *rows)))

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    if gated:
        assert torch.autograd.gradcheck(gated_residual, inputs[:3], fast_mode=True)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_opcheck(cpu_path, granularity, gated):
    (x, h, gate, shift, scale), (dsum, dy) = drawn(2, 6, 40, granularity)
    gate = gate if gated else None
    leaves = [t if t is None else t.clone().requires_grad_() for t in (x, h, gate, shift, scale)]
    torch.library.opcheck(BOTH, (*leaves, None, False, 1e-6, x.dtype))
    total, _, *stats = BOTH(x, h, gate, shift, scale, None, False, 1e-6, x.dtype)
    kept = h if gated else None
    torch.library.opcheck(BOTH_BACKWARD, (dsum, dy, total, kept, gate, scale, None, *stats, False))
    if gated:
        torch.library.opcheck(ADD, (*leaves[:3], None))
        torch.library.opcheck(ADD_BACKWARD, (dsum, h, gate, None))


def test_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    step = torch.compile(
        gated_residual_norm_modulate, backend="aot_eager", fullgraph=True, dynamic=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, N in ((2, 12), (3, 30)):
            inputs, grads = drawn(B, N, 16, "frame")
            found = results(step, inputs, grads)
            torch.testing.assert_close(found, results(gated_residual_norm_modulate, inputs, grads))


def test_exports_with_free_sizes():
    class Module(torch.nn.Module):
        def forward(self, x, h, gate, shift, scale):
            return gated_residual_norm_modulate(x, gated_residual(x, h, gate), gate, shift, scale)

    B, N = torch.export.Dim("B", min=2), torch.export.Dim("N", min=2)
    shapes = {name: {0: B, 1: N} for name in "xh"}
    shapes |= {name: {0: B} for name in ("gate", "shift", "scale")}
    example, other = drawn(2, 6, 16, "sample")[0], drawn(5, 9, 16, "sample")[0]
    exported = torch.export.export(Module(), example, dynamic_shapes=shapes).module()
    torch.testing.assert_close(exported(*other), Module()(*other))


def test_autocast_keeps_the_stream_wide(cpu_path):
    (x, h, gate, shift, scale), _ = drawn(2, 6, 64, "sample")
    h, gate, shift, scale = (t.bfloat16() for t in (h, gate, shift, scale))
    with torch.autocast("cpu", torch.bfloat16):
        total, y = gated_residual_norm_modulate(x, h, gate, shift, scale)
    assert (total.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    exact = x.double() + gate.double()[:, None] * h.double()
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_empty(cpu_path, shape, granularity):
    x = torch.zeros(shape, requires_grad=True)
    s = torch.zeros(modulation_shape(*shape, granularity, 2), requires_grad=True)
    for total in (gated_residual(x, x, s), *gated_residual_norm_modulate(x, x, s, s, s)):
        (gradient,) = torch.autograd.grad(total.sum(), s, allow_unused=True, retain_graph=True)
        assert total.shape == shape
        assert gradient.shape == s.shape
        assert not gradient.any()


def test_backward_repeats_its_bits_on_any_threads():
    inputs, grads = drawn(2, 300, 96, "frame", shared=True)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            found.append(results(gated_residual_norm_modulate, inputs, grads))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


X, S = torch.zeros(2, 6, 8), torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((X, X[:, :5], S, S, S), ValueError, r"h must be \(B, N, D\), .*got \(2, 5, 8\)"),
        ((X, None, S, S, S), TypeError, "h must be a Tensor, got NoneType"),
        ((X, X.long(), S, S, S), TypeError, "h must be float32.*got torch.int64"),
        ((X, X.to("meta"), S, S, S), ValueError, "h must be on the device of x"),
        ((X, X, S[:, :7], S, S), ValueError, r"gate must be \(B\|1, D\), .*got \(2, 7\)"),
        ((X, X, X[:, :3], S, S), ValueError, r"gate must have the rows of shift, \(2, 8\)"),
        ((X, X, X[:, :4], X[:, :3], X[:, :3]), ValueError, "gate must have a number of frames T"),
        ((X, X, S.long(), S, S), TypeError, "gate must be float32.*got torch.int64"),
        ((X, X, S, S, S[:1]), ValueError, "shift and scale must agree"),
    ],
)
def test_refuses(arguments, error, says):
    with pytest.raises(error, match=says):
        gated_residual_norm_modulate(*arguments)


@pytest.mark.parametrize("f", [gated_residual, gated_residual_norm_modulate])
def test_second_derivative_is_refused(f):
    x = torch.randn(2, 6, 8, requires_grad=True)
    rows = (x[:, 0],) * (1 if f is gated_residual else 3)
    found = f(x, x * 2, *rows)
    total = found if f is gated_residual else found[1]
    (dx,) = torch.autograd.grad(total.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        dx.square().sum().backward()


# ---- the Triton kernels


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "granularity", "shared", "rms", "gated"),
    [
        ((2, 18, 40), "sample", False, False, True),
        ((2, 37, 72), "sample", True, True, True),  # shared by the batch, a ragged last block
        ((2, 15, 600), "frame", False, False, False),
        ((2, 6, 40), "token", False, False, True),
    ],
)
def test_kernel_rounds_no_worse_than_eager(
    within_budget, guard_bands, rand, shape, granularity, shared, rms, gated, dtype
):
    from fastvid.kernels.modulate import residual

    inputs, grads = drawn(*shape, granularity, dtype, shared)
    x, h, gate, shift, scale = (tensor.to(rand(1).device) for tensor in inputs)
    dsum, dy = (grad.to(x.device) for grad in grads)
    gate = gate if gated else torch.ones_like(gate)
    handed = gate if gated else None
    total, y, *stats = residual.launch_forward(x, h, handed, shift, scale, rms, 1e-6, dtype)
    kept = h if gated else None
    found = residual.launch_backward(dsum, dy, total, kept, handed, scale, *stats, rms)
    again = residual.launch_backward(dsum, dy, total, kept, handed, scale, *stats, rms)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    guard_bands()
    inputs, grads = (x, h, gate, shift, scale), (dsum, dy)
    plain = results(lambda *a: eager(*a, rms), inputs, grads)
    exact = results(
        lambda *a: reference.gated_residual_norm_modulate(*a, rms=rms),
        [tensor.double() for tensor in inputs],
        [grad.double() for grad in grads],
    )
    for name, ours, *pair in zip(NAMES, (total, y, *found), plain, exact, strict=True):
        if gated or name not in ("dh", "dgate"):
            within_budget(ours, *pair, name)
    if gated:
        halves = residual.launch_residual_backward(dsum, h, gate)
        wanted = reference.gated_residual_backward(dsum.double(), h.double(), gate.double())
        for ours, exactly in zip(halves, wanted, strict=True):
            room = 4 * torch.finfo(dtype).eps * exactly.abs().max()
            assert (ours.double() - exactly).abs().max() <= room


def test_one_compilation_serves_every_batch_and_length(compilations):
    printed = compilations("""
from fastvid.kernels.modulate import residual
for B, N in ((1, 64), (2, 99), (3, 7)):
    x, s = torch.zeros(B, N, 64), torch.zeros(B, 128)[:, :64]
    rows = residual.launch_forward(x, x, s, s, s, False, 1e-6, torch.float32)[2:]
    residual.launch_backward(x, x, x, x, s, s, *rows, False)
print(len(residual._forward.device_caches), count(residual._forward), count(residual._backward))
""")
    assert printed.split() == ["1", "1", "1"]


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gpu_bf16_at_real_sizes(within_budget, granularity):
    inputs, grads = drawn(2, 3072, 1152, granularity, torch.bfloat16)
    inputs, grads = ([t.cuda() for t in tensors] for tensors in (inputs, grads))
    check_budget(within_budget, inputs, grads)
