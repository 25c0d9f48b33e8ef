"""Frames of unequal length: rows of modulation per frame in the three ops of `modulate`."""

import functools

import pytest
import torch
from torch.nn.functional import layer_norm, pad

from fastvid.functional import (
    FrameLayout,
    gated_residual,
    gated_residual_norm_modulate,
    norm_modulate,
)
from fastvid.kernels._shared import native
from fastvid.kernels.modulate import op as room
from fastvid.kernels.modulate import reference
from tests.kernels.modulate_cases import eager

D = 40
# Tokens of each frame; the last of a sample may own none, and 2 of 14 belong to no frame.
LAYOUTS = {
    "pyramid": [1, 2, 2, 7],
    "empty frames": [0, 5, 0, 7],
    "equal": [3, 3, 3, 3],
    "by sample": [[1, 2, 2, 7], [4, 0, 8, 2]],
}
N = 14


def drawn(dtype=torch.float32, shared=False, B=2, width=D):
    """x, h, gate, shift, scale and the gradients of the sum and of its norm."""
    torch.manual_seed(0)
    x, h, dsum, dy = torch.randn(4, B, N, width).to(dtype)
    rows = torch.randn(3, 1 if shared else B, 4, width).to(dtype)
    return (x, h, *rows), (dsum, dy)


def results(f, inputs, grads):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    found = f(*leaves)
    return *found, *torch.autograd.grad(found, leaves, grads)


def calls(inputs, grads):
    """Of each op of the room: what it takes, and the gradients of its results."""
    x, h, gate, shift, scale = inputs
    return {
        "norm": ((x, shift, scale), grads[1:]),
        "sum": ((x, h, gate), grads[:1]),
        "both": (inputs, grads),
    }


def ours(op, layout, rms=False):
    return {
        "norm": lambda *a: (norm_modulate(*a, frames=layout, rms=rms),),
        "sum": lambda *a: (gated_residual(*a, frames=layout),),
        "both": functools.partial(gated_residual_norm_modulate, frames=layout, rms=rms),
    }[op]


def starts_of(layout, tokens=N):
    return torch.cat([layout.offsets, torch.full_like(layout.offsets[:, :1], tokens)], 1)


def spelled_out(op, layout, rms=False, norm=eager):
    """The op with a row for every token, zeros for those of no frame."""

    def spread(row, x):
        return reference.per_token(pad(row, (0, 0, 0, 1)), x, starts_of(layout, x.shape[1]))

    def norm_alone(x, shift, scale):
        return (norm(x, spread(shift, x), spread(scale, x), rms=rms),)

    def sum_alone(x, h, gate):
        return (x + spread(gate, x) * h,)

    def both(x, h, gate, shift, scale):
        (total,) = sum_alone(x, h, gate)
        return total, *norm_alone(total, shift, scale)

    return {"norm": norm_alone, "sum": sum_alone, "both": both}[op]


def check_budget(within_budget, f, op, layout, rms, inputs, grads):
    wide = [t.double() for t in inputs], [t.double() for t in grads]
    exact = spelled_out(op, layout, rms, reference.norm_modulate)
    triples = zip(
        results(f, inputs, grads),
        results(spelled_out(op, layout, rms), inputs, grads),
        results(exact, *wide),
        strict=True,
    )
    for triple in triples:
        within_budget(*triple)


# ---- the definition


