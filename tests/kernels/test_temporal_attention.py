"""The promises of `temporal_attention`. Without a GPU its Triton kernels run in the interpreter."""

import functools
import logging

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastvid.functional import temporal_attention
from fastvid.kernels._shared import paths
from fastvid.kernels.temporal_attention import reference
from tests.kernels.temporal_attention_cases import LAYOUTS, RULES, gradients, tables

OP = torch.ops.fastvid.temporal_attention.default
BACKWARD = torch.ops.fastvid.temporal_attention_backward.default
WIDE_OPEN = (64, 64)


def arguments(known=None, window=None, rotary=None, scale=0.15):
    """The arguments of the op behind q, k and v."""
    return known, *(rotary or (None, None)), scale, *(window or WIDE_OPEN)


def check_budget(within_budget, forward, backward, q, k, v, dout, **rule):
    """Hold `forward(q, k, v, *arguments)` and its backward to float64."""
    exact = [tensor.double() for tensor in (q, k, v, dout)]
    rule = exact_rule = {"scale": 0.15, **rule}
    if "rotary" in rule:
        exact_rule = {**rule, "rotary": tuple(table.double() for table in rule["rotary"])}
    eager = functools.partial(reference.temporal_attention, **rule)
    out = forward(q, k, v, *arguments(**rule))
    assert out.is_contiguous()
    wanted = reference.temporal_attention(*exact[:3], **exact_rule)
    within_budget(out, eager(q, k, v), wanted, "out")
    plain = gradients(eager, dout, q, k, v)
    wanted = reference.temporal_attention_backward(exact[3], *exact[:3], **exact_rule)
    found = backward(dout, q, k, v, *arguments(**rule))
    for name, *triple in zip(("dq", "dk", "dv"), found, plain, wanted, strict=True):
        within_budget(*triple, name)


def to(device, rule):
    move = {
        "known": lambda known: known.to(device),
        "rotary": lambda pair: tuple(table.to(device) for table in pair),
    }
    return {name: move.get(name, lambda same: same)(value) for name, value in rule.items()}


# ---- the reference, and what the op computes on this machine


@pytest.mark.parametrize("rule", RULES)
def test_written_gradient_is_the_gradient(rule):
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 2, 5, 3, 2, 16, dtype=torch.float64)
    rule = RULES[rule](2, 5, 16)
    f = functools.partial(reference.temporal_attention, **rule)
    written = reference.temporal_attention_backward(dout, q, k, v, **rule)
    torch.testing.assert_close(written, gradients(f, dout, q, k, v))


def test_reference_is_pytorchs_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 3, 2, 16, dtype=torch.float64)
    heads = [x.permute(0, 2, 3, 1, 4) for x in (q, k, v)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*heads).permute(0, 3, 1, 2, 4)
    torch.testing.assert_close(reference.temporal_attention(q, k, v), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(2, 16, 5, 3, 72), (1, 13, 4, 2, 64), (1, 33, 2, 1, 24)])
def test_cpu_rounds_no_worse_than_eager(within_budget, cpu_path, shape, rule, dtype):
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, *shape).to(dtype)
    rule = RULES[rule](*shape[:2], shape[-1])
    check_budget(within_budget, OP, BACKWARD, q, k, v, dout, **rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["all", "everything"])
@pytest.mark.parametrize("shape", [(2, 16, 5, 3, 72), (1, 33, 2, 1, 24)])
def test_other_instruction_sets(within_budget, vectors, shape, rule, dtype):
    """float32 to 1e-5: plain PyTorch has this machine's fused multiply-add, they may have none."""

    def within(actual, eager, exact, name):
        if dtype != torch.float32:
            within_budget(actual, eager, exact, name)
            return
        assert (actual - exact).abs().max() <= 1e-5 * exact.abs().max(), name

    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, *shape).to(dtype)
    rule = RULES[rule](*shape[:2], shape[-1])
    check_budget(within, OP, BACKWARD, q, k, v, dout, **rule)


