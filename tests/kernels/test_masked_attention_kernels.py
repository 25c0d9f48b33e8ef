"""The Triton kernels of `masked_attention`, interpreted where there is no GPU."""

import pytest
import torch
from torch.utils import _python_dispatch

from fastvid.functional import FrameLayout, Visibility, masked_attention
from tests.kernels.masked_attention_cases import (
    MASKS,
    OP,
    check_budget,
    eager,
    launched,
    oracle,
    ours,
    tables,
    visibility_of,
)  # fmt: skip


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
def test_kernels_on_other_keys_than_queries(within_budget, device, rand):
    """Frames of each sample's own, fewer and more keys than queries."""
    table = torch.tensor([[True, False, True], [False, True, False]], device=device)
    few, many = FrameLayout([[2, 3], [4, 1]], device), FrameLayout([[3, 5, 1], [6, 0, 3]], device)
    for queries, keys, seen in ((few, many, table), (many, few, table.T)):
        visibility = Visibility(seen, queries, keys)
        q, dout = (rand(2, queries.tokens, 2, 24) for _ in range(2))
        k, v = (rand(2, keys.tokens, 2, 24) for _ in range(2))
        found = launched(q, k, v, visibility, dout, 0.25)
        check_budget(within_budget, found, q, k, v, visibility, dout, 0.25)


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


# ---- the forward kernel by tensor descriptors


def by_descriptors(q, k, v, visibility, scale):
    from fastvid.kernels.masked_attention.kernel import launch_forward

    return launch_forward(q, k, v, *tables(visibility)[:2], scale, by_descriptors=True)


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize(
    ("E", "dtype", "mask"),
    [
        (64, torch.float32, "identity"),
        (72, torch.float16, "ragged"),
        (128, torch.float16, "text"),
        (24, torch.float32, "nothing"),
    ],
)
def test_descriptors_give_what_pointers_give(device, rand, E, dtype, mask):
    """To the last bits: the blocks differ, and with them the order of the sums."""
    from fastvid.kernels.masked_attention.kernel import launch_forward

    visibility = visibility_of(mask, 4, device)
    q, k, v = rand(2, 16, 3, 1, E, dtype=dtype).unbind(2)
    found = by_descriptors(q, k, v, visibility, E**-0.5)
    wanted = launch_forward(q, k, v, *tables(visibility)[:2], E**-0.5, by_descriptors=False)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0], wanted[0], rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("interpreter")
def test_descriptors_walk_frames_longer_than_a_block(device, rand):
    visibility = Visibility.causal(FrameLayout([131, 2], device=device))
    q, k, v, dout = (rand(1, 133, 1, 64) for _ in range(4))
    out, lse = by_descriptors(q, k, v, visibility, 0.125)
    exact, exact_lse, *_ = oracle(q, k, v, visibility, dout, 0.125)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("way", ["pointers", "descriptors"])
@pytest.mark.parametrize("E", [64, 72])
def test_hidden_keys_may_be_anything(device, rand, way, E):
    """NaN before, between and behind the runs that a frame sees, and in padding."""
    from fastvid.kernels.masked_attention.kernel import launch_forward

    layout = FrameLayout([3, 5, 9, 4, 6], device=device)
    table = torch.tensor([[0, 1, 0, 1, 0]] * 5, device=device).bool()
    visibility = Visibility(table, layout, key_lengths=[3, 5, 9, 2, 6])
    hidden = ~visibility.dense(27, 27)[0, 0]
    q, k, v = (rand(1, 27, 1, E) for _ in range(3))
    clean = by_descriptors(q, k, v, visibility, 0.2)
    k[:, hidden], v[:, hidden] = torch.nan, torch.inf
    found = launch_forward(
        q, k, v, *tables(visibility)[:2], 0.2, by_descriptors=way == "descriptors"
    )
    torch.testing.assert_close(found, clean)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("E", [64, 72])
def test_padding_may_be_anything_in_the_backward(device, rand, E):
    table = torch.ones(2, 2, dtype=torch.bool, device=device)
    visibility = Visibility(table, FrameLayout([3, 9], device=device), key_lengths=[2, 9])
    q, k, v, dout = (rand(1, 12, 1, E) for _ in range(4))
    clean = launched(q, k, v, visibility, dout, 0.2)
    k[:, 2], v[:, 2] = torch.nan, torch.inf
    found = launched(q, k, v, visibility, dout, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))


def test_descriptors_are_taken_where_they_were_measured_faster(monkeypatch):
    pytest.importorskip("triton")
    from fastvid.kernels.masked_attention import descriptors

    class Tensor(torch.Tensor):
        is_cuda = True

    q = torch.zeros(2, 16, 3, 2, 64, dtype=torch.bfloat16).unbind(2)[0].as_subclass(Tensor)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not descriptors.FASTER_ON, "no GPU was measured"
    assert not descriptors.chosen(q, q, q, 64)
    monkeypatch.setattr(descriptors, "FASTER_ON", {(9, 0)})
    assert descriptors.chosen(q, q, q, 64)
    assert not descriptors.chosen(q.float(), q.float(), q.float(), 64)
    assert not descriptors.chosen(q, q, q, 256)
    assert not descriptors.chosen(q[..., 1:], q, q, 64), "starts between two steps of 16 bytes"
    assert not descriptors.chosen(q, q[:, :1].expand(q.shape), q, 64), "a step of nothing"
    assert not descriptors.chosen(q, q[:, :1], q, 64), "no step at all"


