"""One step of a sampler: ancestral, DDIM, and DDIM backwards.

Without clipping, every deterministic step is linear in the state and the model's prediction, so it
is two passes over memory whatever the prediction is. Coefficients are Python numbers made in fp64.
"""

import math

import torch
from torch import Tensor

from .process import (
    FixedVariance,
    Prediction,
    check_fixed_variance,
    check_prediction,
    learned_log_variance,
    split_variance,
)
from .schedule import Schedule


def ddpm_step(
    output: Tensor,
    x: Tensor,
    index: int,
    schedule: Schedule,
    *,
    noise: Tensor | None,
    prediction: Prediction = "eps",
    fixed_variance: FixedVariance = "small",
    clip: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One ancestral step from `index` to the level below.

    Args:
        output: (B, C or 2C, ...) of the model.
        x: (B, C, ...) state at `index`.
        noise: (B, C, ...) standard normal; not used at index 0, None: the mean alone.
        out: buffer for the result, may be `x`, must not share memory with `output` or `noise`.
    Returns:
        (B, C, ...), `out` where given.
    Raises:
        ValueError: an argument is not as above, or noise prediction at zero terminal SNR.
    """
    check_fixed_variance(fixed_variance)
    _expect_apart(output, out)
    predicted, fraction = split_variance(output, x.shape[1])
    of_x0 = schedule.at("posterior_mean_coef1", index)
    of_x = schedule.at("posterior_mean_coef2", index)
    mean = _from_x0(predicted, x, of_x0, of_x, index, schedule, prediction, clip, out)
    if noise is None or index == 0:
        return mean
    if fraction is not None:
        log_variance = learned_log_variance(fraction.to(x.dtype), index, schedule)
        return mean.addcmul_(log_variance.div_(2).exp_(), noise)
    return mean.add_(noise, alpha=fixed_spread(index, schedule, fixed_variance))


def ddim_step(
    output: Tensor,
    x: Tensor,
    index: int,
    schedule: Schedule,
    *,
    noise: Tensor | None = None,
    prediction: Prediction = "eps",
    eta: float = 0.0,
    clip: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One DDIM step from `index` to the level below. Arguments as `ddpm_step`.

    With `clip`, the noise direction follows the clipped x0.
    """
    check_eta(eta)
    _expect_apart(output, out)
    predicted, _ = split_variance(output, x.shape[1])
    of_x0, of_x, spread = ddim_factors(index, schedule, eta)
    stepped = _from_x0(predicted, x, of_x0, of_x, index, schedule, prediction, clip, out)
    if not spread:
        return stepped
    if noise is None:
        raise ValueError(f"noise must be given for eta = {eta}, got None")
    return stepped.add_(noise, alpha=spread)


def ddim_inverse_step(
    output: Tensor,
    x: Tensor,
    index: int,
    schedule: Schedule,
    *,
    prediction: Prediction = "eps",
    clip: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One reverse DDIM step from `index` to the noisier `index + 1`.

    Args:
        index: from -1 (clean data, `output` being the model's at index 0) to S - 2.
        The others are those of `ddpm_step`.
    """
    if not -1 <= index < len(schedule) - 1:
        raise ValueError(f"index must be in [-1, {len(schedule) - 1}), got {index}")
    _expect_apart(output, out)
    predicted, _ = split_variance(output, x.shape[1])
    at = max(index, 0)
    left, left_next = (schedule.at("alphas_cumprod", i) for i in (at, index + 1))
    if index < 0:
        # x is the data; its noise is read as if x stood at index 0: alpha x + sigma eps, where
        # eps = (x - alpha x0) / sigma.
        of_x0, of_x = -(left**0.5), left**0.5 + 1
    else:
        of_x0, of_x = _along(left, left_next**0.5, (1 - left_next) ** 0.5)
    return _from_x0(predicted, x, of_x0, of_x, at, schedule, prediction, clip, out)


def ddim_factors(index: int, schedule: Schedule, eta: float) -> tuple[float, float, float]:
    """Factors of (x0, x, noise) in a DDIM step."""
    left = schedule.at("alphas_cumprod", index)
    left_next = schedule.at("alphas_cumprod_prev", index)
    spread = eta * ((1 - left_next) / (1 - left) * (1 - left / left_next)) ** 0.5
    to_noise = max(1 - left_next - spread**2, 0.0) ** 0.5
    return *_along(left, left_next**0.5, to_noise), spread


def fixed_spread(index: int, schedule: Schedule, fixed_variance: FixedVariance) -> float:
    """Factor of the noise in an ancestral step above index 0."""
    table = "large_log_variance" if fixed_variance == "large" else "posterior_log_variance_clipped"
    return math.exp(schedule.at(table, index) / 2)


def x0_factors(index: int, schedule: Schedule, prediction: Prediction) -> tuple[float, float]:
    """Factors of (x, prediction) in the x0 that a prediction stands for."""
    check_prediction(prediction, schedule, index)
    alpha = schedule.at("sqrt_alphas_cumprod", index)
    sigma = schedule.at("sqrt_one_minus_alphas_cumprod", index)
    if prediction == "eps":
        return 1 / alpha, -sigma / alpha
    return (alpha, -sigma) if prediction == "v" else (0.0, 1.0)


def _along(left: float, to_x0: float, to_noise: float) -> tuple[float, float]:
    """Factors of (x0, x) in `to_x0 * x0 + to_noise * eps`, eps being the noise of x at `left`."""
    share = to_noise / (1 - left) ** 0.5
    return to_x0 - share * left**0.5, share


def _from_x0(
    predicted: Tensor,
    x: Tensor,
    of_x0: float,
    of_x: float,
    index: int,
    schedule: Schedule,
    prediction: Prediction,
    clip: float | None,
    out: Tensor | None,
) -> Tensor:
    """`of_x0 * x0 + of_x * x` for the x0 of the prediction, in two passes unless x0 is clipped."""
    a, b = x0_factors(index, schedule, prediction)
    if clip is None:
        return torch.mul(x, of_x + of_x0 * a, out=out).add_(predicted, alpha=of_x0 * b)
    x0 = (x * a).add_(predicted, alpha=b).clamp_(-clip, clip)
    return torch.mul(x, of_x, out=out).add_(x0, alpha=of_x0)


def _expect_apart(output: Tensor, out: Tensor | None) -> None:
    if out is output:
        raise ValueError(
            "out must be another tensor than output, which is read after the first write"
        )


def check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
