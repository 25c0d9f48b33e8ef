"""The Triton kernels of the pyramid's ops: in the interpreter, and on a GPU."""

import pytest
import torch

from fastvid.functional import latent_pyramid, pyramid_renoise, stage_endpoints
from tests.kernels.noising_cases import LAYOUTS
from tests.kernels.pyramid_renoise_cases import (
    ENDPOINTS,
    GAMMAS,
    HALVE,
    KINDS,
    LEVELS,
    RENOISE,
    check_endpoints,
    check_halve,
    check_renoise,
    noise_of,
)

# Planes of 15, 35, 64 and 300 blocks: one piece that is not full, one that is, two.
SHAPES = [(2, 2, 2, 3, 5), (1, 1, 2, 5, 7), (1, 1, 1, 8, 8), (1, 1, 1, 10, 30)]


def launch_renoise(*arguments):
    from fastvid.kernels.pyramid_renoise import kernel

    return kernel.launch_renoise(*arguments)


def launch_halve(*arguments):
    from fastvid.kernels.pyramid_renoise import kernel

    return kernel.launch_halve(*arguments)


def launch_endpoints(*arguments):
    from fastvid.kernels.pyramid_renoise import kernel

    return kernel.launch_endpoints(*arguments)


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", GAMMAS[:2])
def test_kernel_rounds_no_worse_than_eager(within_budget, guard_bands, rand, gamma, kind, dtype):
    for shape in SHAPES:
        check_renoise(within_budget, launch_renoise, rand(*shape, dtype=dtype), gamma, kind)
    guard_bands()


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_reduces_no_worse_than_eager(within_budget, guard_bands, rand, dtype):
    for B, C, T, H, W in SHAPES:
        for factor in (1.0, 2.0):
            x = rand(B, C, T, 2 * H, 2 * W, dtype=dtype)
            check_halve(within_budget, launch_halve, x, factor)
    guard_bands()


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("endpoints", [False, True])
def test_kernel_endpoints_round_no_worse_than_eager(
    within_budget, guard_bands, rand, endpoints, lowest, dtype
):
    for B, C, T, H, W in SHAPES:
        latents, noise = (rand(B, C, T, 2 * H, 2 * W, dtype=dtype) for _ in range(2))
        lower = None if lowest else rand(B, C, T, H, W, dtype=dtype)
        check_endpoints(within_budget, launch_endpoints, latents, lower, noise, endpoints)
    guard_bands()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_kernels_take_any_strides(device, rand, layout):
    x, big, eps = (LAYOUTS[layout](rand(2, 2, 2, 2 * n, 4 * n)) for n in (2, 4, 4))
    for kind in ("drawn", "blocks"):
        own, _ = noise_of(kind, x)
        wanted = launch_renoise(x.contiguous(), *LEVELS, 0.2, *own)
        assert torch.equal(launch_renoise(x, *LEVELS, 0.2, *own), wanted)
    assert torch.equal(launch_halve(big, 1.0), launch_halve(big.contiguous(), 1.0))
    rest = 0.8, 0.3, torch.tensor([0.25, 0.5], device=device), True
    found = launch_endpoints(big, x, eps, *rest)
    wanted = launch_endpoints(*(t.contiguous() for t in (big, x, eps)), *rest)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("interpreter")
def test_kernels_on_nothing(device, rand):
    for shape in ((0, 2, 3, 4, 4), (2, 2, 0, 4, 4), (2, 2, 3, 0, 4)):
        x, big = rand(*shape), rand(*shape[:3], 2 * shape[3], 8)
        assert launch_renoise(x, *LEVELS, 0.2, big, None, 0).shape == big.shape
        assert launch_halve(big, 1.0).shape == x.shape
        ratio = torch.ones(shape[0], device=device)
        ends = launch_endpoints(big, x, big, 0.8, 0.3, ratio, True)
        assert [end.shape for end in ends] == [big.shape] * 4


def test_planes_beyond_int32_are_refused():
    pytest.importorskip("triton")
    x = torch.empty(1, 1, 1, 2**16, 2**15, device="meta")
    with pytest.raises(NotImplementedError, match=r"less than 2\*\*31 numbers, got 131072 x 65536"):
        launch_renoise(x, *LEVELS, 0.2, None, torch.zeros(1), 0)
    with pytest.raises(NotImplementedError, match="got 65536 x 32768"):
        launch_halve(x, 1.0)
    with pytest.raises(NotImplementedError, match="got 65536 x 32768"):
        launch_endpoints(x, None, x, 1.0, 0.3, torch.ones(1), False)


