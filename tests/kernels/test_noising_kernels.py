"""The Triton kernels of `noising` and `masked_mse`: in the interpreter, and on a GPU."""

import pytest
import torch

from fastvid.functional import masked_mse, noising
from fastvid.kernels._shared import philox
from tests.kernels.noising_cases import (
    KNOWN,
    LAYOUTS,
    MSE,
    MSE_BACKWARD,
    NOISING,
    TARGETS,
    check_mse,
    check_noising,
    draw_known,
    draw_levels,
    gradients,
)


def launch(*arguments):
    from fastvid.kernels.noising.kernel import launch_noising

    return launch_noising(*arguments)


def launch_mse(*arguments):
    from fastvid.kernels.noising import kernel

    return kernel.launch_mse(*arguments)


def launch_mse_backward(*arguments):
    from fastvid.kernels.noising import kernel

    return kernel.launch_mse_backward(*arguments)


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KNOWN)
def test_kernel_rounds_no_worse_than_eager(
    within_budget, guard_bands, device, rand, kind, target, dtype
):
    for (B, C, T, H, W), per_frame in (((2, 3, 3, 4, 6), True), ((2, 2, 3, 5, 7), False)):
        x0, noise = rand(B, C, T, H, W, dtype=dtype), rand(B, C, T, H, W, dtype=dtype)
        known = draw_known(kind, B, T, H, W, device)
        levels = draw_levels(B, T if per_frame else 1, device)
        for own in (None, draw_levels(1, T, device)) if known is not None else (None,):
            check_noising(within_budget, launch, x0, noise, levels, known, own, target)
    guard_bands()


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("average", ["unknown", "all"])
@pytest.mark.parametrize("kind", KNOWN)
def test_loss_kernels_round_no_worse_than_eager(
    within_budget, guard_bands, device, rand, kind, average, dtype
):
    for B, C, T, H, W in ((2, 3, 3, 4, 6), (3, 2, 2, 33, 35)):
        pred, target = rand(B, C, T, H, W, dtype=dtype), rand(B, C, T, H, W, dtype=dtype)
        known = draw_known(kind, B, T, H, W, device)
        check_mse(within_budget, launch_mse, launch_mse_backward, pred, target, known, average)
    guard_bands()


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize(
    "shape", [(2, 2, 3, 4, 4), (2, 3, 2, 5, 7), (1, 2, 2, 33, 33), (1, 3, 5, 1, 1)]
)
def test_kernel_draws_the_noise_by_number(guard_bands, device, rand, shape):
    """Planes of 16, 35, 1089 and 1 numbers: counters straddle rows, planes and blocks."""
    B, _, T, H, W = shape
    x0, levels = rand(*shape), draw_levels(B, 1, device)
    seeds = torch.arange(-1, B - 1, device=device)
    noise = philox.normal(seeds, x0[0].numel(), 7).view(shape)
    known = draw_known("cells", B, T, H, W, device)
    for target in TARGETS:
        rest = known, None, None, target
        found = launch(x0, *levels, None, seeds, 7, *rest)
        wanted = launch(x0, *levels, noise, None, 0, *rest)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-6)
    guard_bands()


@pytest.mark.usefixtures("interpreter")
def test_kernel_takes_seeds_of_any_stride(device, rand):
    x0, levels = rand(4, 1, 2, 4, 4), draw_levels(4, 1, device)
    for seeds in (torch.tensor([3], device=device).expand(4), torch.arange(8, device=device)[::2]):
        found, wanted = (
            launch(x0, *levels, None, philox.sample_seeds(s, 4, device), 7, *[None] * 3, "v")
            for s in (seeds, seeds.contiguous())
        )
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("kind", ["frames", "cells"])
def test_kernels_take_any_strides(device, rand, layout, kind):
    x0, noise = (LAYOUTS[layout](rand(2, 3, 4, 4, 4)) for _ in range(2))
    known = draw_known(kind, 2, 4, 4, 4, device).repeat_interleave(2, dim=1)[:, ::2]
    levels = draw_levels(2, 4, device)
    packed = x0.contiguous(), noise.contiguous(), known.contiguous()
    found = launch(x0, *levels, noise, None, 0, known, None, None, "v")
    wanted = launch(packed[0], *levels, packed[1], None, 0, packed[2], None, None, "v")
    found += launch_mse(x0, noise, known, "all")
    wanted += launch_mse(*packed, "all")
    dloss = torch.ones(1, device=device).expand(2)
    found += (launch_mse_backward(dloss, x0, noise, known, found[-1]),)
    wanted += (launch_mse_backward(dloss.contiguous(), *packed, wanted[-1]),)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("interpreter")
def test_kernels_on_nothing(device, rand):
    for shape in ((0, 2, 3, 4, 4), (2, 2, 0, 4, 4), (2, 2, 3, 0, 4)):
        x0 = rand(*shape)
        levels = draw_levels(max(shape[0], 1), 1, device)
        found = launch(x0, *levels, x0, None, 0, None, None, None, "v")
        assert [t.shape for t in found] == [x0.shape] * 2
        loss, weight = launch_mse(x0, x0, None, "all")
        assert loss.shape == shape[:1]
        assert loss.isnan().all()
        assert launch_mse_backward(loss, x0, x0, None, weight).shape == x0.shape


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("average", ["unknown", "all"])
def test_kernel_has_no_loss_where_all_is_known(device, rand, average):
    pred, target = rand(2, 1, 2, 4, 4), rand(2, 1, 2, 4, 4)
    known = torch.tensor([[True, False], [True, True]], device=device)
    loss, weight = launch_mse(pred, target, known, average)
    assert loss.isnan().tolist() == [False, True]
    hidden = pred.masked_fill(known[:, None, :, None, None], torch.nan)
    assert torch.equal(launch_mse(hidden, target, known, average)[0][0], loss[0])
    assert launch_mse_backward(loss, hidden, target, known, weight)[0].isfinite().all()


