"""The promises of `noising` and `masked_mse`. Without a GPU Triton's interpreter runs them."""

import logging

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastvid.functional import masked_mse, noising
from fastvid.kernels._shared import paths, philox
from fastvid.kernels._shared.planes import known_cells
from fastvid.kernels.noising import reference
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
    eager,
    gradients,
)

SHAPES = [(2, 4, 3, 8, 8), (3, 2, 4, 5, 7), (2, 3, 2, 24, 24)]

# ---- the reference, and what the ops compute on this machine


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["nothing", "frames", "cells for all"])
def test_written_gradient_is_the_gradient(rand, kind, target, own):
    if own and kind == "nothing":
        return
    x0, noise, *grads = (rand(2, 3, 4, 2, 3, dtype=torch.float64).cpu() for _ in range(4))
    levels = draw_levels(2, 4, dtype=torch.float64)
    known = draw_known(kind, 2, 4, 2, 3)
    own_level = draw_levels(1, dtype=torch.float64) if own else (None, None)

    def step(x0, noise):
        return reference.noising(x0, *levels, noise, known, *own_level, target)

    written = reference.noising_backward(*grads, *levels, known, *own_level, target)
    torch.testing.assert_close(written, gradients(step, grads, x0, noise))


@pytest.mark.parametrize("average", ["unknown", "all"])
@pytest.mark.parametrize("kind", KNOWN)
def test_written_gradient_of_the_loss_is_the_gradient(rand, kind, average):
    pred, target = (rand(2, 3, 4, 2, 3, dtype=torch.float64).cpu() for _ in range(2))
    known, dloss = draw_known(kind, 2, 4, 2, 3), torch.tensor([1.0, 3.0], dtype=torch.float64)
    written = reference.masked_mse_backward(dloss, pred, target, known, average)
    automatic = gradients(lambda p: reference.masked_mse(p, target, known, average), dloss, pred)
    torch.testing.assert_close((written,), automatic)


def test_the_loss_is_the_mean_that_its_paper_takes(rand, cpu_path):
    pred, target = (rand(2, 3, 4, 6, 6).cpu() for _ in range(2))
    known = torch.zeros(2, 4, dtype=torch.bool)
    known[0, :3] = known[1, :1] = True
    hidden = pred.masked_fill(known_cells(known), torch.nan)  # known cells are not looked at
    squares = (pred - target).square()
    mean = torch.stack([squares[0, :, 3:].mean(), squares[1, :, 1:].mean()])
    torch.testing.assert_close(masked_mse(hidden, target, known), mean)
    share = torch.tensor([1 / 4, 3 / 4])
    torch.testing.assert_close(masked_mse(hidden, target, known, average="all"), mean * share)
    torch.testing.assert_close(masked_mse(pred, target), squares.flatten(1).mean(1))


@pytest.mark.parametrize("average", ["unknown", "all"])
@pytest.mark.parametrize("kind", ["frames", "cells"])
def test_a_sample_without_anything_unknown_has_no_loss(cpu_path, kind, average):
    pred, target = torch.randn(2, 2, 1, 3, 4, 4)
    known = draw_known(kind, 2, 3, 4, 4)
    known[1] = True
    loss = masked_mse(pred, target, known, average=average)
    assert loss.isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KNOWN)
def test_cpu_rounds_no_worse_than_eager(within_budget, cpu_path, kind, target, dtype):
    torch.manual_seed(0)
    for B, C, T, H, W in SHAPES:
        x0, noise = torch.randn(2, B, C, T, H, W).to(dtype)
        known = draw_known(kind, B, T, H, W)
        for per_frame in (1, T):
            for own in (None, draw_levels(1)) if known is not None else (None,):
                levels = draw_levels(B, per_frame)
                check_noising(within_budget, NOISING, x0, noise, levels, known, own, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("average", ["unknown", "all"])
@pytest.mark.parametrize("kind", KNOWN)
def test_cpu_loss_rounds_no_worse_than_eager(within_budget, cpu_path, kind, average, dtype):
    torch.manual_seed(0)
    for B, C, T, H, W in SHAPES:
        pred, target = torch.randn(2, B, C, T, H, W).to(dtype)
        known = draw_known(kind, B, T, H, W)
        check_mse(within_budget, MSE, MSE_BACKWARD, pred, target, known, average)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 1, 1, 1), (1, 3, 2, 17, 41)])
