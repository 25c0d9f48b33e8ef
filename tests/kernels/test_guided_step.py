"""The promises of `guided_step`. The kernels' own are in `test_guided_step_kernels.py`."""

import logging

import pytest
import torch

from fastvid.diffusion import schedule, steps, tables
from fastvid.functional import guided_step
from fastvid.kernels._shared import paths, philox
from tests.kernels.guided_step_cases import (
    CHAIN,
    SCALES,
    STEP,
    TABLES,
    check,
    draw_known,
    eager,
    exactly,
)
from tests.kernels.noising_cases import LAYOUTS

INTO = torch.ops.fastvid.guided_step_into.default
SHAPES = [(2, 4, 3, 8, 8), (3, 2, 4, 5, 7), (2, 3, 2, 24, 24)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# ---- what it computes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("kind", ["nothing", "frames", "frames for all", "cells", "cells for all"])
@pytest.mark.parametrize("branches", SCALES)
def test_cpu_rounds_no_worse_than_eager(within_budget, cpu_path, branches, kind, clip, dtype):
    torch.manual_seed(0)
    scales = SCALES[branches]
    for B, C, T, H, W in SHAPES:
        x, clean, noise = torch.randn(3, B, C, T, H, W).to(dtype)
        prediction = torch.randn((len(scales) + 1) * B, C, T, H, W).to(dtype)
        known = draw_known(kind, B, T, H, W)
        rest = known, None if known is None else clean
        for table, given in (("ddim", None), ("noisy ddim", noise), ("euler", None)):
            coefficients = TABLES[table]
            check(within_budget, STEP, x, prediction, coefficients, 2, scales, clip, *rest, given)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16])
def test_a_model_may_be_narrower_than_the_state(within_budget, cpu_path, state, model):
    torch.manual_seed(0)
    x, prediction, noise = torch.randn(3, 2, 3, 4, 5, 6)
    x, prediction, noise = x.to(state), prediction.to(model), noise.to(model)
    row = TABLES["noisy ddim"][1]
    found = guided_step(x, prediction, TABLES["noisy ddim"], torch.tensor(1), noise=noise)
    rest = row, [], None, None, None, noise
    assert found.dtype == state
    plain = eager(x.float(), prediction.float(), *rest[:-1], noise.float()).to(state)
    within_budget(found, plain, exactly(x, prediction, *rest))


def test_float64_is_computed_in_float64(cpu_path):
    x, prediction = torch.randn(2, 2, 3, 4, 5, 6, dtype=torch.float64)
    found = guided_step(x, prediction, TABLES["ddim"], torch.tensor(2), clip=0.5)
    exact = exactly(x, prediction, TABLES["ddim"][2], [], 0.5)
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-13)
    table = tables.ddim_table(CHAIN, prediction="v", dtype=torch.float64)
    found = guided_step(x, prediction, table, torch.tensor(2), clip=0.5)
    wanted = steps.ddim_step(prediction, x, len(CHAIN) - 3, CHAIN, prediction="v", clip=0.5)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_three_branches_take_the_scale_of_the_text_first(cpu_path):
    """e(0,0) + s_I (e(I,0) - e(0,0)) + s_T (e(I,T) - e(I,0)), branches in this order."""
    none, image, both = torch.randn(3, 2, 1, 3, 4, 4, dtype=torch.float64)
    guided = none + 1.5 * (image - none) + 7.0 * (both - image)
    prediction, x = torch.cat([none, image, both]), torch.zeros_like(none)
    only_prediction = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0]])
    at = torch.zeros(1, dtype=torch.int64)
    found = guided_step(x, prediction, only_prediction, at, guidance=(7.0, 1.5))
    torch.testing.assert_close(found, guided)
    found = guided_step(x, prediction[:4], only_prediction, at, guidance=(1.5,))
    torch.testing.assert_close(found, none + 1.5 * (image - none))
    same = guided_step(x, prediction, only_prediction, at, guidance=(1, 1))
    torch.testing.assert_close(same, both)


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_ddim_step(cpu_path, rand, eta, prediction, clip):
    output, x, noise = (rand(2, 3, 4, 6, 6).cpu() for _ in range(3))
    table = tables.ddim_table(CHAIN, eta=eta, prediction=prediction)
    for row, index in enumerate(reversed(range(len(CHAIN)))):
        wanted = steps.ddim_step(
            output, x, index, CHAIN, noise=noise, prediction=prediction, eta=eta, clip=clip
        )
        found = guided_step(x, output, table, torch.tensor([row]), noise=noise, clip=clip)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_ddpm_step(cpu_path, rand, variance, prediction, clip):
    output, x, noise = (rand(2, 3, 4, 6, 6).cpu() for _ in range(3))
    table = tables.ddpm_table(CHAIN, prediction=prediction, fixed_variance=variance)
    for row, index in enumerate(reversed(range(len(CHAIN)))):
        options = {"prediction": prediction, "fixed_variance": variance, "clip": clip}
        wanted = steps.ddpm_step(output, x, index, CHAIN, noise=noise, **options)
        found = guided_step(x, output, table, torch.tensor([row]), noise=noise, clip=clip)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-6)


