"""The Triton kernel of `guided_step`: in the interpreter, and on a GPU."""

import pytest
import torch

from fastvid.functional import guided_step
from fastvid.kernels._shared import philox
from tests.kernels.guided_step_cases import SCALES, STEP, TABLES, check, draw_known
from tests.kernels.noising_cases import LAYOUTS


def launch(x, *rest):
    from fastvid.kernels.guided_step.kernel import launch_guided_step

    out = x.new_empty(x.shape)
    launch_guided_step(x, *rest, out)
    return out


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("kind", ["nothing", "frames for all", "cells"])
@pytest.mark.parametrize("branches", SCALES)
def test_kernel_rounds_no_worse_than_eager(
    within_budget, guard_bands, device, rand, branches, kind, clip, dtype
):
    scales = SCALES[branches]
    for B, C, T, H, W in ((2, 1, 2, 4, 6), (1, 2, 2, 5, 7)):
        x, clean, noise = (rand(B, C, T, H, W, dtype=dtype) for _ in range(3))
        prediction = rand((len(scales) + 1) * B, C, T, H, W, dtype=dtype)
        known = draw_known(kind, B, T, H, W, device)
        clean = None if known is None else clean
        table = TABLES["noisy ddim"].to(device)
        for given in (noise, None):
            check(within_budget, launch, x, prediction, table, 2, scales, clip, known, clean, given)
    guard_bands()


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize("shape", [(2, 2, 2, 4, 4), (2, 2, 2, 5, 7), (1, 1, 2, 33, 33)])
def test_kernel_draws_the_noise_by_number(guard_bands, device, rand, shape):
    x, prediction, table = rand(*shape), rand(*shape), TABLES["ddpm"].to(device)
    seeds = torch.arange(-1, shape[0] - 1, device=device)
    noise = philox.normal(seeds, x[0].numel(), 7 + 3).view(shape)
    at = torch.tensor(3, device=device)
    found = launch(x, prediction, table, at, [], None, None, None, None, seeds, 7)
    wanted = launch(x, prediction, table, at, [], None, None, None, noise, None, 0)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-6)
    guard_bands()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("kind", ["frames", "cells"])
def test_kernel_takes_any_strides(device, rand, layout, kind):
    x, clean, noise = (LAYOUTS[layout](rand(2, 2, 3, 4, 4)) for _ in range(3))
    prediction = LAYOUTS[layout](rand(4, 2, 3, 4, 4))
    known = draw_known(kind, 2, 3, 4, 4, device).repeat_interleave(2, dim=1)[:, ::2]
    table, at = TABLES["ddpm"].to(device), torch.tensor(2, device=device)
    found = launch(x, prediction, table, at, [3.0], None, known, clean, noise, None, 0)
    x, prediction, known, clean, noise = (
        t.contiguous() for t in (x, prediction, known, clean, noise)
    )
    wanted = launch(x, prediction, table, at, [3.0], None, known, clean, noise, None, 0)
    assert torch.equal(found, wanted)


@pytest.mark.usefixtures("interpreter")
def test_kernel_skips_what_it_need_not_read(device, rand):
    """NaN in known cells of x and prediction, in clean elsewhere, and in noise times 0."""
    x, clean, prediction = rand(2, 2, 4, 4, 4), rand(2, 2, 4, 4, 4), rand(2, 2, 4, 4, 4)
    known = draw_known("frames", 2, 4, 4, 4, device)
    cells = known[:, None, :, None, None]
    table, last = TABLES["ddpm"].to(device), torch.tensor(7, device=device)
    wanted = launch(x, prediction, table, last, [], None, known, clean, None, None, 0)
    x, prediction = (t.masked_fill(cells, torch.nan) for t in (x, prediction))
    clean, noise = clean.masked_fill(~cells, torch.nan), torch.full_like(x, torch.nan)
    found = launch(x, prediction, table, last, [], None, known, clean, noise, None, 0)
    assert torch.equal(found, wanted)


@pytest.mark.usefixtures("interpreter")
def test_kernel_works_in_place_and_on_nothing(device, rand):
    from fastvid.kernels.guided_step.kernel import launch_guided_step

    x, prediction, table = rand(2, 2, 3, 5, 7), rand(4, 2, 3, 5, 7), TABLES["ddim"].to(device)
    rest = table, torch.tensor(1, device=device), [2.0], 1.0, None, None, None, None, 0
    wanted = launch(x, prediction, *rest)
    launch_guided_step(x, prediction, *rest, x)
    assert torch.equal(x, wanted)
    for shape in ((0, 2, 3, 4, 4), (2, 2, 0, 4, 4), (2, 2, 3, 0, 4)):
        empty = rand(*shape)
        assert launch(empty, torch.cat([empty, empty]), *rest).shape == shape


