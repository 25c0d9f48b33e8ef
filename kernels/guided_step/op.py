"""`guided_step`: the registered ops and the public function."""

import torch
from torch import Tensor

from .._shared import philox
from .._shared.checks import expect_device, expect_float, expect_shape
from .._shared.paths import announce
from .._shared.planes import expect_known, like
from . import compiled, cpu
from .reference import COLUMNS

# `scales` has one number less than there are branches. At most one of noise and `seeds` (B,).
_ARGUMENTS = (
    "Tensor x, Tensor prediction, Tensor table, Tensor step, float[] scales, float? clip,"
    " Tensor? known, Tensor? clean, Tensor? noise, Tensor? seeds, SymInt stream"
)
torch.library.define("fastvid::guided_step", f"({_ARGUMENTS}) -> Tensor")
torch.library.define("fastvid::guided_step_into", f"({_ARGUMENTS}, Tensor(a!) out) -> ()")


def _on_gpu(x, prediction, table, step, scales, clip, known, clean, noise, *rest):
    arguments = (x, prediction, table, step, scales, clip, known, clean, noise, *rest)
    if compiled.cuda_serves(x, noise):
        announce("guided_step", "CUDA")
        compiled.call_step(torch.ops.fastvid_cuda.guided_step, *arguments)
        return
    from .kernel import launch_guided_step  # Triton loads at the first launch

    announce("guided_step", "Triton")
    with torch.cuda.device_of(x):
        launch_guided_step(*arguments)


def _on_cpu(x, prediction, table, step, scales, clip, known, clean, noise, *rest):
    fast = compiled.cpu_serves(x, prediction, clean, noise)
    announce("guided_step", "C++" if fast else "PyTorch")
    advance = cpu.compiled_step if fast else cpu.guided_step
    advance(x, prediction, table, step, scales, clip, known, clean, noise, *rest)


torch.library.impl("fastvid::guided_step_into", "CUDA", _on_gpu)
torch.library.impl("fastvid::guided_step_into", "CPU", _on_cpu)


@torch.library.impl("fastvid::guided_step", "CUDA")
def _(x, *rest):
    out = x.new_empty(x.shape)
    _on_gpu(x, *rest, out)
    return out


@torch.library.impl("fastvid::guided_step", "CPU")
def _(x, *rest):
    out = like(x)
    _on_cpu(x, *rest, out)
    return out


@torch.library.register_fake("fastvid::guided_step")
def _(x, *rest):
    return x.new_empty(x.shape)


@torch.library.register_fake("fastvid::guided_step_into")
def _(*arguments):
    return None


_guided_step = torch.ops.fastvid.guided_step.default
_guided_step_into = torch.ops.fastvid.guided_step_into.default


