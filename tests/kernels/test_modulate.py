"""The promises of `norm_modulate`. Without a GPU its Triton kernels run in the interpreter."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastvid.functional import norm_modulate
from fastvid.kernels._shared import paths
from fastvid.kernels.modulate import reference
from tests.kernels.modulate_cases import (
    BACKWARD,
    GRANULARITIES,
    LAYOUTS,
    OP,
    check_budget,
    eager,
    gradients,
    modulation_shape,
)

# ---- the reference, and what the op computes on this machine


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shape", [(2, 8), (1, 8), (2, 3, 8), (1, 3, 8), (2, 6, 8)])
def test_written_gradient_is_the_gradient(rand, shape, rms):
    x, shift, scale = (rand(*s, dtype=torch.float64) for s in ((2, 6, 8), shape, shape))
    dy = rand(2, 6, 8, dtype=torch.float64)
    automatic = gradients(lambda *a: reference.norm_modulate(*a, rms=rms), dy, x, shift, scale)
    written = reference.norm_modulate_backward(dy, x, scale, rms=rms)
    torch.testing.assert_close(written, automatic)


@pytest.mark.parametrize("rms", [False, True])
def test_reference_is_pytorchs_norm(rand, rms):
    x, zero = rand(2, 5, 16, dtype=torch.float64), torch.zeros(2, 16, dtype=torch.float64)
    norm = F.rms_norm if rms else F.layer_norm
    x = x.cpu()
    torch.testing.assert_close(
        reference.norm_modulate(x, zero, zero, rms=rms), norm(x, (16,), eps=1e-6)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("B", "N", "D"), [(2, 192, 384), (3, 39, 72)])
def test_cpu_rounds_no_worse_than_eager(within_budget, cpu_path, B, N, D, granularity, rms, dtype):
    torch.manual_seed(0)
    shape = modulation_shape(B, N, D, granularity)
    x, dy = torch.randn(2, B, N, D).to(dtype)
    shift, scale = torch.randn(2, *shape).to(dtype)
    check_budget(
        within_budget,
        lambda *a: OP(*a, None, rms, 1e-6, dtype),
        lambda dy, x, scale, *a: BACKWARD(dy, x, scale, None, *a, rms),
        x, shift, scale, dy, rms,
    )  # fmt: skip


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shape", [(2, 8), (1, 8), (2, 3, 8), (1, 3, 8), (2, 6, 8)])
def test_gradcheck(shape, rms):
    torch.manual_seed(0)
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((2, 6, 8), shape, shape)]
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: norm_modulate(*a, rms=rms), inputs, fast_mode=True)


def test_shift_and_scale_may_be_one_tensor(rand, cpu_path):
    x, both, dy = rand(2, 6, 8).cpu(), rand(2, 8).cpu(), rand(2, 6, 8).cpu()
    wanted = gradients(lambda x, t: eager(x, t, t, False), dy, x, both)
    for f in (norm_modulate, torch.compile(norm_modulate, backend="aot_eager", fullgraph=True)):
        found = gradients(lambda x, t, f=f: f(x, t, t), dy, x, both)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_empty(cpu_path, shape, granularity):
    x = torch.zeros(shape, requires_grad=True)
    s = torch.zeros(modulation_shape(*shape, granularity, 2), requires_grad=True)
    y = norm_modulate(x, s, s)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert s.grad.shape == s.shape
    assert not s.grad.any()


def test_extreme_values_stay_finite(cpu_path):
    x = torch.stack([torch.full((64,), 7.0), torch.full((64,), 1e-20), torch.arange(64) * 1e15])
    y = norm_modulate(x[None], torch.zeros(1, 64), torch.zeros(1, 64))
    assert y.isfinite().all()
    assert y[0, 0].abs().max() == 0
    assert norm_modulate(x[None].fill_(torch.nan), torch.zeros(1, 64), x[None, 0]).isnan().all()


def test_threads_do_not_change_the_bits(cpu_path):
    torch.manual_seed(0)
    x, dy = torch.randn(2, 2, 300, 96)
    shift, scale = torch.randn(2, 1, 3, 96)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            found.append(gradients(norm_modulate, dy, x, shift, scale))
    finally:
        torch.set_num_threads(threads)
    pairs = zip(found[0], found[1], strict=True) if cpu_path == "compiled" else ()
    for a, b in (*pairs, *zip(found[1], found[2], strict=True)):
        assert torch.equal(a, b)


def test_autocast_gives_its_dtype_and_rounds_once(rand, cpu_path):
    x, dy = rand(2, 6, 64).cpu(), rand(2, 6, 64, dtype=torch.bfloat16).cpu()
    shift, scale = (rand(2, 64, dtype=torch.bfloat16).cpu() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        y = norm_modulate(x, shift, scale)
        found = gradients(norm_modulate, dy, x, shift, scale)
    exact = reference.norm_modulate(x.double(), shift.double(), scale.double())
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs().max() * 1.01
    assert [t.dtype for t in found] == [x.dtype, shift.dtype, scale.dtype]


def test_path_is_logged_once(cpu_path, caplog):
    paths.announce.cache_clear()
    x = torch.ones(1, 2, 8)
    with caplog.at_level(logging.DEBUG, "fastvid.kernels"):
        for _ in range(3):
            norm_modulate(x, x[:, 0], x[:, 0])
    name = {"compiled": "C++", "pytorch": "PyTorch"}[cpu_path]
    assert [record.getMessage() for record in caplog.records] == [f"norm_modulate: {name}"]


# ---- inside PyTorch


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(rand, rms, dtype):
    x, dy = rand(2, 6, 40, dtype=dtype), rand(2, 6, 40, dtype=dtype)
    for shape in ((2, 40), (1, 3, 40), (2, 6, 40)):
        shift, scale = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype)
        inputs = [tensor.requires_grad_() for tensor in (x.clone(), shift, scale)]
        torch.library.opcheck(OP, (*inputs, None, rms, 1e-6, dtype))
        _, mean, rstd = OP(x, shift, scale, None, rms, 1e-6, dtype)
        torch.library.opcheck(
            BACKWARD, (dy, x, scale.detach(), None, mean.detach(), rstd.detach(), rms)
        )


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compiles_once_for_all_sizes(device, rand, granularity):
    torch._dynamo.reset()
    step = torch.compile(norm_modulate, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, N in ((2, 12), (3, 30)):
            shape = modulation_shape(B, N, 16, granularity)
            x, shift, scale, dy = rand(B, N, 16), rand(*shape), rand(*shape), rand(B, N, 16)
            found = gradients(step, dy, x, shift, scale)
            torch.testing.assert_close(found, gradients(norm_modulate, dy, x, shift, scale))


def test_exports_with_free_sizes(rand):
    class Module(torch.nn.Module):
        def forward(self, x, shift, scale):
            return norm_modulate(x, shift, scale)

    B, N = torch.export.Dim("B", min=2), torch.export.Dim("N", min=2)
    shapes = {"x": {0: B, 1: N}, "shift": {0: B}, "scale": {0: B}}
    example = rand(2, 6, 16), rand(2, 16), rand(2, 16)
    exported = torch.export.export(Module(), example, dynamic_shapes=shapes).module()
    other = rand(5, 9, 16), rand(5, 16), rand(5, 16)
    torch.testing.assert_close(exported(*other), norm_modulate(*other))


def test_meta_tensors_pass_through():
    x, shift = torch.empty(2, 6, 8, device="meta"), torch.empty(2, 3, 8, device="meta")
    y = norm_modulate(x.requires_grad_(), shift, shift)
    assert (y.device.type, y.shape) == ("meta", x.shape)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_activation_checkpointing(rand):
    x, shift, scale, dy = rand(2, 6, 8), rand(2, 8), rand(2, 8), rand(2, 6, 8)
    kept = gradients(norm_modulate, dy, x, shift, scale)
    again = gradients(
        lambda *a: checkpoint(norm_modulate, *a, use_reentrant=False), dy, x, shift, scale
    )
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)


# ---- refusals


X, S = torch.zeros(2, 6, 8), torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((X[0], S, S), ValueError, r"x must be \(B, N, D\), got \(6, 8\)"),
        ((X.numpy(), S, S), TypeError, "x must be a Tensor, got ndarray"),
        ((X, None, S), TypeError, "shift must be a Tensor, got NoneType"),
        ((X, S, S[:, :7]), ValueError, r"scale must be \(B\|1, D\), B=2 D=8, got \(2, 7\)"),
        ((X, torch.zeros(3, 8), S), ValueError, r"shift must be \(B\|1, D\).*got \(3, 8\)"),
        ((X, X[:, :4], X[:, :4]), ValueError, "T that divides N=6, got T=4"),
        ((X, X[:, :3], X[:, :2]), ValueError, r"scale must be \(B\|1, T, D\), .*T=3.*\(2, 2, 8\)"),
        ((X, S, S[:1]), ValueError, r"shift and scale must agree .*\(2, 8\).*\(1, 8\)"),
        ((X, S, S.bfloat16()), ValueError, "agree in shape and dtype"),
        ((X.long(), S, S), TypeError, "x must be float32.*got torch.int64"),
        ((X, S.long(), S.long()), TypeError, "shift must be float32.*got torch.int64"),
        ((X, S.to("meta"), S), ValueError, "shift must be on the device of x, cpu, got meta"),
        ((torch.zeros(1, 1, 8193), *torch.zeros(2, 1, 8193)), NotImplementedError, "D <= 8192"),
    ],
)
def test_refuses(arguments, error, says):
    with pytest.raises(error, match=says):
        norm_modulate(*arguments)


# ---- the Triton kernels


def launch(x, shift, scale, rms, dtype=None):
    from fastvid.kernels.modulate.kernel import launch_forward

    return launch_forward(x, shift, scale, rms, 1e-6, dtype or x.dtype)


def launch_backward(dy, x, scale, mean, rstd, rms):
    from fastvid.kernels.modulate import kernel

    return kernel.launch_backward(dy, x, scale, mean, rstd, rms)


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize(
    ("shape", "modulation"),
    [
        ((2, 18, 40), (2, 40)),
        ((2, 37, 72), (1, 72)),  # one modulation for the batch, a ragged last block
        ((2, 15, 600), (2, 3, 600)),
        ((2, 6, 40), (1, 6, 40)),
        ((1, 5, 1152), (1, 5, 1152)),
    ],
)
def test_kernel_rounds_no_worse_than_eager(
    within_budget, guard_bands, rand, shape, modulation, rms, dtype
):
    x, dy = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype)
    shift, scale = rand(*modulation, dtype=dtype), rand(*modulation, dtype=dtype)
    check_budget(
        within_budget,
        lambda *a: launch(*a, rms),
        lambda *a: launch_backward(*a, rms),
        x, shift, scale, dy, rms,
    )  # fmt: skip
    guard_bands()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_kernel_takes_any_strides(rand, layout):
    x, dy = (LAYOUTS[layout](rand(2, 6, 24)) for _ in range(2))
    shift, scale = rand(2, 3, 48).chunk(2, -1)
    _, mean, rstd = found = launch(x, shift, scale, False)
    found += launch_backward(dy, x, scale, mean, rstd, False)
    packed = [tensor.contiguous() for tensor in (x, shift, scale, dy)]
    wanted = launch(*packed[:3], False)
    wanted += launch_backward(packed[3], packed[0], packed[2], mean, rstd, False)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("interpreter")
def test_kernel_mixes_dtypes_as_under_autocast(rand):
    x, dy = rand(1, 6, 40), rand(1, 6, 40, dtype=torch.float16)
    shift, scale = rand(1, 40, dtype=torch.float16), rand(1, 40, dtype=torch.float16)
    y, mean, rstd = launch(x, shift, scale, False, torch.float16)
    found = launch_backward(dy, x, scale, mean, rstd, False)
    assert [t.dtype for t in (y, *found)] == [dy.dtype, x.dtype, shift.dtype, scale.dtype]
    wanted = reference.norm_modulate_backward(dy.double(), x.double(), scale.double())
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreter")
def test_kernel_on_nothing(rand):
    x, scale = rand(2, 0, 8), rand(2, 8)
    y, mean, rstd = launch(x, scale, scale, False)
    dx, dshift, dscale = launch_backward(x, x, scale, mean, rstd, False)
    assert y.shape == dx.shape == x.shape
    assert not dshift.any()
    assert not dscale.any()


@pytest.mark.usefixtures("interpreter")
def test_kernel_backward_repeats_its_bits(rand):
    x, scale, dy = rand(2, 64, 40), rand(1, 40), rand(2, 64, 40)
    _, mean, rstd = launch(x, scale, scale, False)
    first, second = (launch_backward(dy, x, scale, mean, rstd, False) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_one_compilation_serves_every_batch_and_length(compilations):
    printed = compilations("""
