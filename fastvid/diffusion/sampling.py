"""Samplers: from noise to data by ancestral or DDIM steps, and from data back to noise.

A sampler calls `model(latents, timestep, known=known, **condition)` once per step of the schedule,
with one shared timestep, int64 (1,). Its state is kept in fp32 (fp64 for fp64 noise) in two buffers
that take turns; the model sees the dtype of `noise`. A step is one pass (`guided_step`) that leaves
given cells clean, but for a learned variance. No step waits for a device.

Given cells stand clean in every model input and come out bit for bit as they went in.

Sources: Ho et al., arXiv:2006.11239 (ancestral); Song et al., arXiv:2010.02502 (DDIM and its
inversion); Ho & Salimans, arXiv:2207.12598 (guidance).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from fastvid.functional import guided_step

from .process import (
    FixedVariance,
    Prediction,
    check_prediction,
    known_cells,
    mix_known,
    predict_x0,
    split_variance,
)
from .schedule import Schedule
from .steps import ddim_inverse_step, ddpm_step
from .tables import ddim_table, ddpm_table

Condition = Mapping[str, Any]
Progress = Callable[[int, int], None]  # (steps done, steps in all)


class Model(Protocol):
    """What a sampler calls: noisy latents (B, C, T, H, W) in, (B, C or 2C, T, H, W) out."""

    def __call__(
        self, latents: Tensor, timestep: Tensor, *, known: Tensor | None, **condition: Any
    ) -> Tensor: ...


@torch.no_grad()
def sample_ddpm(
    model: Model,
    noise: Tensor,
    schedule: Schedule,
    *,
    known: Tensor | None = None,
    clean: Tensor | None = None,
    prediction: Prediction = "eps",
    fixed_variance: FixedVariance = "small",
    clip: float | None = None,
    generator: Generator | Sequence[Generator] | None = None,
    condition: Condition | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Ancestral sampling: every step draws from p(x_{t-1} | x_t).

    Args:
        model: returns C channels, or 2C with a learned variance.
        noise: (B, C, T, H, W) standard normal, see `draw_noise`; float64 on the CPU only.
        schedule: one model call per step; shorten it with `respace`.
        known: bool (B or 1, T) or (B or 1, T, H, W), True = given; needs `clean`.
        clean: (B, C, T, H, W) the given latents; only known cells are looked at.
        prediction: what the model predicts: `"eps"`, `"v"` or `"x0"`.
        fixed_variance: without a learned one, `"small"` (posterior) or `"large"` (beta).
        clip: bound of |x0| in every step, or None.
        generator: of the noise of the steps; one for the batch, or one per sample, with which a
            sample does not depend on its company.
        condition: further keywords of the model.
        progress: called with (steps done, steps in all) after each step.
    Returns:
        (B, C, T, H, W), dtype and device of `noise`, known cells equal to `clean`.
    Raises:
        ValueError, TypeError: an argument is not as above, or noise prediction at zero terminal
            SNR.
    """
    x, spare, clean = _begin(noise, schedule, known, clean, prediction)
    table = ddpm_table(
        schedule, prediction=prediction, fixed_variance=fixed_variance, dtype=x.dtype
    ).to(x.device, non_blocking=True)
    step = partial(guided_step, clip=clip, known=known, clean=clean)
    for index, row in _downward(schedule, progress, x.device):
        output = _call(model, x, index, schedule, noise, known, condition)
        predicted, fraction = split_variance(output, noise.shape[1])
        step_noise = _step_noise(x, generator) if index else None
        if fraction is None:
            step(x, predicted, table, row, noise=step_noise, out=spare)
        else:
            ddpm_step(
                output,
                x,
                index,
                schedule,
                noise=step_noise,
                prediction=prediction,
                clip=clip,
                out=spare,
            )
            spare = spare if clean is None else mix_known(spare, clean, known)
        x, spare = spare, x
    return x.to(noise.dtype)