@pytest.mark.parametrize("kind", ["nothing", "frames", "cells"])
def test_drawn_noise_is_the_noise_by_number(cpu_path, shape, kind):
    B, _, T, H, W = shape
    x0, levels, known = torch.randn(shape), draw_levels(B), draw_known(kind, B, T, H, W)
    seed = torch.arange(10, 10 + B)
    noise = philox.normal(seed, x0[0].numel(), 3).view(shape)
    for target in TARGETS:
        found = noising(x0, *draw_1d(levels), seed=seed, stream=3, known=known, target=target)
        wanted = noising(x0, *draw_1d(levels), noise=noise, known=known, target=target)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-6)
    again = noising(x0, *draw_1d(levels), seed=10, stream=3, known=known, target=target)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    other, _ = noising(x0, *draw_1d(levels), seed=seed, stream=4, known=known)
    assert not torch.equal(other, found[0]) or (known is not None and known.all())


def test_seeds_of_any_stride(cpu_path):
    x0, levels = torch.randn(4, 1, 2, 3, 4), draw_1d(draw_levels(4))
    for seed in (torch.tensor([3]).expand(4), torch.arange(8)[::2]):
        found = noising(x0, *levels, seed=seed)
        wanted = noising(x0, *levels, seed=seed.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def draw_1d(levels):
    return [level[:, 0] for level in levels]


def test_targets_that_are_there_already_are_not_made_again(rand, cpu_path):
    x0, noise = rand(2, 3, 4, 2, 2).cpu(), rand(2, 3, 4, 2, 2).cpu()
    levels = draw_1d(draw_levels(2))
    assert noising(x0, *levels, noise=noise, target="eps")[1] is noise
    assert noising(x0, *levels, noise=noise, target="x0")[1] is x0
    assert noising(x0, *levels, seed=1, target="x0")[1] is x0


def test_known_cells_are_bit_exact_whatever_the_noise_holds(cpu_path):
    x0 = torch.tensor([-0.0, 1e-40, 3e38, -1.0]).repeat(1, 1, 2, 1, 1)
    noise = torch.full_like(x0, torch.nan)
    for known in (torch.tensor([[True, True]]), torch.ones(1, 2, 1, 4, dtype=torch.bool)):
        noisy, _ = noising(x0, *draw_1d(draw_levels(1)), noise=noise, known=known)
        assert torch.equal(noisy.view(torch.int32), x0.view(torch.int32))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["nothing", "frames", "cells"])
def test_gradcheck(kind, target):
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 2, 2, 3, 2, 2, dtype=torch.float64).requires_grad_()
    levels = draw_levels(2, 3, dtype=torch.float64)
    known = draw_known(kind, 2, 3, 2, 2)

    def given(x0, noise):
        return noising(x0, *levels, noise=noise, known=known, target=target)

    def drawn(x0):
        return noising(x0, *levels, seed=1, known=known, target=target)

    def loss(x0, noise):
        return masked_mse(x0, noise, known)

    leaves = [t.detach().requires_grad_() for t in (x0, noise)]
    assert torch.autograd.gradcheck(given, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(drawn, leaves[:1], fast_mode=True)
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 4), (2, 2, 0, 4, 4), (2, 0, 3, 4, 4), (2, 2, 3, 0, 4)]
)
def test_empty(cpu_path, shape):
    x0 = torch.zeros(shape, requires_grad=True)
    known = torch.zeros(shape[0], shape[2], dtype=torch.bool)
    levels = draw_1d(draw_levels(shape[0]))
    for noise in ({"noise": x0.detach()}, {"seed": 3}):
        noisy, made = noising(x0, *levels, known=known, **noise)
        assert noisy.shape == made.shape == shape
    loss = masked_mse(noisy, made, known)
    loss.sum().backward()
    assert loss.shape == shape[:1]
    assert loss.isnan().all()
    assert x0.grad.shape == shape


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("kind", ["frames", "cells"])
def test_any_strides(cpu_path, layout, kind):
    torch.manual_seed(0)
    x0, noise = (LAYOUTS[layout](t) for t in torch.randn(2, 3, 4, 5, 6, 6))
    known = draw_known(kind, 3, 5, 6, 6).repeat_interleave(2, dim=1)[:, ::2]
    level = torch.rand(5, 3).T
    for drawn in ({"noise": noise}, {"seed": 1}):
        found = noising(x0, level, 1 - level, known=known, **drawn)
        packed = {name: t.contiguous() if name == "noise" else t for name, t in drawn.items()}
        level_of = level.contiguous(), (1 - level).contiguous()
        wanted = noising(x0.contiguous(), *level_of, known=known.contiguous(), **packed)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(masked_mse(x0, noise, known), masked_mse(x0 + 0, noise + 0, known + 0 > 0))


def test_threads_do_not_change_the_bits(cpu_path):
    torch.manual_seed(0)
    pred, target = torch.randn(2, 3, 4, 9, 40, 40)
    known = draw_known("frames", 3, 9, 40, 40)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            found.append(gradients(lambda p: masked_mse(p, target, known).sum(), None, pred))
            found[-1] += (masked_mse(pred, target, known), noising(pred, *LEVELS, seed=1)[0])
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(*found, strict=True):
        assert torch.equal(b, c)
        assert cpu_path == "pytorch" or torch.equal(a, b)