def test_few_compilations_serve_every_clip(compilations):
    printed = compilations("""
from fastvid.kernels.pyramid_renoise import kernel
shapes = (
    (1, 4, 16, 32), (2, 4, 5, 32), (3, 8, 1, 48), (1, 16, 13, 64), (4, 4, 16, 64),
    (5, 3, 7, 80), (2, 16, 32, 96), (3, 4, 9, 48), (8, 4, 17, 128), (6, 8, 2, 96),
)
for B, C, T, H in shapes:
    x, seeds = torch.zeros(B, C, T, H, H), torch.zeros(B).long()
    big = torch.zeros(B, C, T, 2 * H, 2 * H)
    for alpha, stream in ((0.6, 0), (0.75, 12345)):
        kernel.launch_renoise(x, alpha, 0.5, 0.2, None, seeds, stream)
        kernel.launch_renoise(x, alpha, 0.5, 0.2, big, None, 0)
    kernel.launch_halve(big, 2.0)
    kernel.launch_endpoints(big, x, big, 0.8, 0.3, torch.ones(B), False)
print(count(kernel._renoise), count(kernel._halve), count(kernel._endpoints))
""")
    # Drawn noise and given.
    assert printed.split() == ["2", "1", "1"]


@pytest.mark.usefixtures("interpreter")
def test_offsets_past_2_to_the_31(child, tmp_path):
    """A sparse file stands in for a large tensor; an int32 offset would leave it and crash."""
    child(f"""
import torch
from fastvid.kernels.pyramid_renoise.kernel import launch_endpoints, launch_halve, launch_renoise
step = 2**30 + 16
file = torch.from_file({str(tmp_path / "sparse")!r}, True, 2 * step + 16, dtype=torch.float16)
for shape, axis in (((3, 1, 1, 4, 4), 0), ((1, 3, 1, 4, 4), 1), ((1, 1, 3, 4, 4), 2)):
    strides = [0, 0, 0, 4, 1]
    strides[axis] = step
    x = file.as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    near, seeds = x.contiguous(), torch.arange(shape[0])
    assert torch.equal(*(launch_renoise(t, 0.6, 0.7, 0.2, None, seeds, 0) for t in (x, near)))
    assert torch.equal(*(launch_halve(t, 1.0) for t in (x, near)))
    ratio = torch.ones(shape[0]) / 3
    for a, b in zip(*(launch_endpoints(t, None, t, 1.0, 0.3, ratio, True) for t in (x, near))):
        assert torch.equal(a, b)
""")


# ---- on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_at_real_sizes(within_budget, device, rand, kind, dtype):
    """768p and 384p frames, and a clip."""
    for B, C, T, H, W in ((1, 16, 1, 48, 80), (2, 16, 1, 12, 20), (1, 16, 16, 24, 40)):
        x, big = rand(B, C, T, H, W, dtype=dtype), rand(B, C, T, 2 * H, 2 * W, dtype=dtype)
        check_renoise(within_budget, RENOISE, x, 1 / 3, kind)
        check_halve(within_budget, HALVE, big, 2.0)
        check_endpoints(within_budget, ENDPOINTS, big, x, big.flip(0), True)


@pytest.mark.gpu
def test_gpu_draws_the_noise_of_the_cpu(device):
    for shape in ((3, 4, 2, 24, 40), (2, 3, 5, 17, 23)):
        x = torch.zeros(shape)
        for stream in (0, 2**32 - 1):
            theirs, ours = (
                pyramid_renoise(x.to(where), 1.0, 1.0, gamma=0.2, seed=-3, stream=stream)
                for where in ("cpu", device)
            )
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=2e-6)


@pytest.mark.gpu
def test_gpu_graph_draws_fresh_noise_from_an_advanced_seed(device, rand):
    x, seed = rand(2, 16, 1, 24, 40), torch.tensor(0, device=device)
    ratio = torch.ones(2, device=device)

    def step():
        up = pyramid_renoise(x, *LEVELS, seed=seed)
        low, same = latent_pyramid(up, 2)
        return up, stage_endpoints(same, low, up, start_sigma=0.8, end_sigma=0.3, ratio=ratio)

    step()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, ends = step()
    graph.replay()
    before = captured.clone()
    seed += 5
    graph.replay()
    assert not torch.equal(before, captured)
    again, others = step()
    assert torch.equal(captured, again)
    assert all(torch.equal(a, b) for a, b in zip(ends, others, strict=True))