@torch.no_grad()
def sample_ddim(
    model: Model,
    noise: Tensor,
    schedule: Schedule,
    *,
    known: Tensor | None = None,
    clean: Tensor | None = None,
    prediction: Prediction = "eps",
    eta: float = 0.0,
    clip: float | None = None,
    generator: Generator | Sequence[Generator] | None = None,
    condition: Condition | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """DDIM sampling: deterministic for `eta` 0, as noisy as ancestral for `eta` 1.

    The other arguments, the result and the errors are those of `sample_ddpm`. A learned variance
    is not used.
    """
    x, spare, clean = _begin(noise, schedule, known, clean, prediction)
    table = ddim_table(schedule, eta=eta, prediction=prediction, dtype=x.dtype)
    table = table.to(x.device, non_blocking=True)
    step = partial(guided_step, clip=clip, known=known, clean=clean)
    for index, row in _downward(schedule, progress, x.device):
        output = _call(model, x, index, schedule, noise, known, condition)
        predicted, _ = split_variance(output, noise.shape[1])
        step_noise = _step_noise(x, generator) if index and eta else None
        step(x, predicted, table, row, noise=step_noise, out=spare)
        x, spare = spare, x
    return x.to(noise.dtype)


@torch.no_grad()
def invert_ddim(
    model: Model,
    latents: Tensor,
    schedule: Schedule,
    *,
    known: Tensor | None = None,
    prediction: Prediction = "eps",
    clip: float | None = None,
    condition: Condition | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The noise from which `sample_ddim` with `eta` 0 leads to `latents`, to first order.

    The reverse DDIM steps of Song et al., one model call per step of the schedule; the more steps,
    the closer. Known cells are seen clean by the model and come back as noise like the others.

    Args:
        latents: (B, C, T, H, W) clean data.
        known: bool, as in `sample_ddpm`; the given cells are those of `latents`.
    Returns:
        (B, C, T, H, W) state at the noisiest step, dtype and device of `latents`.
    Raises:
        ValueError, TypeError: as `sample_ddpm`.
    """
    x, spare, clean = _begin(latents, schedule, known, latents, prediction)
    total = len(schedule)
    for index in range(-1, total - 1):  # -1 is clean data; the model has no number for it
        at = max(index, 0)
        seen = x if clean is None else mix_known(x, clean, known)
        output = _call(model, seen, at, schedule, latents, known, condition)
        ddim_inverse_step(output, x, index, schedule, prediction=prediction, clip=clip, out=spare)
        x, spare = spare, x
        if progress:
            progress(index + 2, total)
    return x.to(latents.dtype)


@torch.no_grad()
def one_step_x0(
    model: Model,
    noise: Tensor,
    schedule: Schedule,
    *,
    known: Tensor | None = None,
    clean: Tensor | None = None,
    prediction: Prediction = "eps",
    condition: Condition | None = None,
) -> Tensor:
    """Estimate the mean of the data given the known cells, by one call at the noisiest step.

    Best with `"x0"` or `"v"`: a noise prediction's error is multiplied by sigma / alpha (about 160
    at the end of the 1000-step linear chain). Arguments, result and errors: as `sample_ddpm`.
    """
    x, _, clean = _begin(noise, schedule, known, clean, prediction)
    last = len(schedule) - 1
    output = _call(model, x, last, schedule, noise, known, condition)
    predicted, _ = split_variance(output, noise.shape[1])
    x0 = predict_x0(predicted, x, last, schedule, prediction)
    return (x0 if clean is None else mix_known(x0, clean, known)).to(noise.dtype)


def guided(model: Model, scale: float, unconditional: Condition, *, batched: bool = False) -> Model:
    """Classifier-free guidance as a model: `u + scale * (c - u)`, by two calls.

    Args:
        scale: 1 is the conditional model alone, in one call; 0 the unconditional one, in one call.
        unconditional: keywords that differ in the unconditional call, such as `{"text": empty}`.
        batched: make the two calls as one of twice the batch: faster where a batch leaves the
            device idle, more memory. Keywords are then tensors (B or 1, ...), or the same for both.
    Returns:
        a callable with the model's signature. A learned variance is the conditional one's.
    """

    def model_guided(
        latents: Tensor, timestep: Tensor, *, known: Tensor | None = None, **condition: Any
    ) -> Tensor:
        without = {"known": known, **condition, **unconditional}
        if scale == 0:
            return model(latents, timestep, **without)
        if batched and scale != 1:
            both = {
                name: _doubled(name, {"known": known, **condition}.get(name), value, len(latents))
                for name, value in without.items()
            }
            steps = timestep if len(timestep) == 1 else timestep.repeat(2)
            output, base = model(latents.repeat(2, 1, 1, 1, 1), steps, **both).chunk(2)
        else:
            output = model(latents, timestep, known=known, **condition)
            if scale == 1:
                return output
            base = model(latents, timestep, **without)
        channels = latents.shape[1]
        predicted, fraction = split_variance(output, channels)
        base, _ = split_variance(base, channels)
        predicted = base.lerp(predicted, scale)
        return predicted if fraction is None else torch.cat([predicted, fraction], dim=1)

    return model_guided


def _doubled(name: str, given: Any, without: Any, batch: int) -> Any:
    """A keyword of the conditional and the unconditional half of a batch."""
    if isinstance(given, Tensor) and isinstance(without, Tensor):
        halves = (half.expand(batch, *half.shape[1:]) for half in (given, without))
        return torch.cat(list(halves))
    if given is without or (not isinstance(given, Tensor) and given == without):
        return given
    raise TypeError(
        f"{name} must be tensors with and without condition to be batched, got "
        f"{type(given).__name__} and {type(without).__name__}"
    )


def draw_noise(
    shape: Sequence[int],
    generator: Generator | Sequence[Generator] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise (B, ...), drawn in fp32 where the generator lives, then moved.

    Args:
        generator: one for the batch; or one for each of its B samples, with which a sample's noise
            is the same in any batch; None is PyTorch's global one on `device`.
    Raises:
        ValueError: the number of generators is not B.
    """
    device = torch.device(device)
    if generator is None:
        return torch.randn(shape, device=device).to(dtype)
    if isinstance(generator, Generator):
        # From pinned memory a copy to the GPU does not wait for the work queued there.
        pin = device.type == "cuda" and generator.device.type == "cpu"
        noise = torch.randn(shape, generator=generator, device=generator.device, pin_memory=pin)
        return noise.to(device, non_blocking=True).to(dtype)
    if len(generator) != shape[0]:
        raise ValueError(f"generator must be one or {shape[0]} of them, got {len(generator)}")
    return torch.stack(
        [draw_noise(shape[1:], each, device=device, dtype=dtype) for each in generator]
    )


def seeded(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[Generator]:
    """One generator per sample; on the CPU the same seed gives the same noise on any machine."""
    return [Generator(device).manual_seed(seed) for seed in seeds]


def _begin(
    noise: Tensor,
    schedule: Schedule,
    known: Tensor | None,
    clean: Tensor | None,
    prediction: Prediction,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check what all samplers take; the state, a copy of `noise` that is clean where known, a
    buffer like it, and `clean` in its dtype, None where nothing is known."""
    if noise.ndim != 5 or not noise.is_floating_point():
        raise ValueError(
            f"noise must be float (B, C, T, H, W), got {noise.dtype} of shape {tuple(noise.shape)}"
        )
    check_prediction(prediction, schedule, len(schedule) - 1)
    if known is not None:
        known_cells(known, noise)
        if clean is None:
            raise ValueError("clean must be given with known, got None")
        if clean.shape != noise.shape or clean.dtype != noise.dtype:
            raise ValueError(
                f"clean must be {noise.dtype} of shape {tuple(noise.shape)} like noise, got "
                f"{clean.dtype} of shape {tuple(clean.shape)}"
            )
    wide = torch.promote_types(noise.dtype, torch.float32)
    x = noise.to(wide, copy=True, memory_format=torch.contiguous_format)
    if known is None or clean is None:
        return x, torch.empty_like(x), None
    clean = clean.to(wide)
    return mix_known(x, clean, known), x, clean


def _downward(
    schedule: Schedule, progress: Progress | None, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """The indices of the chain, the noisiest first, with their rows in a table, on `device`."""
    total = len(schedule)
    rows = torch.arange(total, device=device)
    for index in reversed(range(total)):
        yield index, rows[total - 1 - index]
        if progress:
            progress(total - index, total)


def _call(
    model: Model,
    x: Tensor,
    index: int,
    schedule: Schedule,
    noise: Tensor,
    known: Tensor | None,
    condition: Condition | None,
) -> Tensor:
    # A fresh tensor filled on the device: neither a copy from the host nor a view whose address
    # would make a compiled model start over.
    timestep = torch.full((1,), int(schedule.timestep_map[index]), device=x.device)
    return model(x.to(noise.dtype), timestep, known=known, **(condition or {}))


def _step_noise(x: Tensor, generator: Generator | Sequence[Generator] | None) -> Tensor:
    return draw_noise(x.shape, generator, device=x.device, dtype=x.dtype)