@pytest.mark.parametrize("vectors", [16], indirect=True)
def test_another_instruction_set_is_another(vectors):
    """Without fused multiply-add the last bits differ somewhere: the limit has been obeyed."""
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 2, 16, 9, 3, 72)

    def computed():
        return OP(q, k, v, *arguments()), *BACKWARD(dout, q, k, v, *arguments())

    narrow = computed()
    if torch.ops.fastvid_cpp.limit_vectors(64) == vectors:
        pytest.skip("this machine has no wider vectors")
    wide = computed()
    assert not all(map(torch.equal, narrow, wide))
    torch.testing.assert_close(narrow, wide, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(rule):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 2, 2, 16, dtype=torch.float64) for _ in range(3)]
    for tensor in inputs:
        tensor.requires_grad_()
    rule = RULES[rule](2, 4, 16)
    f = functools.partial(temporal_attention, **rule)
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


def test_views_of_a_projection_are_not_copied(cpu_path):
    if cpu_path == "pytorch":
        pytest.skip("a packed projection is copied where no compiled kernel reads its strides")
    qkv = torch.randn(1, 8, 64, 3, 4, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        temporal_attention(*qkv.unbind(3))
    used = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert used <= 1.01 * qkv.nbytes / 3  # the result


def test_known_frames_keep_their_own_values(cpu_path):
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 2, 7, 3, 2, 24)
    known = torch.tensor([[1, 0, 1, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0]]).bool()
    out = temporal_attention(q, k, v, known=known)
    assert torch.equal(out[known], v[known])
    others = [torch.where(known[:, :, None, None, None], x, torch.nan) for x in (q, k, v)]
    assert torch.equal(temporal_attention(*others, known=known)[known], out[known])
    f = functools.partial(temporal_attention, known=known)
    dq, dk, dv = gradients(f, torch.where(known[:, :, None, None, None], dout, 0), q, k, v)
    assert not dq.any()
    assert not dk.any()
    assert torch.equal(dv[known], dout[known])
    assert not dv[~known].any()


def test_window_of_nothing_is_the_identity(cpu_path):
    q, k, v = torch.randn(3, 1, 6, 2, 2, 16)
    assert torch.equal(temporal_attention(q, k, v, window=(0, 0)), v)


@pytest.mark.parametrize("far", [64, 2**31, 2**63 - 1])
def test_a_window_may_be_wider_than_the_clip(cpu_path, far):
    q, k, v = torch.randn(3, 1, 6, 2, 2, 16)
    assert torch.equal(temporal_attention(q, k, v, window=(far, far)), temporal_attention(q, k, v))


def test_rotary_equals_turning_before_and_sees_only_differences(cpu_path):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 9, 3, 2, 40)
    steps = torch.arange(12)[:, None] * 0.5 ** torch.arange(20)
    cos, sin = steps.cos(), steps.sin()
    out = temporal_attention(q, k, v, rotary=(cos, sin))
    turned = reference.rotate(q, (cos, sin)), reference.rotate(k, (cos, sin))
    torch.testing.assert_close(out, temporal_attention(*turned, v))
    torch.testing.assert_close(out, temporal_attention(q, k, v, rotary=(cos[3:], sin[3:])))


@pytest.mark.parametrize("shape", [(0, 4, 2, 2, 16), (2, 0, 2, 2, 16), (2, 4, 0, 2, 16)])
def test_empty(cpu_path, shape):
    q = torch.zeros(shape, requires_grad=True)
    temporal_attention(q, q, q).sum().backward()
    assert q.grad.shape == shape


def test_one_frame_and_the_most_frames(cpu_path):
    q, k, v = torch.randn(3, 1, 1, 3, 2, 16)
    assert torch.equal(temporal_attention(q, k, v), v)
    q, k, v = torch.randn(3, 1, 64, 2, 1, 16)
    torch.testing.assert_close(
        temporal_attention(q, k, v), reference.temporal_attention(q, k, v), rtol=1e-5, atol=1e-5
    )


def test_extreme_scores_and_nan(cpu_path):
    q, k, v = torch.randn(3, 1, 5, 2, 1, 16)
    out = temporal_attention(1e4 * q, 1e4 * k, v)
    torch.testing.assert_close(out, reference.temporal_attention(1e4 * q, 1e4 * k, v))
    if cpu_path == "pytorch":
        return  # the attention of PyTorch turns a row of NaN into one of zeros
    q[0, 1, 0] = torch.nan
    out = temporal_attention(q, k, v)
    assert out[0, 1, 0].isnan().all()
    assert out.isnan().sum() == 16


