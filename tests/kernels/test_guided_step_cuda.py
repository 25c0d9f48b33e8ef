"""The CUDA kernel of `guided_step`: its threads one by one on the CPU, and all of it on a GPU."""

import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastvid.functional import guided_step
from fastvid.kernels._shared import native, paths, philox
from fastvid.kernels.guided_step import compiled
from tests.kernels.guided_step_cases import SCALES, STEP, TABLES, check, draw_known
from tests.kernels.noising_cases import LAYOUTS

SOURCE = Path(__file__).with_name("guided_step_threads.cpp")
SHAPES = [(2, 1, 2, 4, 6), (2, 3, 2, 16, 16), (1, 2, 2, 24, 32), (3, 2, 3, 5, 7), (1, 2, 2, 15, 17)]


@pytest.fixture(scope="session")
def threads(tmp_path_factory):
    """The op that runs every thread of a launch in turn, from the source that CUDA compiles."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    from torch.utils.cpp_extension import include_paths, library_paths

    library = tmp_path_factory.mktemp("threads") / "threads.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    # A GPU does not read what is not aligned; a CPU would.
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    includes = [f"-I{path}" for path in include_paths()]
    links = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-lc10"]
    command = [compiler, *flags, *includes, str(SOURCE), "-o", str(library), *links]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(library)
    return torch.ops.fastvid_threads.guided_step


@pytest.fixture(params=["threads", pytest.param("GPU", marks=pytest.mark.gpu)])
def launch(request):
    """A function with the arguments of the op that returns the next state."""
    if request.param == "GPU" and not native.cuda_loaded():
        pytest.skip(f"the compiled part has no CUDA kernels: {native.BUILD}")
    if request.param == "GPU":
        op, place = torch.ops.fastvid_cuda.guided_step, "cuda"
    else:
        op, place = request.getfixturevalue("threads"), "cpu"

    def run(*arguments):
        x, *rest = (t.to(place) if isinstance(t, torch.Tensor) else t for t in arguments)
        out = torch.full(x.shape, torch.nan, device=place)
        compiled.call_step(op, x, *rest, out)
        return out.cpu()

    return run


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("kind", ["nothing", "frames for all", "cells"])
@pytest.mark.parametrize("branches", SCALES)
def test_rounds_no_worse_than_eager(within_budget, launch, draw, branches, kind, clip):
    scales, table = SCALES[branches], TABLES["noisy ddim"]
    for B, C, T, H, W in SHAPES:
        x, clean, noise = (draw(B, C, T, H, W) for _ in range(3))
        prediction = draw((len(scales) + 1) * B, C, T, H, W)
        known = draw_known(kind, B, T, H, W)
        rest = scales, clip, known, None if known is None else clean
        for given in (noise, None):
            check(within_budget, launch, x, prediction, table, 2, *rest, given)


@pytest.mark.parametrize("model", [torch.bfloat16, torch.float16])
def test_a_narrower_prediction_is_widened_exactly(launch, draw, model):
    for shape in ((1, 2, 2, 16, 16), (1, 2, 3, 5, 7)):
        x, prediction = draw(*shape), draw(2, *shape[1:]).to(model)
        rest = TABLES["ddim"], torch.tensor(3), [7.5], *[None] * 5, 0
        assert torch.equal(launch(x, prediction, *rest), launch(x, prediction.float(), *rest))


@pytest.mark.parametrize("shape", SHAPES)
def test_draws_the_noise_by_number(launch, draw, shape):
    x, prediction, table = draw(*shape), draw(*shape), TABLES["ddpm"]
    seeds = torch.arange(-1, shape[0] - 1)
    for row, stream in ((3, 7), (1, 2**32 - 1), (7, 0)):
        noise = philox.normal(seeds, x[0].numel(), (stream + row) % 2**32).view(shape)
        at, start = torch.tensor(row), (x, prediction, table)
        found = launch(*start, at, [], None, None, None, None, seeds, stream)
        wanted = launch(*start, at, [], None, None, None, noise, None, 0)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("kind", ["frames", "cells"])
def test_takes_any_strides(launch, draw, layout, kind):
    x, clean, noise = (LAYOUTS[layout](draw(2, 2, 3, 4, 8)) for _ in range(3))
    prediction = LAYOUTS[layout](draw(6, 2, 3, 4, 8))
    known = draw_known(kind, 2, 3, 4, 8).repeat_interleave(2, dim=1)[:, ::2]
    rest = TABLES["ddpm"], torch.tensor(2), [3.0, 2.0], None
    found = launch(x, prediction, *rest, known, clean, noise, None, 0)
    x, prediction, *given = (t.contiguous() for t in (x, prediction, known, clean, noise))
    assert torch.equal(found, launch(x, prediction, *rest, *given, None, 0))


def test_takes_planes_that_start_anywhere(threads, draw):
    """Views whose first number is no multiple of four are not read four at a time."""
    x, noise = draw(2, 2, 3, 4, 8), draw(2, 2, 3, 4, 8)

    def step(state, prediction, noise, start):
        out = torch.empty(start + x.numel())[start:].view(x.shape)
        rest = TABLES["noisy ddim"], torch.tensor(2), [], None, None, None, noise, None, 0, out
        compiled.call_step(threads, state, prediction, *rest)
        return out

    wanted = step(x, x, noise, 0)
    late = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (x, noise)]
    apart = [torch.nn.functional.pad(t.flatten(3), (0, 1))[..., :-1] for t in (x, noise)]
    assert late[0].data_ptr() % 16
    assert apart[0].stride(2) == 33
    for odd, odd_noise in (late, [t.unflatten(-1, (4, 8)) for t in apart]):
        for arguments in ((odd, x, noise), (x, odd, noise), (x, x, odd_noise)):
            assert torch.equal(step(*arguments, 0), wanted)
    assert torch.equal(step(x, x, noise, 1), wanted)


def test_skips_what_it_need_not_read(launch, draw):
    """NaN in known cells of x and prediction, in clean elsewhere, and in noise times 0."""
    x, clean, prediction = draw(2, 2, 4, 4, 4), draw(2, 2, 4, 4, 4), draw(2, 2, 4, 4, 4)
    known = draw_known("frames", 2, 4, 4, 4)
    cells = known[:, None, :, None, None]
    rest = TABLES["ddpm"], torch.tensor(7), [], None, known
    wanted = launch(x, prediction, *rest, clean, None, None, 0)
    x, prediction = (t.masked_fill(cells, torch.nan) for t in (x, prediction))
    clean, noise = clean.masked_fill(~cells, torch.nan), torch.full_like(x, torch.nan)
    assert torch.equal(launch(x, prediction, *rest, clean, noise, None, 0), wanted)


def test_works_in_place_and_on_nothing(threads, draw):
    x, prediction = draw(2, 2, 3, 5, 7), draw(4, 2, 3, 5, 7)
    known, clean = draw_known("cells", 2, 3, 5, 7), draw(2, 2, 3, 5, 7)
    rest = TABLES["ddim"], torch.tensor(1), [2.0], 1.0, known, clean, None, None, 0
    wanted = torch.empty_like(x)
    compiled.call_step(threads, x, prediction, *rest, wanted)
    compiled.call_step(threads, x, prediction, *rest, x)
    assert torch.equal(x, wanted)
    empty = torch.zeros(2, 2, 0, 4, 4)
    compiled.call_step(threads, empty, torch.cat([empty, empty]), *rest, empty)


def test_stays_inside_the_table(launch, draw):
    x, prediction, table = draw(1, 1, 1, 4, 4), draw(1, 1, 1, 4, 4), TABLES["euler"]
    for outside, nearest in ((-1, 0), (8, 7), (2**40, 7), (-(2**40), 0)):
        found, wanted = (
            launch(x, prediction, table, torch.tensor(row), [], *[None] * 5, 0)
            for row in (outside, nearest)
        )
        assert torch.equal(found, wanted)


def test_writes_nothing_beside_its_result(threads, draw):
    """Around the last plane, whose pieces overhang."""
    for H, W in ((5, 7), (16, 16), (4, 6)):
        x = draw(1, 2, 2, H, W)
        room = torch.full((x.numel() + 1024,), 77.0)
        out = room[512:-512].view(x.shape)
        compiled.call_step(threads, x, x, TABLES["ddim"], torch.tensor(1), [], *[None] * 5, 0, out)
        assert (out != 77).all()
        assert (room[:512] == 77).all()
        assert (room[-512:] == 77).all()


def test_is_taken_only_where_it_is_there_and_fits(monkeypatch):
    x = torch.zeros(1, 1, 1, 2, 2)
    assert not compiled.cuda_serves(x, None)
    capability = (8, 0)
    monkeypatch.setattr(compiled, "CUDA_NUMBERS", 4)
    monkeypatch.setattr(native, "cuda_loaded", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compiled.cuda_serves(x, None)
    assert compiled.cuda_serves(x, x)
    assert not compiled.cuda_serves(x.expand(2, 1, 1, 2, 2), None)
    assert not compiled.cuda_serves(x.bfloat16(), None)
    assert not compiled.cuda_serves(x, x.half())
    capability = (7, 5)
    assert not compiled.cuda_serves(x, None)
    capability = (9, 0)
    monkeypatch.setattr(native, "cuda_loaded", lambda: False)
    assert not compiled.cuda_serves(x, None)


@pytest.mark.gpu
@pytest.mark.skipif(not native.cuda_loaded(), reason="the compiled part has no CUDA kernels")
def test_gpu_takes_it_up_to_the_measured_size(monkeypatch, caplog, within_budget, rand, device):
    x, prediction, table = rand(1, 4, 2, 16, 16), rand(2, 4, 2, 16, 16), TABLES["ddpm"].to(device)
    for numbers, name in ((x.numel(), "CUDA"), (x.numel() - 1, "Triton")):
        paths.announce.cache_clear()
        monkeypatch.setattr(compiled, "CUDA_NUMBERS", numbers)
        with caplog.at_level(logging.DEBUG, "fastvid.kernels"):
            check(within_budget, STEP, x, prediction, table, 3, [7.5], None, None, None, None)
        assert caplog.records[-1].getMessage() == f"guided_step: {name}"


@pytest.mark.gpu
@pytest.mark.skipif(not native.cuda_loaded(), reason="the compiled part has no CUDA kernels")
def test_gpu_graph_takes_every_step_from_an_advanced_index(monkeypatch, device, rand):
    x, prediction, table = rand(2, 4, 8, 32, 32), rand(4, 4, 8, 32, 32), TABLES["ddpm"].to(device)
    monkeypatch.setattr(compiled, "CUDA_NUMBERS", x.numel())
    state, step = x.clone(), torch.zeros(1, dtype=torch.int64, device=device)
    seeds = torch.tensor([5, 6], device=device)
    guided_step(x, prediction, table, step, guidance=(2.0,), seed=seeds)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        guided_step(state, prediction, table, step, guidance=(2.0,), seed=seeds, out=state)
        step.add_(1)
    for row in range(len(table)):
        at = torch.tensor([row], device=device)
        x = guided_step(x, prediction, table, at, guidance=(2.0,), seed=seeds)
        graph.replay()
        assert torch.equal(state, x)