def test_euler_goes_along_the_velocity(cpu_path, rand):
    velocity, x = rand(2, 3, 4, 6, 6).cpu(), rand(2, 3, 4, 6, 6).cpu()
    sigmas = [1.0, 0.7, 0.25, 0.1, 0.0]
    table = tables.euler_table(sigmas)
    for row in range(4):
        found = guided_step(x, velocity, table, torch.tensor(row))
        wanted = x + (sigmas[row + 1] - sigmas[row]) * velocity
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_zero_terminal_snr_starts_from_pure_noise(cpu_path, rand):
    chain = schedule.rescale_zero_terminal_snr(CHAIN)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        tables.ddim_table(chain)
    output, x = rand(1, 2, 3, 4, 4).cpu(), rand(1, 2, 3, 4, 4).cpu()
    found = guided_step(
        x, output, tables.ddim_table(chain, prediction="v"), torch.tensor(0), clip=1.0
    )
    wanted = steps.ddim_step(output, x, len(chain) - 1, chain, prediction="v", clip=1.0)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("sigmas", "says"),
    [([1.0], "two"), ([1.1, 0.5], "in"), ([0.5, 0.5], "fall"), ([0.5, -0.1], "in")],
)
def test_sigmas_fall(sigmas, says):
    with pytest.raises(ValueError, match=f"sigmas must .*{says}"):
        tables.euler_table(sigmas)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 2, 17, 41)])
@pytest.mark.parametrize("kind", ["nothing", "frames", "cells"])
def test_drawn_noise_is_the_noise_by_number_of_its_step(cpu_path, shape, kind):
    B, _, T, H, W = shape
    x, prediction, clean = torch.randn(3, *shape)
    known = draw_known(kind, B, T, H, W)
    rest = {"known": known, "clean": None if known is None else clean, "clip": 1.0}
    table = TABLES["ddpm"]
    for row, stream in ((0, 5), (3, 2**32 - 1), (len(table) - 1, 0)):
        noise = philox.normal(torch.arange(B) + 10, x[0].numel(), (stream + row) % 2**32)
        at = torch.tensor(row)
        found = guided_step(x, prediction, table, at, seed=10, stream=stream, **rest)
        wanted = guided_step(x, prediction, table, at, noise=noise.view(shape), **rest)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-6)
        one = torch.tensor([10] * B)
        other = guided_step(x, prediction, table, at, seed=one, stream=stream, **rest)
        assert torch.equal(found[0], other[0])


def test_known_cells_are_bit_exact_whatever_the_rest_holds(cpu_path):
    clean = torch.tensor([-0.0, 1e-40, 3e38, -1.0]).repeat(1, 1, 2, 1, 1)
    nan = torch.full_like(clean, torch.nan)
    for known in (torch.tensor([[True, True]]), torch.ones(1, 2, 1, 4, dtype=torch.bool)):
        found = guided_step(nan, nan, TABLES["ddpm"], torch.tensor(0), known=known, clean=clean)
        assert torch.equal(found.view(torch.int32), clean.view(torch.int32))


def test_noise_is_not_looked_at_where_it_counts_nothing(cpu_path):
    x, nan = torch.ones(1, 1, 1, 4, 4), torch.full((1, 1, 1, 4, 4), torch.nan)
    assert guided_step(x, x, TABLES["ddpm"], torch.tensor(7), noise=nan).isfinite().all()
    assert guided_step(x, x, TABLES["ddpm"], torch.tensor(6), noise=nan).isnan().all()
    assert guided_step(x, nan, TABLES["ddpm"], torch.tensor(7), clip=1.0).isnan().all()