def test_what_no_descriptor_reads_is_refused():
    pytest.importorskip("triton")
    q = torch.zeros(2, 16, 2, 65)[..., 1:]
    with pytest.raises(ValueError, match="no descriptor reads"):
        by_descriptors(q, q, q, visibility_of("full"), 1.0)


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


def test_no_grid_is_too_long(compilations):
    """Samples times heads lie on the first axis: the others hold 65535 at most."""
    printed = compilations("""
from fastvid.kernels._shared import intervals, intervals_kernel
from fastvid.kernels.masked_attention import kernel
compile_only, grids = JITFunction.__getitem__, []
JITFunction.__getitem__ = lambda self, grid: grids.append(grid) or compile_only(self, grid)
q = torch.zeros(35000, 3, 2, 16)
ends, table = torch.tensor([[0, 1, 3]]).int(), torch.ones(35000, 2, 2, dtype=torch.bool)
tables = intervals.reference(table, ends, ends, None, None)
intervals_kernel.launch(table, ends, ends, None, None)
out, lse = kernel.launch_forward(q, q, q, *tables[:2], 1.0)
kernel.launch_backward(out, q, q, q, out, lse, *tables, 1.0)
print(*(f"{grid[0]}:{max(grid[1:], default=1)}" for grid in grids))
""")
    tiles = 70000 * (1 + 3)  # one tile of tokens, and one for each frame that leaves a part
    assert printed.split() == [f"{35000 * 6}:1", *[f"{tiles}:1"] * 3]


@pytest.mark.usefixtures("interpreter")
def test_tables_are_made_by_one_launch_and_kept(monkeypatch, rand):
    """A GPU's tables: one kernel, nothing else that runs on the device, never again."""
    from fastvid.kernels._shared import intervals, intervals_kernel

    kernel, launches, ops = intervals_kernel._intervals, [], []

    class Counted:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                launches.append(grid)
                with _python_dispatch._disable_current_modes():  # the interpreter copies
                    kernel[grid](*arguments, **constants)

            return launch

    class Ops(_python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    def build(*given):
        with Ops():
            return intervals_kernel.launch(*given)

    monkeypatch.setattr(intervals_kernel, "_intervals", Counted())
    monkeypatch.setattr(intervals, "build", build)
    visibility = visibility_of("identity")
    q, k, v, dout = (rand(2, 16, 1, 16) for _ in range(4))
    for _ in range(2):
        launched(q, k, v, visibility, dout, 0.25)
        ours(q, k, v, visibility, dout)
    assert len(launches) == 1
    assert set(ops) <= {"aten::empty", "aten::view", "aten::slice", "aten::detach"}, (
        "what launches nothing"
    )


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
@pytest.mark.parametrize("E", [64, 72, 128])
@pytest.mark.parametrize("mask", MASKS)
def test_gpu_descriptors_at_real_sizes(within_budget, rand, mask, E):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel by tensor descriptors is made for sm_90")
    visibility = visibility_of(mask, 1000, "cuda")
    q, k, v = rand(2, 4000, 3, 2, E, dtype=torch.bfloat16).unbind(2)
    out, lse = by_descriptors(q, k, v, visibility, E**-0.5)
    exact, exact_lse, *_ = oracle(q, k, v, visibility, q, E**-0.5)
    within_budget(out, eager(q, k, v, visibility, q, E**-0.5)[0], exact, "out")
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-3, atol=2e-3)
    assert torch.equal(by_descriptors(q, k, v, visibility, E**-0.5)[0], out)


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


@pytest.mark.gpu
def test_gpu_more_heads_than_an_axis_of_a_grid_holds(within_budget, rand):
    visibility = visibility_of("identity", 2, "cuda")
    visibility = Visibility(
        visibility.table, visibility.queries, self_only=visibility.self_only[:1]
    )
    q, k, v, dout = (rand(70000, 8, 1, 16, dtype=torch.float16) for _ in range(4))
    found = ours(q, k, v, visibility, dout)
    check_budget(within_budget, found, q, k, v, visibility, dout, 0.25)


@pytest.mark.gpu
def test_gpu_more_samples_than_an_axis_of_a_grid_holds():
    known = torch.arange(70000 * 2, device="cuda").view(70000, 2) % 3 == 0
    found = Visibility.identity(FrameLayout([1, 2], device="cuda"), known)
    wanted = Visibility.identity(FrameLayout([1, 2]), known.cpu())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(tables(found), tables(wanted), strict=True))
