"""The Triton kernels of `qk_norm_rope`: in the interpreter without a GPU, else on it."""

import functools

import pytest
import torch

from fastvid.functional import qk_norm_rope
from tests.kernels.qk_norm_rope_cases import (
    BACKWARD,
    GRADIENTS,
    LAYOUTS,
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


def launch(*inputs):
    from fastvid.kernels.qk_norm_rope import kernel

    return kernel.launch_forward(*inputs)


def launch_backward(*inputs):
    from fastvid.kernels.qk_norm_rope import kernel

    return kernel.launch_backward(*inputs)


def make(rand, B, N, heads, E, norm, turn, dtype=torch.float32):
    q, k, *douts = (rand(B, N, heads, E, dtype=dtype) for _ in range(4))
    affine = make_affine(functools.partial(rand, dtype=dtype), norm, heads, E)
    return q, k, douts, affine, make_rotary(turn, B, N, q.device)


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("norm", "turn", "shape"),
    [
        ("rms per head", "three axes, partial", (2, 37, 3, 40)),
        ("rms across heads, no weight", "halves", (1, 9, 3, 24)),
        ("layer per head", "halves of two axes, partial", (2, 21, 4, 64)),
        ("layer across heads", "one axis", (2, 13, 5, 72)),
        ("layer, only one bias", "halves of three axes", (1, 50, 1, 24)),
        ("none", "three axes, partial", (2, 7, 2, 64)),
        ("layer across heads", "none", (1, 3, 12, 136)),
        ("rms per head", "halves", (1, 3, 2, 256)),
    ],
)
def test_kernel_rounds_no_worse_than_eager(
    within_budget, guard_bands, rand, shape, norm, turn, dtype
):
    q, k, douts, affine, rotary = make(rand, *shape, norm, turn, dtype)
    check_budget(within_budget, launch, launch_backward, q, k, douts, norm, affine, rotary)
    guard_bands()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_kernel_takes_any_strides(rand, layout):
    q, k, douts, affine, rotary = make(
        rand, 2, 5, 3, 24, "layer across heads", "three axes, partial"
    )
    rule = arguments("layer across heads", affine, rotary)
    views, far = LAYOUTS[layout](q, k), LAYOUTS[layout](*douts)
    near, close = ([t.contiguous() for t in pair] for pair in (views, far))
    found = *launch(*views, *rule), *launch_backward(*far, *views, *rule)
    wanted = *launch(*near, *rule), *launch_backward(*close, *near, *rule)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the padding