@pytest.mark.parametrize("kind", ["nothing", "frames", "cells"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_in_place(cpu_path, kind, dtype):
    x, clean, noise = torch.randn(3, 2, 3, 4, 6, 7).to(dtype)
    prediction = torch.randn(4, 3, 4, 6, 7).to(dtype)
    known = draw_known(kind, 2, 4, 6, 7)
    options = {"guidance": (2.0,), "noise": noise, "known": known}
    options["clean"] = None if known is None else clean
    arguments = prediction, TABLES["ddpm"], torch.tensor(2)
    wanted = guided_step(x, *arguments, **options)
    assert guided_step(x, *arguments, **options, out=x) is x
    assert torch.equal(x, wanted)


def test_a_gradient_through_what_was_written_over_is_refused(cpu_path):
    x, weight = torch.ones(1, 1, 1, 2, 2), torch.ones(1, requires_grad=True)
    product = x * weight
    with torch.no_grad():
        guided_step(x, x, TABLES["ddim"], torch.tensor(0), out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("kind", ["frames", "cells"])
def test_any_strides(cpu_path, layout, kind):
    torch.manual_seed(0)
    x, clean, noise, *halves = (LAYOUTS[layout](t) for t in torch.randn(5, 3, 4, 5, 6, 6))
    prediction = LAYOUTS[layout](torch.cat(halves))
    known = draw_known(kind, 3, 5, 6, 6).repeat_interleave(2, dim=1)[:, ::2]
    table = TABLES["ddpm"].repeat_interleave(2, dim=1)[:, ::2]
    options = {"known": known, "clean": clean, "noise": noise}
    found = guided_step(x, prediction, table, torch.tensor(2), guidance=(3.0,), **options)
    options = {name: t.contiguous() for name, t in options.items()}
    x, prediction, table = (t.contiguous() for t in (x, prediction, table))
    wanted = guided_step(x, prediction, table, torch.tensor(2), guidance=(3.0,), **options)
    assert found.is_contiguous()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 4), (2, 2, 0, 4, 4), (2, 2, 3, 0, 4)])
def test_empty(cpu_path, shape):
    x, known = torch.zeros(shape), torch.zeros(shape[0], shape[2], dtype=torch.bool)
    found = guided_step(
        x, torch.cat([x, x]), TABLES["ddpm"], torch.tensor(0), guidance=(2.0,),
        known=known, clean=x, seed=3,
    )  # fmt: skip
    assert found.shape == shape


def test_path_is_logged_once(cpu_path, caplog):
    paths.announce.cache_clear()
    x = torch.ones(1, 1, 1, 2, 2)
    with caplog.at_level(logging.DEBUG, "fastvid.kernels"):
        for _ in range(3):
            guided_step(x, x, TABLES["ddim"], torch.tensor(0))
    name = {"compiled": "C++", "pytorch": "PyTorch"}[cpu_path]
    assert [record.getMessage() for record in caplog.records] == [f"guided_step: {name}"]


# ---- inside PyTorch


@pytest.mark.parametrize("kind", ["nothing", "frames", "cells"])
def test_opcheck(cpu_path, rand, device, kind):
    x, clean, noise, out = (rand(2, 3, 4, 2, 6) for _ in range(4))
    prediction, known = rand(4, 3, 4, 2, 6), draw_known(kind, 2, 4, 2, 6, device)
    clean = None if known is None else clean
    seeds, at = torch.tensor([1, 2], device=device), torch.tensor(1, device=device)
    table = TABLES["ddpm"].to(device)
    start = x, prediction, table, at, [2.0], 1.0, known, clean
    torch.library.opcheck(STEP, (*start, noise, None, 0))
    torch.library.opcheck(STEP, (*start, None, seeds, 3))
    torch.library.opcheck(INTO, (*start, noise, None, 0, out))


def sampling_step(x, prediction, table, at, known, clean, seed):
    x = guided_step(x, prediction, table, at, guidance=(2.0,), known=known, clean=clean, seed=seed)
    return guided_step(x, prediction, table, at, guidance=(2.0,), clip=1.0, out=x)


def step_inputs(rand, device, B, T, H, row):
    x, clean, prediction = rand(B, 3, T, H, H), rand(B, 3, T, H, H), rand(2 * B, 3, T, H, H)
    known, seed = draw_known("frames", B, T, H, H, device), torch.tensor(B, device=device)
    at = torch.tensor([row], device=device)
    return x, prediction, TABLES["ddpm"].to(device), at, known, clean, seed