@pytest.mark.usefixtures("poisoned")
def test_threads_and_repeats_do_not_change_the_bits(cpu_path):
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 1, 9, 40, 4, 40)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            found.append(gradients(temporal_attention, dout, q, k, v))
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


def test_path_is_logged_once(cpu_path, caplog):
    paths.announce.cache_clear()
    q = torch.ones(1, 2, 1, 1, 16)
    with caplog.at_level(logging.DEBUG, "fastvid.kernels"):
        for _ in range(3):
            temporal_attention(q, q, q)
    name = {"compiled": "C++", "pytorch": "PyTorch"}[cpu_path]
    assert [record.getMessage() for record in caplog.records] == [f"temporal_attention: {name}"]


# ---- inside PyTorch


@pytest.mark.parametrize("rule", ["all", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(rand, device, rule, dtype):
    q, k, v, dout = (rand(2, 4, 3, 2, 24, dtype=dtype) for _ in range(4))
    rule = arguments(**to(device, RULES[rule](2, 4, 24)))
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    torch.library.opcheck(OP, (*inputs, *rule))
    torch.library.opcheck(BACKWARD, (dout, q, k, v, *rule))


@pytest.mark.parametrize("rule", ["all", "everything"])
def test_compiles_once_for_all_sizes(device, rand, rule):
    torch._dynamo.reset()
    step = torch.compile(temporal_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, T, N in ((2, 12, 5), (4, 16, 9)):
            q, k, v, dout = (rand(B, T, N, 3, 16) for _ in range(4))
            settings = to(device, RULES[rule](B, T, 16))
            if rule == "everything":
                settings["rotary"] = tuple(t.to(device) for t in tables(T + 1, 16))
            found = gradients(functools.partial(step, **settings), dout, q, k, v)
            f = functools.partial(temporal_attention, **settings)
            torch.testing.assert_close(found, gradients(f, dout, q, k, v))


def test_exports_with_free_sizes(rand, device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v, known, cos, sin):
            plain = temporal_attention(q, k, v)
            return plain, temporal_attention(q, k, v, known=known, window=(2, 1), rotary=(cos, sin))

    def inputs(B, T, N):
        known = torch.arange(B * T, device=device).view(B, T) % 3 == 1
        return (*(rand(B, T, N, 2, 16) for _ in range(3)), known, *tables(T, 16, device=device))

    B, T = torch.export.Dim("B", min=2), torch.export.Dim("T", min=2, max=64)
    token = {0: B, 1: T, 2: torch.export.Dim("N", min=2)}
    free = token, token, token, {0: B, 1: T}, {0: T}, {0: T}
    exported = torch.export.export(Module(), inputs(2, 4, 3), dynamic_shapes=free).module()
    other = inputs(3, 7, 5)
    torch.testing.assert_close(exported(*other), Module()(*other))


def test_meta_tensors_pass_through():
    q = torch.empty(2, 4, 3, 2, 16, device="meta", requires_grad=True)
    out = temporal_attention(q, q, q)
    out.sum().backward()
    assert (out.device.type, out.shape, q.grad.shape) == ("meta", q.shape, q.shape)


@pytest.mark.parametrize("rule", ["all", "everything"])
def test_activation_checkpointing(rand, device, rule):
    q, k, v, dout = (rand(2, 4, 3, 2, 16) for _ in range(4))
    f = functools.partial(temporal_attention, **to(device, RULES[rule](2, 4, 16)))
    kept = gradients(f, dout, q, k, v)
    again = gradients(lambda *a: checkpoint(f, *a, use_reentrant=False), dout, q, k, v)
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)


# ---- refusals

Q = torch.zeros(2, 4, 3, 2, 16)
K = torch.zeros(1, 4).bool()
C = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("tensors", "options", "error", "says"),
    [
        ((Q[0], Q, Q), {}, ValueError, r"q must be \(B, T, N, heads, E\), got \(4, 3, 2, 16\)"),
        ((Q, None, Q), {}, TypeError, "k must be a Tensor, got NoneType"),
        ((Q, Q, Q[:, :3]), {}, ValueError, r"v must be .*T=4.*got \(2, 3, 3, 2, 16\)"),
        ((Q, Q.half(), Q), {}, TypeError, "k must have the dtype of q.*float16"),
        ((Q.long(), Q, Q), {}, TypeError, "q must be float32.*int64"),
        ((Q, Q, Q.to("meta")), {}, ValueError, "v must be on the device of q, cpu, got meta"),
        ((torch.zeros(1, 65, 1, 1, 16),) * 3, {}, NotImplementedError, "T <= 64.*T=65"),
        ((torch.zeros(1, 4, 1, 1, 20),) * 3, {}, NotImplementedError, "E=20"),
        ((torch.zeros(1, 4, 1, 1, 0),) * 3, {}, NotImplementedError, "E=0"),
        ((torch.zeros(1, 4, 1, 1, 264),) * 3, {}, NotImplementedError, "E=264"),
        ((Q, Q, Q), {"known": K.float()}, TypeError, "known must be bool.*float32"),
        ((Q, Q, Q), {"known": K[:, :3]}, ValueError, r"known must be \(B\|1, T\).*\(1, 3\)"),
        ((Q, Q, Q), {"known": K.expand(3, 4)}, ValueError, r"known must be .*\(3, 4\)"),
        ((Q, Q, Q), {"window": (-1, 2)}, ValueError, r"window must be .*\(-1, 2\)"),
        ((Q, Q, Q), {"rotary": (C[:3], C)}, ValueError, "cos must have a row .*T=4 .*got 3"),
        ((Q, Q, Q), {"rotary": (C, C[:, :7])}, ValueError, r"sin must be \(rows, 8\), .*\(4, 7\)"),
        ((Q, Q, Q), {"rotary": (C, C.long())}, TypeError, "sin must be float32.*int64"),
        ((Q, Q, Q), {"rotary": (C, None)}, TypeError, "sin must be a Tensor, got NoneType"),
        ((Q, Q, Q), {"rotary": (None, C)}, TypeError, "cos must be a Tensor, got NoneType"),
        ((Q, Q, Q), {"rotary": (C.to("meta"), C)}, ValueError, "cos must be on the device of q"),
    ],
)
def test_refuses(tensors, options, error, says):
    with pytest.raises(error, match=says):
        temporal_attention(*tensors, **options)


# ---- the Triton kernels


def launch(*inputs):
    from fastvid.kernels.temporal_attention import kernel

    return kernel.launch_forward(*inputs)


def launch_backward(*inputs):
    from fastvid.kernels.temporal_attention import kernel

    return kernel.launch_backward(*inputs)


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rule", ["all", "everything"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 16, 5, 2, 72),
        (1, 13, 9, 1, 64),
        (1, 64, 1, 2, 24),
        (2, 1, 70, 1, 8),
        (1, 12, 5, 2, 136),
    ],
)
def test_kernel_rounds_no_worse_than_eager(
    within_budget, guard_bands, rand, device, shape, rule, dtype
):
    q, k, v, dout = (rand(*shape, dtype=dtype) for _ in range(4))
    rule = to(device, RULES[rule](*shape[:2], shape[-1]))
    check_budget(within_budget, launch, launch_backward, q, k, v, dout, **rule)
    guard_bands()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_kernel_takes_any_strides(rand, layout):
    packed = [rand(2, 5, 3, 2, 24) for _ in range(3)]
    if layout == "one sample, expanded":
        packed = [tensor[:1].expand(tensor.shape).contiguous() for tensor in packed]
    views, dout = LAYOUTS[layout](*packed), rand(2, 3, 5, 2, 24).transpose(1, 2)
    found = launch(*views, *arguments()), *launch_backward(dout, *views, *arguments())
    dout = dout.contiguous()
    wanted = launch(*packed, *arguments()), *launch_backward(dout, *packed, *arguments())
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("interpreter")
def test_kernel_on_nothing(rand):
    q = rand(2, 4, 0, 2, 16)
    assert launch(q, q, q, *arguments()).shape == q.shape
    assert launch_backward(q, q, q, q, *arguments())[0].shape == q.shape