@pytest.mark.usefixtures("interpreter")
def test_kernel_stays_inside_the_table(device, rand):
    x, prediction, table = rand(1, 1, 1, 4, 4), rand(1, 1, 1, 4, 4), TABLES["euler"].to(device)
    for outside, nearest in ((-1, 0), (8, 7), (2**40, 7)):
        found, wanted = (
            launch(
                x, prediction, table, torch.tensor(row, device=device), [],
                None, None, None, None, None, 0,
            )
            for row in (outside, nearest)
        )  # fmt: skip
        assert torch.equal(found, wanted)


def test_one_compilation_serves_every_clip_step_and_scale(compilations):
    printed = compilations("""
from fastvid.kernels.guided_step import kernel
for B, C, T, H, S, scale in ((2, 4, 16, 32, 25, 7.5), (4, 8, 5, 48, 50, 1.0), (3, 4, 13, 64, 9, 0)):
    x, table, known = torch.zeros(B, C, T, H, H), torch.zeros(S, 5), torch.zeros(B, T) > 0
    for row in (0, 1, S - 1):
        rest = table, torch.tensor(row), [float(scale)], None, known, x, None, None, row
        kernel.launch_guided_step(x, torch.cat([x, x]), *rest, x)
print(count(kernel._guided_step))
""")
    assert int(printed) <= 2  # whether rows of `known` are multiples of 16 long


@pytest.mark.usefixtures("interpreter")
def test_offsets_past_2_to_the_31(child, tmp_path):
    """A sparse file stands in for a large tensor; an int32 offset would leave it and crash."""
    child(f"""
import torch
from fastvid.kernels.guided_step.kernel import launch_guided_step
step = 2**30 + 16
file = torch.from_file({str(tmp_path / "sparse")!r}, True, 2 * step + 16, dtype=torch.float16)
table = torch.tensor([[1.0, -1.0, 0.5, 0.5, 0.3]])
for shape, axis in (((3, 1, 1, 4, 4), 0), ((1, 3, 1, 4, 4), 1), ((1, 1, 3, 4, 4), 2)):
    strides = [0, 0, 0, 4, 1]
    strides[axis] = step
    far = file.as_strided(shape, strides)
    far.copy_(torch.randn(shape))
    near, found, wanted = far.contiguous(), torch.empty(shape).half(), torch.empty(shape).half()
    for x, out in ((far, found), (near, wanted)):
        launch_guided_step(x, x, table, torch.tensor(0), [], None, None, None, x, None, 0, out)
    assert torch.equal(found, wanted)
branches = file.as_strided((3, 1, 1, 4, 4), (step, 0, 0, 4, 1))
found, wanted = (torch.empty(1, 1, 1, 4, 4).half() for _ in range(2))
for prediction, out in ((branches, found), (branches.contiguous(), wanted)):
    rest = table, torch.tensor(0), [3.0, 2.0], None, None, None, None, None, 0, out
    launch_guided_step(near[:, :, :1], prediction, *rest)
assert torch.equal(found, wanted)
""")


# ---- on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("branches", SCALES)
@pytest.mark.parametrize("kind", ["nothing", "frames", "cells"])
def test_gpu_at_real_sizes(within_budget, device, rand, kind, branches):
    scales = SCALES[branches]
    for B, C, T, H, W in ((8, 4, 16, 32, 32), (1, 16, 13, 64, 64), (1, 3, 5, 90, 161)):
        x, clean, noise = (rand(B, C, T, H, W) for _ in range(3))
        prediction = rand((len(scales) + 1) * B, C, T, H, W)
        known = draw_known(kind, B, T, H, W, device)
        rest = None, known, None if known is None else clean, noise
        check(within_budget, STEP, x, prediction, TABLES["ddpm"].to(device), 3, scales, *rest)


@pytest.mark.gpu
def test_gpu_graph_takes_every_step_from_an_advanced_index(device, rand):
    x, prediction, table = rand(2, 4, 8, 32, 32), rand(4, 4, 8, 32, 32), TABLES["ddpm"].to(device)
    state, step = x.clone(), torch.zeros(1, dtype=torch.int64, device=device)

    def advance():
        guided_step(state, prediction, table, step, guidance=(2.0,), seed=5, out=state)
        step.add_(1)

    advance()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance()
    state.copy_(x)
    step.zero_()
    for row in range(len(table)):
        at = torch.tensor([row], device=device)
        x = guided_step(x, prediction, table, at, guidance=(2.0,), seed=5)
        graph.replay()
        assert torch.equal(state, x)


@pytest.mark.gpu
def test_gpu_agrees_with_the_cpu(device, rand):
    x, prediction = rand(3, 4, 5, 24, 24), rand(3, 4, 5, 24, 24)
    at, table = torch.tensor([4]), TABLES["noisy ddim"]
    theirs = guided_step(x.cpu(), prediction.cpu(), table, at, seed=-3, stream=2**32 - 1)
    ours = guided_step(x, prediction, table.to(device), at.to(device), seed=-3, stream=2**32 - 1)
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=2e-6)