def guided_step(
    x: Tensor,
    prediction: Tensor,
    table: Tensor,
    step: Tensor,
    *,
    guidance: tuple[float, ...] | None = None,
    clip: float | None = None,
    known: Tensor | None = None,
    clean: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Guidance and one step of a sampler (DDIM, ancestral, flow Euler) in one pass.

    With the guided prediction `m` and a row of the table, x0 = x0_of_x * x + x0_of_prediction * m,
    clipped where asked, and the next state is of_x0 * x0 + of_x * x + of_noise * noise. Which row
    is read on the device: a loop waits for nothing, and a captured graph serves every step.
    Inference only. A learned variance stays outside: pass its prediction `output[:, :C]`, and add
    noise of that variance by yourself.

    Args:
        x: (B, C, T, H, W) state, best float32. Views of channels, frames or an expanded batch are
            read where they lie; a copy is made only where an (H, W) plane is scattered.
        prediction: (G * B, C, T, H, W) of the model, any float dtype, G whole batches: without
            guidance 1; with two branches (unconditional, conditional); with three (unconditional,
            image only, image and text).
        table: (steps, 5) float32, or float64 beside such an `x`, from `fastvid.diffusion.tables`;
            row 0 is the first step taken.
        step: int64 of one element, the row. Advance it by yourself, `step += 1`. Outside the table
            a GPU takes the nearest row, since it does not wait to see.
        guidance: None; `(scale,)`: u + scale * (c - u); or `(scale_text, scale_image)`:
            u + scale_image * (i - u) + scale_text * (c - i). Host numbers.
        clip: bound of |x0|, or None.
        known: bool (B or 1, T) or (B or 1, T, H, W), True = given; needs `clean`. None: nothing is.
        clean: (B, C, T, H, W), dtype of `x`; known cells are taken from it, bit for bit.
        noise: (B, C, T, H, W) standard normal, any float dtype. Not read where of_noise is 0.
        seed: instead of `noise`: an int or int64 of shape () or (1,), sample b draws with
            `seed + b`; or int64 (B,). Each step draws fresh noise, of number `stream + step`.
        stream: in [0, 2^32), see `seed`.
        out: contiguous, shape and dtype of `x`, for the result. May be `x` itself.
    Returns:
        (B, C, T, H, W), dtype of `x`, contiguous; `out` where given.
    Raises:
        TypeError, ValueError: an argument is not as above, or (on the CPU) `step` is no row.
        RuntimeError: an argument requires a gradient while gradients are recorded.
    Source: Ho & Salimans, arXiv:2207.12598; Brooks et al., arXiv:2211.09800 (three branches); Song
        et al., arXiv:2010.02502; Ho et al., arXiv:2006.11239; Lipman et al., arXiv:2210.02747.
    """
    sizes = expect_shape("x", x, "B C T H W")
    expect_float("x", x)
    _expect_like("prediction", prediction, x, sizes, _branches(guidance))
    expect_shape("table", table, f"S {COLUMNS}")
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    if table.dtype not in (torch.float32, precise) or table.shape[0] == 0:
        raise TypeError(
            "table must be float32 with at least one row (or float64 beside such an x),"
            f" got {table.dtype} {tuple(table.shape)}"
        )
    expect_device("table", table, "x", x)
    _expect_step(step, x)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0 or None, got {clip}")
    if (known is None) != (clean is None):
        came = "clean" if known is None else "known"
        raise ValueError(f"known and clean must be given together, got {came} alone")
    if known is not None and clean is not None:
        expect_known(known, "x", x)
        _expect_like("clean", clean, x, sizes)
        if clean.dtype != x.dtype:
            raise TypeError(f"clean must have the dtype of x, {x.dtype}, got {clean.dtype}")
    if noise is not None and seed is not None:
        raise ValueError("noise or seed may be given, not both")
    if noise is not None:
        _expect_like("noise", noise, x, sizes)
    seeds = None if seed is None else philox.sample_seeds(seed, sizes["B"], x.device)
    philox.expect_stream(stream)
    if out is not None:
        _expect_like("out", out, x, sizes)
        if out.dtype != x.dtype or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous and {x.dtype} like x,"
                f" got {out.dtype} with strides {out.stride()}"
            )
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, prediction, clean, noise, out)
    ):
        raise RuntimeError(
            "guided_step has no gradient: call it under torch.no_grad() or detach its arguments"
        )
    # Between neighbouring branches, so the text's scale comes last.
    scales = [] if guidance is None else [float(scale) for scale in reversed(guidance)]
    arguments = (
        x, prediction, table.contiguous(), step, scales, clip, known, clean, noise, seeds, stream
    )  # fmt: skip
    if out is None:
        return _guided_step(*arguments)
    _guided_step_into(*arguments, out)
    if not torch.compiler.is_compiling():  # a compiled graph sees the write in the op's schema
        torch.autograd.graph.increment_version(out)
    return out


def _branches(guidance: tuple[float, ...] | None) -> int:
    if guidance is None:
        return 1
    if not isinstance(guidance, tuple | list):
        raise TypeError(f"guidance must be None or a tuple, got {type(guidance).__name__}")
    if len(guidance) not in (1, 2):
        raise ValueError(
            f"guidance must be (scale,) or (scale_text, scale_image), got {len(guidance)} numbers"
        )
    return len(guidance) + 1


def _expect_like(
    name: str, tensor: Tensor, x: Tensor, sizes: dict[str, int], branches: int = 1
) -> None:
    """Check for `branches` batches of the shape of `x`, its `sizes`, on its device."""
    if branches == 1:
        expect_shape(name, tensor, "B C T H W", sizes)
    else:
        batch = f"{branches}B"
        expect_shape(name, tensor, f"{batch} C T H W", sizes | {batch: branches * sizes["B"]})
    expect_float(name, tensor)
    expect_device(name, tensor, "x", x)


def _expect_step(step: Tensor, x: Tensor) -> None:
    if not isinstance(step, Tensor) or step.dtype != torch.int64 or step.numel() != 1:
        came = f"{step.dtype} {tuple(step.shape)}" if isinstance(step, Tensor) else repr(step)
        raise TypeError(f"step must be an int64 Tensor of one element, got {came}")
    expect_device("step", step, "x", x)