def test_compiles_once_for_all_sizes_and_steps(cpu_path, device, rand):
    torch._dynamo.reset()
    step = torch.compile(sampling_step, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, T, H, row in ((2, 6, 7, 0), (3, 9, 10, 5), (3, 9, 10, 7)):
            inputs = step_inputs(rand, device, B, T, H, row)
            torch.testing.assert_close(step(*inputs), sampling_step(*inputs))


def test_compiles_where_a_size_is_the_width_of_the_table(device, rand):
    torch._dynamo.reset()
    step = torch.compile(sampling_step, backend="aot_eager", fullgraph=True, dynamic=True)
    inputs = step_inputs(rand, device, 2, 5, 7, 0)
    torch.testing.assert_close(step(*inputs), sampling_step(*inputs))


def test_exports_with_free_sizes(cpu_path, device, rand):
    class Step(torch.nn.Module):
        def forward(self, x, prediction, table, at, known, clean, seed):
            return sampling_step(x, prediction, table, at, known, clean, seed)

    B, T = torch.export.Dim("B", min=2), torch.export.Dim("T", min=2)
    shapes = {"x": {0: B, 2: T}, "prediction": {0: 2 * B, 2: T}, "table": None, "at": None}
    shapes |= {"known": {0: B, 1: T}, "clean": {0: B, 2: T}, "seed": None}
    example = step_inputs(rand, device, 2, 4, 6, 1)
    exported = torch.export.export(Step(), example, dynamic_shapes=shapes).module()
    other = step_inputs(rand, device, 3, 5, 6, 4)
    torch.testing.assert_close(exported(*other), sampling_step(*other))


def test_meta_tensors_pass_through():
    x, table = torch.empty(2, 3, 4, 5, 5, device="meta"), TABLES["ddim"].to("meta")
    at = torch.empty(1, dtype=torch.int64, device="meta")
    assert guided_step(x, x, table, at, seed=1).shape == x.shape
    assert guided_step(x, x, table, at, out=x) is x


def test_has_no_gradient_and_says_so():
    x, leaf = torch.ones(1, 1, 1, 2, 2), torch.ones(1, 1, 1, 2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="guided_step has no gradient: call it under"):
        guided_step(x, leaf, TABLES["ddim"], torch.tensor(0))
    with torch.no_grad():
        assert not guided_step(leaf, leaf, TABLES["ddim"], torch.tensor(0)).requires_grad


# ---- refusals

X, T, AT = torch.zeros(2, 3, 4, 5, 5), TABLES["ddim"], torch.tensor(0)
K = torch.zeros(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((X[0], X, T, AT), {}, ValueError, r"x must be \(B, C, T, H, W\), got \(3, 4, 5, 5\)"),
        ((X.long(), X, T, AT), {}, TypeError, "x must be float32.*got torch.int64"),
        ((X, X[:1], T, AT), {}, ValueError, r"prediction must be \(B, C, T, H, W\), B=2"),
        ((X, X, T, AT), {"guidance": (2.0,)}, ValueError, r"prediction must be \(2B, C"),
        ((X, X, T, AT), {"guidance": 2.0}, TypeError, "guidance must be None or a tuple"),
        ((X, X, T, AT), {"guidance": ()}, ValueError, "guidance must be .*got 0 numbers"),
        ((X, X, T[:, :4], AT), {}, ValueError, r"table must be \(S, 5\), got \(8, 4\)"),
        ((X, X, T.double(), AT), {}, TypeError, "table must be float32"),
        ((X, X, T[:0], AT), {}, TypeError, "table must be float32 with at least one row"),
        ((X, X, T, 0), {}, TypeError, "step must be an int64 Tensor of one element, got 0"),
        ((X, X, T, AT.int()), {}, TypeError, "step must be an int64 Tensor"),
        ((X, X, T, AT + 8), {}, ValueError, r"step must be in \[0, 8\), a row of table, got 8"),
        ((X, X, T, AT - 1), {}, ValueError, r"step must be in \[0, 8\), a row of table, got -1"),
        ((X, X, T, AT), {"clip": 0.0}, ValueError, "clip must be above 0 or None, got 0.0"),
        ((X, X, T, AT), {"known": K}, ValueError, "given together, got known alone"),
        ((X, X, T, AT), {"clean": X}, ValueError, "given together, got clean alone"),
        ((X, X, T, AT), {"known": K.int(), "clean": X}, TypeError, "known must be a bool Tensor"),
        ((X, X, T, AT), {"known": K, "clean": X.half()}, TypeError, "clean must have the dtype"),
        ((X, X, T, AT), {"known": K, "clean": X[:1]}, ValueError, r"clean must be \(B, C"),
        ((X, X, T, AT), {"noise": X[:, :1]}, ValueError, r"noise must be \(B, C"),
        ((X, X, T, AT), {"noise": X, "seed": 1}, ValueError, "noise or seed may be given, not"),
        ((X, X, T, AT), {"seed": 1.0}, TypeError, "seed must be an int or an int64 Tensor"),
        ((X, X, T, AT), {"seed": 1, "stream": -1}, ValueError, "stream must be in"),
        ((X, X, T, AT), {"out": 3}, TypeError, "out must be a Tensor, got int"),
        ((X, X, T, AT), {"out": X.half()}, ValueError, "out must be contiguous and torch.float32"),
        ((X, X, T, AT), {"out": X.mT}, ValueError, "out must be contiguous and torch.float32"),
        ((X, X, T.to("meta"), AT), {}, ValueError, "table must be on the device of x, cpu"),
        ((X, X, T, AT.to("meta")), {}, ValueError, "step must be on the device of x, cpu"),
    ],
)
def test_refuses(cpu_path, arguments, options, error, says):
    with pytest.raises(error, match=says):
        guided_step(*arguments, **options)