@pytest.mark.parametrize("norm", ["rms per head", "layer per head", "layer across heads"])
def test_padding_is_no_row_without_deviation(rand, norm):
    """Heads up to the next power of two and tokens behind the last are 0; with eps 0, 1 / 0."""
    q, k, douts, affine, rotary = make(rand, 1, 5, 3, 24, norm, "one axis")
    rule = arguments(norm, affine, rotary, eps=0.0)
    found = launch_backward(*douts, q, k, *rule)
    wanted = BACKWARD(*douts, q, k, *rule)
    for name, a, b in zip(GRADIENTS, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("interpreter")
def test_kernel_mixes_dtypes_and_takes_one_index_for_all_samples(rand):
    q, k, douts, affine, rotary = make(rand, 2, 5, 3, 24, "rms per head", "one axis")
    q, k, douts = q.half(), k.half(), [d.half() for d in douts]
    rotary = rotary._replace(rows=rotary.rows[:1])
    rule = arguments("rms per head", affine, rotary)
    again = rotary._replace(rows=rotary.rows.repeat(2, 1, 1))
    found = *launch(q, k, *rule), *launch_backward(*douts, q, k, *rule)
    rule = arguments("rms per head", affine, again)
    wanted = *launch(q, k, *rule), *launch_backward(*douts, q, k, *rule)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    assert [t.dtype for t in found[2:6]] == [torch.float16] * 2 + [torch.float32] * 2


@pytest.mark.usefixtures("interpreter")
def test_kernel_on_nothing(rand):
    q, k, douts, affine, rotary = make(rand, 2, 0, 3, 24, "layer per head", "one axis")
    rule = arguments("layer per head", affine, rotary)
    assert launch(q, k, *rule)[0].shape == q.shape
    dq, _, *rows = launch_backward(*douts, q, k, *rule)
    assert dq.shape == q.shape
    assert not any(row.any() for row in rows)


@pytest.mark.usefixtures("interpreter", "poisoned")
def test_kernel_backward_repeats_its_bits(rand):
    q, k, douts, affine, rotary = make(rand, 2, 80, 3, 24, "layer per head", "halves")
    rule = arguments("layer per head", affine, rotary)
    first, second = (launch_backward(*douts, q, k, *rule) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_one_compilation_serves_every_batch_length_and_stride(compilations):
    printed = compilations("""
from fastvid.functional import Rotary, rotary_table
from fastvid.kernels.qk_norm_rope import kernel
w = torch.zeros(64)
for B, N in ((1, 64), (2, 99), (3, 7), (1, 1)):
    q, k, _ = torch.zeros(B, N, 3, 4, 64).unbind(2)
    index = torch.zeros(B, N, 1, dtype=torch.int32)
    rotary = Rotary.of([rotary_table(N, 64)], index)
    rule = w, w, None, None, *rotary, "rms", False, 1e-6
    kernel.launch_forward(q, k, *rule)
    kernel.launch_backward(q.contiguous(), k, q, k, *rule)
print(count(kernel._forward), count(kernel._backward), count(kernel._add_chunks))
""")
    assert printed.split() == ["1", "1", "1"]


@pytest.mark.usefixtures("interpreter")
def test_offsets_past_2_to_the_31(child, tmp_path):
    """A sparse file stands in for a large tensor; an int32 offset would leave it and crash."""
    child(f"""
import torch
from fastvid.kernels.qk_norm_rope.kernel import launch_backward, launch_forward
step, E = 2**30 + 16, 16
file = torch.from_file({str(tmp_path / "sparse")!r}, True, 2 * step + E, dtype=torch.float16)
rule = None, None, None, None, None, None, None, (), True, "rms", False, 1e-6
for axis in range(3):
    shape = [3 if i == axis else 1 for i in range(3)] + [E]
    x = file.as_strided(shape, [step if i == axis else 0 for i in range(3)] + [1])
    x.copy_(torch.randn(shape))
    near = x.contiguous()
    found, wanted = (launch_forward(y, y, *rule) for y in (x, near))
    assert torch.equal(found[0], wanted[0])
    found, wanted = (launch_backward(y, y, y, y, *rule) for y in (x, near))
    assert torch.equal(found[1], wanted[1])
""")


# ---- on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(2, 1500, 30, 64), (1, 1024, 32, 128)])
def test_gpu_bf16_at_real_sizes(within_budget, rand, shape, norm, turn):
    q, k, douts, affine, rotary = make(rand, *shape, norm, turn, torch.bfloat16)
    check_budget(within_budget, OP, BACKWARD, q, k, douts, norm, affine, rotary)


@pytest.mark.gpu
def test_gpu_graph_capture(rand):
    q, k, douts, affine, rotary = make(
        rand, 2, 512, 16, 64, "rms per head", "one axis", torch.bfloat16
    )
    rule = arguments("rms per head", affine, rotary)

    def step():
        return *OP(q, k, *rule), *BACKWARD(*douts, q, k, *rule)

    step()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    q.copy_(rand(2, 512, 16, 64))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_backward_repeats_its_bits(rand):
    q, k, douts, affine, rotary = make(rand, 2, 8192, 16, 64, "layer across heads", "one axis")
    f = functools.partial(qk_norm_rope, **options("layer across heads", rotary))
    runs = [gradients(f, douts, q, k, affine) for _ in range(20)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