from fastvid.kernels.modulate import groups, kernel
for B, N in ((1, 64), (2, 99), (3, 7), (1, 1)):
    x, s = torch.zeros(B, N, 64), torch.zeros(B, 128)[:, :64]
    rows = kernel.launch_forward(x, s, s, False, 1e-6, torch.float32)[1:]
    kernel.launch_backward(x, x, s, *rows, False)
    # 64 x 3 numbers of one row: the last case has one token per group and its own block size
print(count(kernel._forward), count(kernel._backward), count(groups._sum_partials))
""")
    assert printed.split() == ["2", "2", "1"]


@pytest.mark.usefixtures("interpreter")
def test_offsets_past_2_to_the_31(child, tmp_path):
    """A sparse file stands in for a large tensor; an int32 offset would leave it and crash."""
    child(f"""
import torch
from fastvid.kernels.modulate.kernel import launch_backward, launch_forward
step, D = 2**30 + 16, 8
file = torch.from_file({str(tmp_path / "sparse")!r}, True, 2 * step + D, dtype=torch.float16)
for shape, strides in (((3, 1, D), (step, D, 1)), ((1, 3, D), (0, step, 1))):
    x = file.as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    s = torch.zeros(1, D).half()
    y, mean, rstd = launch_forward(x, s, s, False, 1e-6, torch.float16)
    near = launch_forward(x.contiguous(), s, s, False, 1e-6, torch.float16)
    assert torch.equal(y, near[0])
    dx = launch_backward(x, x, s, mean, rstd, False)[0]
    assert torch.equal(dx, launch_backward(y * 0 + x, x.contiguous(), s, mean, rstd, False)[0])