def test_path_is_logged_once(cpu_path, caplog):
    paths.announce.cache_clear()
    x = torch.ones(1, 1, 1, 2, 2)
    with caplog.at_level(logging.DEBUG, "fastvid.kernels"):
        for _ in range(3):
            masked_mse(x, noising(x, *LEVELS_1, noise=x)[0])
    name = {"compiled": "C++", "pytorch": "PyTorch"}[cpu_path]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"noising: {name}", f"masked_mse: {name}"]


LEVELS = draw_1d(draw_levels(3))
LEVELS_1 = draw_1d(draw_levels(1))

# ---- inside PyTorch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nothing", "frames", "cells"])
def test_opcheck(cpu_path, rand, device, kind, dtype):
    x0, noise = (rand(2, 3, 4, 2, 6, dtype=dtype).requires_grad_() for _ in range(2))
    levels, known = draw_levels(2, device=device), draw_known(kind, 2, 4, 2, 6, device)
    own = draw_levels(1, device=device) if kind == "frames" else (None, None)
    seeds = torch.tensor([1, 2], device=device)
    torch.library.opcheck(NOISING, (x0, *levels, noise, None, 0, known, *own, "v"))
    torch.library.opcheck(NOISING, (x0, *levels, None, seeds, 5, known, *own, "eps"))
    torch.library.opcheck(NOISING, (x0, *levels, noise, None, 0, known, *own, "none"))
    torch.library.opcheck(MSE, (x0, noise, known, "all"))
    loss, weight = MSE(x0.detach(), noise.detach(), known, "unknown")
    torch.library.opcheck(MSE_BACKWARD, (loss, x0.detach(), noise.detach(), known, weight))


def training_step(x0, alpha, sigma, seed, known, pred):
    noisy, made = noising(x0, alpha, sigma, seed=seed, known=known)
    return masked_mse(pred * noisy, made, known).mean()


def step_inputs(rand, device, B, T, H):
    x0, pred = rand(B, 3, T, H, H), rand(B, 3, T, H, H)
    levels = [level.to(device) for level in draw_1d(draw_levels(B))]
    return (
        x0,
        *levels,
        torch.tensor(B, device=device),
        draw_known("frames", B, T, H, H, device),
        pred,
    )


