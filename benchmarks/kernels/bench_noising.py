"""`noising` and `masked_mse` against the lines that users write and `torch.compile` of them.

A quarter of the frames is known. Where noise is drawn, the rivals draw theirs too, and then work on
the noise that ours is known to be, so that results can be compared.
"""

import torch

from benchmarks.harness import Case, backward_of, forward_of
from fastvid.functional import masked_mse, noising
from fastvid.kernels._shared import native, philox
from fastvid.kernels.noising import cpu, reference

# VDT at 16 x 16 latents, a batch at 32 x 32, MarDini at 512 px, and 34 MB of latents.
SHAPES = [(1, 4, 16, 16, 16), (8, 4, 16, 32, 32), (1, 16, 13, 64, 64), (32, 4, 16, 64, 64)]
GPU_SHAPES = [(32, 4, 16, 32, 32), (4, 16, 13, 64, 64), (64, 16, 13, 64, 64)]
QUICK = [(1, 2, 4, 8, 8)]


def eager(x0, noise, alpha, sigma, known):
    """Known frames by their level: cheaper than putting them back afterwards."""
    cells = known[:, None, :, None, None]
    alpha = torch.where(cells, 1.0, alpha[:, None, None, None, None]).to(x0.dtype)
    sigma = torch.where(cells, 0.0, sigma[:, None, None, None, None]).to(x0.dtype)
    return alpha * x0 + sigma * noise, alpha * noise - sigma * x0


def eager_mse(pred, target, known):
    """The mean over the unknown frames."""
    unknown = (~known).to(pred.dtype)[:, None, :, None, None]
    squares = (pred - target).square() * unknown
    return squares.flatten(1).sum(1) / unknown.expand(pred.shape).flatten(1).sum(1)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Noise given and drawn, the loss, and its gradient."""
    shapes = QUICK if quick else GPU_SHAPES if device.type == "cuda" else SHAPES
    dtypes = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    make = {"given": _noising, "drawn": _noising, "mse": _mse, "mse backward": _mse}
    return [
        make[name](name, shape, dtype, device, quick)
        for name in make
        for shape in shapes
        for dtype in dtypes
    ]


def _noising(name, shape, dtype, device, quick):
    known = _known(shape, device)
    angle = torch.linspace(0.1, 1.4, shape[0], device=device)
    levels = angle.cos(), angle.sin()
    seeds = torch.arange(shape[0], device=device)

    def given(x0, noise):
        return noising(x0, *levels, noise=noise, known=known)

    def drawn(x0, noise):
        return noising(x0, *levels, seed=seeds, known=known)

    def plain(x0, noise):
        if name == "drawn":
            torch.randn_like(x0)
        return eager(x0, noise, *levels, known)

    def without_compiled_part(x0, noise):
        """Our CPU path on a machine that had no compiler."""
        pair = (None, seeds) if name == "drawn" else (noise, None)
        columns = (level[:, None] for level in levels)
        return cpu.noising(x0, *columns, *pair, 0, known, None, None, "v")

    def oracle(x0, noise):
        if name == "drawn":
            noise = philox.normal(seeds, x0[0].numel(), 0).view(shape).double()
        return reference.noising(x0, *(level[:, None] for level in levels), noise, known)

    def make_inputs(device):
        x0 = torch.randn(shape, device=device).to(dtype)
        noise = philox.normal(seeds, x0[0].numel(), 0).view(shape)
        return x0, noise.to(dtype)

    rivals = {"fastvid": given if name == "given" else drawn, "eager": plain}
    if name == "given" and device.type == "cpu" and native.loaded():
        rivals["no C++"] = without_compiled_part
    passes = 4 if name == "given" else 3
    return _case(name, shape, dtype, quick, rivals, plain, oracle, make_inputs, passes, forward_of)


def _mse(name, shape, dtype, device, quick):
    known = _known(shape, device)

    def ours(pred, target):
        return masked_mse(pred, target, known)

    def plain(pred, target):
        return eager_mse(pred, target, known)

    def oracle(pred, target):
        return reference.masked_mse(pred, target, known)

    def make_inputs(device):
        pred, target = torch.randn(2, *shape, device=device).to(dtype)
        return (pred, target) if name == "mse" else (pred, target, torch.ones(shape[0]).to(device))

    def gradient_of(function):
        def bind(pred, target, dloss):
            return backward_of(lambda pred: function(pred, target))(pred, dloss)

        return bind

    bind = forward_of if name == "mse" else gradient_of
    passes = 2 if name == "mse" else 3
    rivals = {"fastvid": ours, "eager": plain}
    return _case(name, shape, dtype, quick, rivals, plain, oracle, make_inputs, passes, bind)


def _known(shape, device):
    frames = torch.arange(shape[2], device=device)
    return (frames < shape[2] // 4).expand(shape[0], shape[2])


def _case(name, shape, dtype, quick, rivals, plain, oracle, make_inputs, passes, bind):
    if not quick and name != "drawn":  # it would leave out a draw that nobody uses
        rivals["compile"] = torch.compile(plain, dynamic=False)
    return Case(
        room="noising",
        name=name,
        shape=dict(zip("BCTHW", shape, strict=True)),
        dtype=dtype,
        make_inputs=make_inputs,
        rivals={rival: bind(function) for rival, function in rivals.items()},
        oracle=bind(oracle),
        nbytes=passes * torch.Size(shape).numel() * dtype.itemsize,
    )
