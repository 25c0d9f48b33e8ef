"""`guided_step` against the lines that users write and `torch.compile` of them.

Two branches, DDIM by v-prediction; a quarter of the frames is known in the rows named so. The state
is float32, the prediction in the dtype of the row, as a sampler around a model has them.
"""

import torch

from benchmarks.harness import Case, forward_of
from fastvid.diffusion.schedule import linear, respace
from fastvid.diffusion.tables import ddim_table
from fastvid.functional import guided_step
from fastvid.kernels._shared import native
from fastvid.kernels.guided_step import compiled, cpu, reference

# VDT at 16 x 16 latents, a batch at 32 x 32, MarDini at 512 px (13.6 MB in float32), a batch of it.
SHAPES = [(1, 4, 16, 16, 16), (8, 4, 16, 32, 32), (1, 16, 13, 64, 64), (4, 16, 13, 64, 64)]
GPU_SHAPES = [(1, 16, 13, 64, 64), (8, 4, 16, 32, 32), (32, 16, 13, 64, 64)]
QUICK = [(1, 2, 4, 8, 8)]
SCALE = 7.5
ROW = 7


def eager(x, prediction, coefficients, known=None, clean=None):
    """What a scheduler does with host numbers, guidance before it."""
    a, b, of_x0, of_x, _ = coefficients
    unconditional, conditional = prediction.chunk(2)
    guided = unconditional + SCALE * (conditional - unconditional)
    following = (of_x + of_x0 * a) * x + (of_x0 * b) * guided
    return following if known is None else torch.where(known, clean, following)


def nbytes(shape, dtype, known_share=0.0):
    """State in and out, two branches; clean instead of state and prediction where it is known."""
    numbers = torch.Size(shape).numel()
    unknown = (4 + 2 * dtype.itemsize) * (1 - known_share)
    return round(numbers * (unknown + 4 * known_share + 4))


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The plain step, and with known frames."""
    shapes = QUICK if quick else GPU_SHAPES if device.type == "cuda" else SHAPES
    return [
        _case(name, shape, dtype, device, quick)
        for name in ("ddim", "ddim known")
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _case(name, shape, dtype, device, quick):
    table = ddim_table(respace(linear(), 25), prediction="v")
    coefficients = table[ROW].tolist()
    on_device, step = table.to(device), torch.tensor([ROW], device=device)
    known = cells = None
    share = 0.0
    if name == "ddim known":
        known = (torch.arange(shape[2], device=device) < shape[2] // 4).expand(shape[0], shape[2])
        cells, share = known[:, None, :, None, None], shape[2] // 4 / shape[2]

    def ours(x, prediction, clean):
        given = {} if known is None else {"known": known, "clean": clean}
        return guided_step(x, prediction, on_device, step, guidance=(SCALE,), **given)

    def plain(x, prediction, clean):
        return eager(x, prediction, coefficients, cells, clean)

    def without_compiled_part(x, prediction, clean):
        """Our CPU path on a machine that had no compiler."""
        given = (None, None) if known is None else (known, clean)
        out = torch.empty_like(x)
        cpu.guided_step(x, prediction, table, step, [SCALE], None, *given, None, None, 0, out)
        return out

    def in_cuda(x, prediction, clean):
        """The kernel of the compiled part, whatever size the op takes it up to."""
        given = (None, None) if known is None else (known, clean)
        out = torch.empty_like(x)
        op = torch.ops.fastvid_cuda.guided_step
        compiled.call_step(
            op, x, prediction, on_device, step, [SCALE], None, *given, None, None, 0, out
        )
        return out

    def oracle(x, prediction, clean):
        row = on_device[ROW].double()
        given = (None, None) if known is None else (known, clean)
        return reference.guided_step(x, prediction, row, [SCALE], None, *given)

    def make_inputs(device):
        x, clean = torch.randn(2, *shape, device=device)
        return x, torch.randn(2 * shape[0], *shape[1:], device=device).to(dtype), clean

    rivals = {"fastvid": ours, "eager": plain}
    if device.type == "cpu" and native.loaded():
        rivals["no C++"] = without_compiled_part
    if device.type == "cuda" and native.cuda_loaded():
        rivals["CUDA"] = in_cuda
    if not quick:
        rivals["compile"] = torch.compile(plain, dynamic=False)
    return Case(
        room="guided_step",
        name=name,
        shape=dict(zip("BCTHW", shape, strict=True)),
        dtype=dtype,
        make_inputs=make_inputs,
        rivals={rival: forward_of(function) for rival, function in rivals.items()},
        oracle=forward_of(oracle),
        nbytes=nbytes(shape, dtype, share),
    )