@pytest.mark.usefixtures("interpreter")
def test_kernel_keeps_known_frames_and_repeats_its_bits(rand, device):
    q, k, v, dout = (rand(2, 5, 4, 2, 24) for _ in range(4))
    known = torch.tensor([[1, 0, 0, 0, 1]], device=device).bool()
    out = launch(q, k, v, *arguments(known))
    assert torch.equal(out[:, known[0]], v[:, known[0]])
    first, second = (launch_backward(dout, q, k, v, *arguments(known)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_one_compilation_serves_every_size_and_stride(compilations):
    printed = compilations("""
from fastvid.kernels.temporal_attention import kernel
for B, T, N, heads in ((1, 16, 64, 16), (2, 13, 99, 8), (3, 1, 7, 1), (1, 64, 1, 3)):
    q, k, v = torch.zeros(B, T, N, 3, heads, 72).unbind(3)
    rule = None, None, None, 0.1, 64, 64
    kernel.launch_forward(q, k, v, *rule)
    kernel.launch_backward(q, q, k, v, *rule)
print(count(kernel._forward), count(kernel._backward_in_steps))
""")
    assert printed.split() == ["1", "1"]


@pytest.mark.usefixtures("interpreter")
def test_offsets_past_2_to_the_31(child, tmp_path):
    """A sparse file stands in for a large tensor; an int32 offset would leave it and crash."""
    child(f"""
import torch
from fastvid.kernels.temporal_attention.kernel import launch_backward, launch_forward
step, E = 2**30 + 16, 16
file = torch.from_file({str(tmp_path / "sparse")!r}, True, 2 * step + E, dtype=torch.float16)
rule = None, None, None, 0.1, 64, 64
for axis in range(4):
    shape = [3 if i == axis else 1 for i in range(4)] + [E]
    x = file.as_strided(shape, [step if i == axis else 0 for i in range(4)] + [1])
    x.copy_(torch.randn(shape))
    near = x.contiguous()
    assert torch.equal(launch_forward(x, x, x, *rule), launch_forward(near, near, near, *rule))
    far, wanted = (launch_backward(y, y, y, y, *rule) for y in (x, near))
    assert all(torch.equal(a, b) for a, b in zip(far, wanted))
""")


# ---- on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(1, 16, 256, 16, 72), (1, 13, 1024, 16, 64), (1, 64, 9, 2, 256)])
def test_gpu_bf16_at_real_sizes(within_budget, rand, device, shape, rule):
    q, k, v, dout = (rand(*shape, dtype=torch.bfloat16) for _ in range(4))
    rule = to(device, RULES[rule](*shape[:2], shape[-1]))
    check_budget(within_budget, OP, BACKWARD, q, k, v, dout, **rule)


@pytest.mark.gpu
def test_gpu_float32_to_1e_5(rand):
    q, k, v, dout = (rand(1, 16, 64, 8, 72) for _ in range(4))
    found = OP(q, k, v, *arguments()), *BACKWARD(dout, q, k, v, *arguments())
    exact = [x.double() for x in (q, k, v)]
    wanted = (
        reference.temporal_attention(*exact, scale=0.15),
        *reference.temporal_attention_backward(dout.double(), *exact, scale=0.15),
    )
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["all", "everything"])
def test_gpu_graph_capture(rand, device, rule):
    q, dout = (rand(1, 16, 64, 4, 72, dtype=torch.bfloat16) for _ in range(2))
    rule = arguments(**to(device, RULES[rule](1, 16, 72)))

    def step():
        return OP(q, q, q, *rule), *BACKWARD(dout, q, q, q, *rule)

    step()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    q.copy_(rand(1, 16, 64, 4, 72))
    graph.replay()
    for a, b in zip(found, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_backward_repeats_its_bits(rand):
    q, k, v, dout = (rand(1, 16, 1024, 16, 72, dtype=torch.bfloat16) for _ in range(4))
    runs = [gradients(temporal_attention, dout, q, k, v) for _ in range(20)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