""")


# ---- on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("B", "N", "D"), [(1, 16384, 1024), (2, 4096, 1152), (4, 2048, 384)])
def test_gpu_bf16_at_real_sizes(within_budget, rand, B, N, D, granularity, rms):
    shape = modulation_shape(B, N, D, granularity, frames=16)
    x, dy = rand(B, N, D, dtype=torch.bfloat16), rand(B, N, D, dtype=torch.bfloat16)
    shift, scale = rand(*shape, dtype=torch.bfloat16), rand(*shape, dtype=torch.bfloat16)
    check_budget(
        within_budget,
        lambda *a: OP(*a, None, rms, 1e-6, torch.bfloat16),
        lambda dy, x, scale, *a: BACKWARD(dy, x, scale, None, *a, rms),
        x, shift, scale, dy, rms,
    )  # fmt: skip


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_numbers(rand):
    B, N, D = 2, 2**20 + 8, 1024
    x = torch.empty(B, N, D, dtype=torch.bfloat16, device="cuda")
    x.normal_()
    scale = rand(B, D, dtype=torch.bfloat16)
    y, mean, rstd = OP(x, scale, scale, None, False, 1e-6, x.dtype)
    dx, _, _ = BACKWARD(x, x, scale, None, mean, rstd, False)
    tail = x[1:, -16:].contiguous()
    near, tail_mean, tail_rstd = OP(tail, scale[1:], scale[1:], None, False, 1e-6, x.dtype)
    assert torch.equal(y[1:, -16:], near)
    near, _, _ = BACKWARD(tail, tail, scale[1:], None, tail_mean, tail_rstd, False)
    assert torch.equal(dx[1:, -16:], near)  # a row of dx depends on nothing but its own


@pytest.mark.gpu
def test_gpu_graph_capture(rand):
    x, scale = rand(2, 512, 384, dtype=torch.bfloat16), rand(2, 384, dtype=torch.bfloat16)
    dy = rand(2, 512, 384, dtype=torch.bfloat16)

    def step():
        y, mean, rstd = OP(x, scale, scale, None, False, 1e-6, x.dtype)
        return y, *BACKWARD(dy, x, scale, None, mean, rstd, False)

    step()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(rand(2, 512, 384))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_backward_repeats_its_bits(rand):
    x, scale, dy = rand(2, 8192, 1152), rand(1, 1152), rand(2, 8192, 1152)
    runs = [gradients(norm_modulate, dy, x, scale, scale) for _ in range(20)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.gpu
def test_gpu_compiles_once_and_launches_one_variant(rand):
    from fastvid.kernels.modulate import kernel

    torch._dynamo.reset()
    step = torch.compile(norm_modulate, fullgraph=True, dynamic=True)

    def variants():
        return sum(len(cache[0]) for cache in kernel._forward.device_caches.values())

    with torch._dynamo.config.patch(error_on_recompile=True):
        for turn, (B, N) in enumerate(((2, 1000), (3, 1543), (5, 64))):
            x, scale = rand(B, N, 640), rand(B, 640)
            torch.testing.assert_close(step(x, scale, scale), norm_modulate(x, scale, scale))
            if turn == 0:
                before = variants()
    assert variants() == before
