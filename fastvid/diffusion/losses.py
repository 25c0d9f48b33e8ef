"""The training loss: mean square of the prediction, plus the bound that trains a learned variance.

Given cells are clean in the model's input and teach nothing. How the two terms treat them is the
`average` keyword: "unknown" counts only what is to be generated, "all" divides by every cell and
lets the variational term see every cell, as published VDT models were trained.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .process import (
    Prediction,
    add_noise,
    check_prediction,
    known_cells,
    learned_log_variance,
    mix_known,
    posterior,
    predict_x0,
    split_variance,
    target_of,
)
from .schedule import Schedule

Average = Literal["unknown", "all"]


def diffusion_loss(
    model: Callable[..., Tensor],
    clean: Tensor,
    index: Tensor,
    noise: Tensor,
    schedule: Schedule,
    *,
    known: Tensor | None = None,
    prediction: Prediction = "eps",
    average: Average = "unknown",
    variational: float = 1.0,
    condition: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Loss of every sample at one noise level each.

    Args:
        model: called as `model(latents, timestep, known=known, **condition)` on noisy latents whose
            known cells are clean; returns (B, C or 2C, T, H, W), 2C with a learned variance.
        clean, noise: (B, C, T, H, W) latents and standard normal noise.
        index: (B,) int64, place in the chain, on the device of `clean`.
        known: bool (B or 1, T) or (B or 1, T, H, W), True = given; None: nothing is.
        average: `"unknown"`: both terms are means over the cells to be generated. `"all"`: the
            squares of those cells are summed and divided by the count of all, and the variational
            term is a mean over all (the official loss of VDT).
        variational: factor of the variational term; official 1, or `len(schedule) / 1000`
            when rescaled; 0 leaves it out.
        condition: further keywords of the model, such as `{"condition_frames": ...}`.
    Returns:
        (B,) tensors: `"loss"` = `"mse"` + `"vb"`; `"vb"` in bits per element and already times
        `variational`, only there with a learned variance. It does not train the prediction itself.
        A sample with every cell known has loss NaN where it cannot be refused without waiting for
        the device.
    Raises:
        ValueError: nothing to generate, noise prediction at zero terminal SNR, a shape, or on the
            CPU an index outside the chain.
        TypeError: `known` is not bool, or `index` not int64.
    Source: Nichol & Dhariwal, arXiv:2102.09672 (hybrid loss); Lu et al., arXiv:2305.13311 (known).
    """
    check_prediction(prediction, schedule)
    if average not in ("unknown", "all"):
        raise ValueError(f"average must be unknown or all, got {average!r}")
    if noise.shape != clean.shape:
        raise ValueError(f"noise must be {tuple(clean.shape)} like clean, got {tuple(noise.shape)}")
    weight, vb_weight = _weights(known, clean, average)

    wide = torch.promote_types(clean.dtype, torch.float32)
    clean, noise, latents_dtype = clean.to(wide), noise.to(wide), clean.dtype
    x = add_noise(clean, noise, index, schedule)
    latents = mix_known(x, clean, known).to(latents_dtype)
    output = model(latents, schedule.timesteps(index), known=known, **(condition or {}))
    predicted, fraction = split_variance(output.to(wide), clean.shape[1])

    target = target_of(clean, noise, index, schedule, prediction)
    terms = {"mse": _mean((predicted - target).square(), weight)}
    if fraction is None or not variational:
        return {"loss": terms["mse"], **terms}
    bits = _bits(predicted.detach(), fraction, clean, x, index, schedule, prediction)
    terms["vb"] = variational * _mean(bits, vb_weight)
    return {"loss": terms["mse"] + terms["vb"], **terms}


def _weights(
    known: Tensor | None, clean: Tensor, average: Average
) -> tuple[Tensor | None, Tensor | None]:
    """Weights of the two terms, (B or 1, 1, T, H, W) of mean 1, or None: 1 everywhere."""
    if known is None:
        return None, None
    cells = known_cells(known, clean)
    if cells.device.type == "cpu" and not torch.compiler.is_compiling():
        full = cells.flatten(1).all(1)
        if full.any():
            raise ValueError(
                "known must leave something to generate in every sample; all is given in "
                f"{full.nonzero().flatten().tolist()}"
            )
    unknown = (~cells).to(torch.float32)
    share = unknown.flatten(1).mean(1).reshape(-1, 1, 1, 1, 1)
    if average == "unknown":
        weight = unknown / share
        return weight, weight
    return unknown * (share / share), None  # 0 / 0: all known is NaN, never a loss of 0


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted mean per sample. A product, so that a NaN shows even where the weight is 0."""
    return (values if weight is None else values * weight).flatten(1).mean(1)


def _bits(
    predicted: Tensor,
    fraction: Tensor,
    clean: Tensor,
    x: Tensor,
    index: Tensor,
    schedule: Schedule,
    prediction: Prediction,
) -> Tensor:
    """Variational bound of one step in bits per element: KL to the posterior, NLL at index 0."""
    x0 = predict_x0(predicted, x, index, schedule, prediction)
    mean, _, true_log = posterior(x0, x, index, schedule)
    true_mean, _, _ = posterior(clean, x, index, schedule)
    log_variance = learned_log_variance(fraction, index, schedule)
    gap = (true_mean - mean).square()
    kl = 0.5 * (log_variance - true_log - 1 + (true_log - log_variance).exp())
    kl = kl + 0.5 * gap * (-log_variance).exp()
    nll = _discretised_nll(clean, mean, 0.5 * log_variance)
    first = (index == 0).reshape(-1, 1, 1, 1, 1)
    return torch.where(first, nll, kl) / math.log(2)


def _discretised_nll(clean: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """-log P of the 1/127.5-wide bin around `clean` under a Gaussian, in nats.

    The outermost bins, beyond +-0.999, reach to infinity.
    """
    offset, inverse = clean - mean, (-log_sigma).exp()
    upper = _normal_cdf((offset + 1 / 255) * inverse)
    lower = _normal_cdf((offset - 1 / 255) * inverse)
    above_lower = torch.where(clean > 0.999, 1 - lower, upper - lower)
    mass = torch.where(clean < -0.999, upper, above_lower)
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    # The tanh form published models were trained with; within 3e-4 of the exact one.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