def test_compiles_once_for_all_sizes(cpu_path, device, rand):
    torch._dynamo.reset()
    step = torch.compile(training_step, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, T, H in ((2, 4, 6), (3, 7, 10)):
            *inputs, pred = step_inputs(rand, device, B, T, H)
            found = gradients(lambda p, step=step, i=inputs: step(*i, p), None, pred)
            wanted = gradients(lambda p, i=inputs: training_step(*i, p), None, pred)
            torch.testing.assert_close(found, wanted)


def test_a_new_seed_does_not_compile_again(device, rand):
    torch._dynamo.reset()
    step = torch.compile(training_step, backend="aot_eager", fullgraph=True)
    x0, alpha, sigma, _, known, pred = step_inputs(rand, device, 2, 3, 4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = {
            step(x0, alpha, sigma, torch.tensor(seed, device=device), known, pred).item()
            for seed in range(3)
        }
    assert len(losses) == 3


def test_exports_with_free_sizes(cpu_path, device, rand):
    class Step(torch.nn.Module):
        def forward(self, x0, alpha, sigma, seed, known, pred):
            return training_step(x0, alpha, sigma, seed, known, pred)

    B, T = torch.export.Dim("B", min=2), torch.export.Dim("T", min=2)
    latents = {0: B, 2: T}
    shapes = {"x0": latents, "alpha": {0: B}, "sigma": {0: B}, "seed": None}
    shapes |= {"known": {0: B, 1: T}, "pred": latents}
    example = step_inputs(rand, device, 2, 4, 6)
    exported = torch.export.export(Step(), example, dynamic_shapes=shapes).module()
    other = step_inputs(rand, device, 3, 5, 6)
    torch.testing.assert_close(exported(*other), training_step(*other))


def test_meta_tensors_pass_through():
    x0 = torch.empty(2, 3, 4, 5, 5, device="meta", requires_grad=True)
    known = torch.empty(2, 4, dtype=torch.bool, device="meta")
    level = torch.empty(2, device="meta")
    noisy, made = noising(x0, level, level, seed=1, known=known)
    masked_mse(noisy, made, known).sum().backward()
    assert x0.grad.shape == x0.shape


def test_activation_checkpointing_of_the_loss(cpu_path, rand):
    pred, target = (rand(2, 3, 4, 8, 8).requires_grad_() for _ in range(2))
    known = torch.tensor([[True, False, False, False]])

    def loss(pred, target):
        return masked_mse(pred, target, known).sum()

    plain = torch.autograd.grad(loss(pred, target), (pred, target))
    again = torch.autograd.grad(checkpoint(loss, pred, target, use_reentrant=False), (pred, target))
    assert all(one.equal(other) for one, other in zip(plain, again, strict=True))


def test_activation_checkpointing_draws_the_same_noise(cpu_path, rand):
    x0, pred = rand(3, 2, 2, 4, 4).cpu(), rand(3, 2, 2, 4, 4).cpu()

    def step(p):
        return training_step(x0, *LEVELS, 5, None, p)

    kept = gradients(step, None, pred)
    again = gradients(lambda p: checkpoint(step, p, use_reentrant=False), None, pred)
    assert torch.equal(*kept, *again)


def test_no_second_derivative():
    pred = torch.ones(1, 1, 1, 2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(masked_mse(pred, torch.zeros_like(pred)), pred, create_graph=True)
    with pytest.raises(NotImplementedError, match="masked_mse has no second derivative"):
        grad.sum().backward()


# ---- refusals

X, A = torch.zeros(2, 3, 4, 5, 5), torch.ones(2)
K = torch.zeros(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((X[0], A, A), {}, ValueError, r"x0 must be \(B, C, T, H, W\), got \(3, 4, 5, 5\)"),
        ((X.long(), A, A), {}, TypeError, "x0 must be float32.*got torch.int64"),
        ((X, A[:, None, None], A), {}, ValueError, r"alpha must be \(B\|1\), B=2, got \(2, 1, 1\)"),
        ((X, A, X[:, 0, :3, 0, 0]), {}, ValueError, r"sigma must be \(B\|1, T\), B=2 T=4, got"),
        ((X, A, A[:1]), {}, ValueError, "alpha and sigma must agree in shape and dtype"),
        ((X, A.half(), A.half()), {}, TypeError, "alpha must be float32 or float64, got"),
        ((X, 1.0, A), {}, TypeError, "alpha must be a Tensor, got float"),
        ((X, A, A.to("meta")), {}, ValueError, "sigma must be on the device of x0, cpu, got meta"),
        ((X, A, A), {"seed": None}, ValueError, "noise or seed must be given.*got neither"),
        ((X, A, A), {"noise": X}, ValueError, "noise or seed must be given.*got both"),
        ((X, A, A), {"noise": X[:1], "seed": None}, ValueError, r"noise must be .*B=2.*\(1, 3, 4"),
        ((X, A, A), {"noise": X.half(), "seed": None}, TypeError, "noise must have the dtype of"),
        ((X, A, A), {"seed": 1.5}, TypeError, "seed must be an int"),
        ((X, A, A), {"stream": -1}, ValueError, "stream must be in"),
        ((X, A, A), {"known": K.float()}, TypeError, "known must be a bool Tensor.*got"),
        ((X, A, A), {"known": K[:, :3]}, ValueError, r"known must be .*T=4 H=5 W=5, got \(2, 3\)"),
        ((X, A, A), {"known_level": (A, A)}, ValueError, "known must be given with known_level"),
        ((X, A, A), {"known": K, "known_level": A}, TypeError, "known_level must be a pair"),
        ((X, A, A), {"known": K, "known_level": (A, A[:1])}, ValueError, r"known_level\[0\] and"),
        ((X, A, A), {"target": "noise"}, ValueError, "target must be eps, v, flow or x0, got"),
    ],
)  # fmt: skip
def test_noising_refuses(arguments, options, error, says):
    with pytest.raises(error, match=says):
        noising(*arguments, **{"seed": 1} | options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((X[0], X), {}, ValueError, r"pred must be \(B, C, T, H, W\)"),
        ((X, X[:1]), {}, ValueError, r"target must be .*B=2 .*got \(1, 3, 4, 5, 5\)"),
        ((X, X.long()), {}, TypeError, "target must be float32"),
        ((X, X.to("meta")), {}, ValueError, "target must be on the device of pred, cpu, got meta"),
        ((X, X, K[0]), {}, ValueError, r"known must be \(B\|1, T\) or .*got \(4,\)"),
        ((X, X, K), {"average": "mean"}, ValueError, "average must be unknown or all, got 'mean'"),
    ],
)
def test_masked_mse_refuses(arguments, options, error, says):
    with pytest.raises(error, match=says):
        masked_mse(*arguments, **options)


def test_eager_is_what_the_reference_means(rand):
    x0, noise = (rand(2, 3, 4, 2, 2, dtype=torch.float64).cpu() for _ in range(2))
    levels = draw_levels(2, dtype=torch.float64)
    known = draw_known("frames", 2, 4, 2, 2)
    for target in TARGETS:
        torch.testing.assert_close(
            eager(x0, *levels, noise, known, target=target),
            reference.noising(x0, *levels, noise, known, target=target),
        )