def test_few_compilations_serve_every_clip(compilations):
    printed = compilations("""
from fastvid.kernels.noising import kernel
shapes = (
    (1, 4, 16, 32), (2, 4, 5, 32), (3, 8, 1, 48), (1, 16, 13, 64), (4, 4, 16, 64),
    (5, 3, 7, 40), (2, 16, 32, 96), (3, 4, 9, 36), (8, 4, 17, 128), (6, 8, 2, 72),
)
for B, C, T, H in shapes:
    x, level, known = torch.zeros(B, C, T, H, H), torch.ones(B, 1), torch.zeros(B, T) > 0
    for noise, seeds, stream in ((x, None, 0), (None, torch.zeros(B).long(), 12345)):
        kernel.launch_noising(x, level, level, noise, seeds, stream, known, None, None, "v")
    loss, weight = kernel.launch_mse(x, x, known, "all")
    kernel.launch_mse_backward(loss, x, x, known, weight)
print(count(kernel._noising), count(kernel._square_sums), count(kernel._mean), count(kernel._slope))
""")
    # One frame or more; if more, rows of `known` a multiple of 16 long or not: 3. Where a number
    # per sample is read, one sample alone has stride 0: 4. With given and with drawn noise: 8.
    assert printed.split() == ["8", "3", "1", "4"]


@pytest.mark.usefixtures("interpreter")
def test_offsets_past_2_to_the_31(child, tmp_path):
    """A sparse file stands in for a large tensor; an int32 offset would leave it and crash."""
    child(f"""
import torch
from fastvid.kernels.noising.kernel import launch_mse, launch_mse_backward, launch_noising
step = 2**30 + 16
file = torch.from_file({str(tmp_path / "sparse")!r}, True, 2 * step + 16, dtype=torch.float16)
level = torch.ones(1, 1)
for shape, axis in (((3, 1, 1, 4, 4), 0), ((1, 3, 1, 4, 4), 1), ((1, 1, 3, 4, 4), 2)):
    strides = [0, 0, 0, 4, 1]
    strides[axis] = step
    x = file.as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    near = x.contiguous()
    for a, b in zip(*(launch_noising(t, level, level, t, None, 0, None, None, None, "v")
                      for t in (x, near))):
        assert torch.equal(a, b)
    loss, weight = launch_mse(x, near * 2, None, "all")
    assert torch.equal(loss, launch_mse(near, near * 2, None, "all")[0])
    for a, b in zip(launch_mse_backward(loss, x, near * 2, None, weight),
                    launch_mse_backward(loss, near, near * 2, None, weight)):
        assert torch.equal(a, b)
""")


# ---- on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("target", TARGETS)
def test_gpu_bf16_at_real_sizes(within_budget, device, rand, kind, target):
    for B, C, T, H, W in ((8, 4, 16, 32, 32), (2, 16, 13, 64, 64), (1, 3, 5, 90, 161)):
        x0, noise = (rand(B, C, T, H, W, dtype=torch.bfloat16) for _ in range(2))
        known = draw_known(kind, B, T, H, W, device)
        levels = draw_levels(B, T, device)
        check_noising(within_budget, NOISING, x0, noise, levels, known, None, target)
        check_mse(within_budget, MSE, MSE_BACKWARD, x0, noise, known, "unknown")


@pytest.mark.gpu
def test_gpu_draws_the_noise_of_the_cpu(device, rand):
    for shape in ((3, 4, 16, 32, 32), (2, 3, 5, 45, 83)):
        x0, level = torch.zeros(shape), torch.ones(shape[0])
        for stream in (0, 2**32 - 1):
            theirs, ours = (
                noising(x0.to(d), level.to(d), level.to(d), seed=-3, stream=stream, target="eps")
                for d in (torch.device("cpu"), device)
            )
            torch.testing.assert_close(ours[1].cpu(), theirs[1], rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_gpu_graph_draws_fresh_noise_from_an_advanced_seed(device, rand):
    x0, level, seed = rand(2, 4, 8, 32, 32), torch.ones(2, device=device), torch.tensor(0).cuda()
    known = draw_known("frames", 2, 8, 32, 32, device)

    def step():
        noisy, made = noising(x0, level, level, seed=seed, known=known)
        return noisy, masked_mse(noisy, made, known)

    step()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    before = captured[0].clone()
    seed += 5
    graph.replay()
    assert not torch.equal(before, captured[0])
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_loss_repeats_its_bits(device, rand):
    pred, target = rand(4, 16, 13, 64, 64), rand(4, 16, 13, 64, 64)
    known = draw_known("cells", 4, 13, 64, 64, device)
    runs = [
        (masked_mse(pred, target, known), *gradients(
            lambda p: masked_mse(p, target, known), torch.ones(4, device=device), pred))
        for _ in range(10)
    ]  # fmt: skip
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_numbers(device):
    x0 = torch.zeros(1, 64, 33, 1024, 1024, dtype=torch.bfloat16, device=device)
    level = torch.ones(1, device=device)
    noisy, _ = noising(x0, level, level, seed=1, target="x0")
    tail = philox.philox(
        tuple(torch.tensor([c]) for c in (x0.numel() // 4 - 1, 0, 0, 0)), torch.tensor(1)
    )
    wanted = torch.stack([*philox.box_muller(*tail[:2]), *philox.box_muller(*tail[2:])]).flatten()
    torch.testing.assert_close(noisy.flatten()[-4:].float().cpu(), wanted, rtol=1e-2, atol=1e-2)
    assert masked_mse(noisy[:, :, -1:], x0[:, :, -1:]).isfinite().all()