@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_every_token_takes_the_row_of_its_frame(lengths):
    layout = FrameLayout(lengths)
    rows = torch.arange(5.0).view(1, 5, 1)
    found = reference.per_token(rows, torch.zeros(2, N, 1), starts_of(layout))
    for b, own in enumerate(layout.host * (2 // len(layout.host))):
        wanted = [frame for frame, length in enumerate(own) for _ in range(length)]
        assert found[b, :, 0].tolist() == wanted + [4] * (N - len(wanted))


# ---- on this machine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_cpu_rounds_no_worse_than_eager(within_budget, cpu_path, lengths, shared, rms, dtype):
    layout = FrameLayout(lengths)
    for op, given in calls(*drawn(dtype, shared)).items():
        check_budget(within_budget, ours(op, layout, rms), op, layout, rms, *given)


def test_equal_frames_need_no_layout(cpu_path):
    (x, h, *rows), grads = drawn()
    inputs, grads = (x[:, :12], h[:, :12], *rows), [grad[:, :12] for grad in grads]
    for op, given in calls(inputs, grads).items():
        found = results(ours(op, FrameLayout([3] * 4)), *given)
        torch.testing.assert_close(found, results(ours(op, None), *given))


def test_tokens_of_no_frame_keep_their_norm(cpu_path):
    (x, h, *rows), _ = drawn()
    total, y = gated_residual_norm_modulate(x, h, *rows, frames=FrameLayout([4, 0, 4, 2]))
    assert torch.equal(total[:, 10:], x[:, 10:])
    torch.testing.assert_close(y[:, 10:], layer_norm(x[:, 10:], (D,), eps=1e-6))


def test_no_gate_is_a_gate_of_one(cpu_path):
    (x, h, gate, shift, scale), grads = drawn()
    layout = FrameLayout([1, 2, 2, 9])
    f = functools.partial(gated_residual_norm_modulate, frames=layout)
    one = torch.ones_like(gate)
    found = results(lambda x, h, *a: f(x, h, None, *a), (x, h, shift, scale), grads)
    wanted = results(lambda x, h, *a: f(x, h, one, *a), (x, h, shift, scale), grads)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("op", ["norm", "sum", "both"])
def test_gradcheck(op):
    given, _ = calls(*drawn(torch.float64, width=8))[op]
    leaves = [tensor.requires_grad_() for tensor in given]
    f = ours(op, FrameLayout(LAYOUTS["by sample"]))
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


def test_opcheck(cpu_path):
    (x, h, gate, shift, scale), (dsum, dy) = drawn()
    starts = starts_of(FrameLayout([[1, 2, 11], [4, 8, 2]]))
    ops = torch.ops.fastvid
    torch.library.opcheck(
        ops.norm_modulate.default, (x, shift, scale, starts, False, 1e-6, x.dtype)
    )
    rule = gate, shift, scale, starts, False, 1e-6, x.dtype
    both = ops.gated_residual_norm_modulate
    torch.library.opcheck(both.default, (x, h, *rule))
    total, _, *stats = both(x, h, *rule)
    backward = ops.gated_residual_norm_modulate_backward.default
    torch.library.opcheck(backward, (dsum, dy, total, h, gate, scale, starts, *stats, False))
    torch.library.opcheck(ops.gated_residual.default, (x, h, gate, starts))
    torch.library.opcheck(ops.gated_residual_backward.default, (dsum, h, gate, starts))


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    step = torch.compile(
        gated_residual_norm_modulate, backend="aot_eager", fullgraph=True, dynamic=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths, B in (([1, 2, 2, 7], 2), ([[4, 0, 8, 2]] * 3, 3)):
            inputs, grads = drawn(B=B)
            layout = FrameLayout(torch.tensor(lengths).expand(B, -1))
            found = results(functools.partial(step, frames=layout), inputs, grads)
            torch.testing.assert_close(found, results(ours("both", layout), inputs, grads))


def test_bits_repeat_on_any_threads():
    x, h = torch.randn(2, 2, 300, 96)
    rows, grads = torch.randn(3, 1, 3, 96), torch.randn(2, 2, 300, 96)
    layout = FrameLayout([[10, 90, 200], [150, 0, 140]])
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            found.append(results(ours("both", layout), (x, h, *rows), tuple(grads)))
    finally:
        torch.set_num_threads(threads)
    pairs = [found[1:]] if not native.loaded() else [found[:2], found[1:]]
    for first, second in pairs:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


X, S = torch.zeros(2, N, 8), torch.zeros(2, 4, 8)


@pytest.mark.parametrize(
    ("rows", "frames", "error", "says"),
    [
        (S, [3, 3, 3, 3], TypeError, "frames must be a FrameLayout, got list"),
        (S, FrameLayout([7, 7]), ValueError, r"frames.lengths must be \(B\|1, T\), .*T=4"),
        (S, FrameLayout([[3] * 4] * 3), ValueError, r"frames.lengths must be .*B=2.*\(3, 4\)"),
        (S, FrameLayout([4] * 4), ValueError, "frames must own at most N=14 tokens, got 16"),
        (S[:, 0], FrameLayout([3] * 4), ValueError, r"shift must be \(B\|1, T, D\).*\(2, 8\)"),
        (S, FrameLayout([3] * 4, "meta"), ValueError, "frames must be on the device of x, cpu"),
    ],
)
def test_refuses(rows, frames, error, says):
    with pytest.raises(error, match=says):
        norm_modulate(X, rows, rows, frames=frames)
    with pytest.raises(error, match=says.replace("shift", "gate")):
        gated_residual(X, X, rows, frames=frames)


# ---- the Triton kernels


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "shared", "rms"),
    [
        (LAYOUTS["pyramid"], False, False),
        (LAYOUTS["empty frames"], True, True),
        (LAYOUTS["by sample"], False, True),
        (LAYOUTS["by sample"], True, False),
    ],
)
def test_kernels_round_no_worse_than_eager(
    within_budget, guard_bands, monkeypatch, lengths, shared, rms, dtype
):
    layout = FrameLayout(lengths)
    monkeypatch.setattr(room, "_cpu_path", lambda *_: Launches)
    for name, given in calls(*drawn(dtype, shared)).items():
        check_budget(within_budget, ours(name, layout, rms), name, layout, rms, *given)
    guard_bands()


class Launches:
    """The launchers in the place of a CPU path."""

    @staticmethod
    def forward(x, h, gate, shift, scale, starts, rms, eps, dtype):
        from fastvid.kernels.modulate import kernel, residual

        if h is None:
            return None, *kernel.launch_forward(x, shift, scale, rms, eps, dtype, starts)
        return residual.launch_forward(x, h, gate, shift, scale, rms, eps, dtype, starts)

    @staticmethod
    def backward(dsum, dy, total, h, gate, scale, starts, mean, rstd, rms):
        from fastvid.kernels.modulate import kernel, residual

        if dsum is None:
            dx, *rows = kernel.launch_backward(dy, total, scale, mean, rstd, rms, starts)
            return dx, None, None, *rows
        return residual.launch_backward(dsum, dy, total, h, gate, scale, mean, rstd, rms, starts)

    @staticmethod
    def add_backward(dsum, h, gate, starts):
        from fastvid.kernels.modulate import residual

        return residual.launch_residual_backward(dsum, h, gate, starts)


def test_one_compilation_serves_every_layout(compilations):
    printed = compilations("""
from fastvid.kernels.modulate import kernel, residual
for starts in ([[0, 3, 9, 64]], [[0, 0, 5, 64], [0, 7, 64, 64]]):
    starts = torch.tensor(starts, dtype=torch.int32)
    x, s = torch.zeros(2, 64, 64), torch.zeros(2, 3, 64)
    rows = kernel.launch_forward(x, s, s, False, 1e-6, torch.float32, starts)[1:]
    kernel.launch_backward(x, x, s, *rows, False, starts)
    residual.launch_forward(x, x, s, s, s, False, 1e-6, torch.float32, starts)
    residual.launch_backward(x, x, x, x, s, s, *rows, False, starts)
print(*map(count, (kernel._forward, kernel._backward, residual._forward, residual._backward)))
""")
    assert printed.split() == ["1"] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[256, 256, 1024, 4096], [[1000, 0, 4000, 96]] * 2])
def test_gpu_bf16_at_real_sizes(within_budget, lengths):
    layout = FrameLayout(torch.tensor(lengths, device="cuda"))
    B, tokens, width = 2, int(layout.offsets[:, -1].max()) + 8, 1152
    torch.manual_seed(0)
    x, h, dsum, dy = torch.randn(4, B, tokens, width, device="cuda").bfloat16()
    rows = torch.randn(3, B, 4, width, device="cuda").bfloat16()
    for name, given in calls((x, h, *rows), (dsum, dy)).items():
        check_budget(within_budget, ours(name, layout), name, layout, False, *given)
