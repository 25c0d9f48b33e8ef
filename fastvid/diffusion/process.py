"""The diffusion process at one step: noising, what a model predicts, posteriors, known cells.

`alpha` and `sigma` are the factors of data and noise: `x = alpha * x0 + sigma * eps`. `index` is a
place in the chain, either an int (coefficients are Python numbers) or int64 (B,) or (1,) on the
device of the tensors. Everything is differentiable and keeps the dtype of `x`.
"""

from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from .schedule import Schedule

Prediction = Literal["eps", "v", "x0"]
FixedVariance = Literal["small", "large"]


def add_noise(x0: Tensor, noise: Tensor, index: int | Tensor, schedule: Schedule) -> Tensor:
    """Clean data at a noise level: `alpha * x0 + sigma * noise`.

    Args:
        x0, noise: (B, ...).
        index: int or int64 (B,) or (1,).
    """
    alpha = _coefficient("sqrt_alphas_cumprod", index, schedule, x0)
    sigma = _coefficient("sqrt_one_minus_alphas_cumprod", index, schedule, x0)
    return (alpha * x0 + sigma * noise).to(x0.dtype)


def target_of(
    x0: Tensor, noise: Tensor, index: int | Tensor, schedule: Schedule, prediction: Prediction
) -> Tensor:
    """What a model of this prediction should return: noise, `alpha * noise - sigma * x0`, or x0."""
    check_prediction(prediction)
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    alpha = _coefficient("sqrt_alphas_cumprod", index, schedule, x0)
    sigma = _coefficient("sqrt_one_minus_alphas_cumprod", index, schedule, x0)
    return (alpha * noise - sigma * x0).to(x0.dtype)


def predict_x0(
    output: Tensor, x: Tensor, index: int | Tensor, schedule: Schedule, prediction: Prediction
) -> Tensor:
    """The clean data that a prediction stands for.

    Args:
        output: (B, ...) the model's prediction, shape of `x`.
        x: (B, ...) noisy state at `index`.
    Raises:
        ValueError: a noise prediction where the chain may be at zero SNR, which says nothing of x0.
    """
    check_prediction(prediction, schedule, index)
    if prediction == "x0":
        return output
    if prediction == "v":
        alpha = _coefficient("sqrt_alphas_cumprod", index, schedule, x)
        sigma = _coefficient("sqrt_one_minus_alphas_cumprod", index, schedule, x)
        return (alpha * x - sigma * output).to(x.dtype)
    scale = _coefficient("sqrt_recip_alphas_cumprod", index, schedule, x)
    ratio = _coefficient("sqrt_recipm1_alphas_cumprod", index, schedule, x)
    return (scale * x - ratio * output).to(x.dtype)


def predict_eps(
    output: Tensor, x: Tensor, index: int | Tensor, schedule: Schedule, prediction: Prediction
) -> Tensor:
    """The noise that a prediction stands for; well defined at zero SNR too. See `predict_x0`."""
    check_prediction(prediction)
    if prediction == "eps":
        return output
    alpha = _coefficient("sqrt_alphas_cumprod", index, schedule, x)
    sigma = _coefficient("sqrt_one_minus_alphas_cumprod", index, schedule, x)
    if prediction == "v":
        return (sigma * x + alpha * output).to(x.dtype)
    return ((x - alpha * output) / sigma).to(x.dtype)


def posterior(
    x0: Tensor, x: Tensor, index: int | Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and clipped log-variance of q(x_{t-1} | x_t = x, x0).

    Returns:
        mean (B, ...); variance and log-variance, 0-d for an int index, else (B or 1, 1, ...).
    """
    of_x0 = _coefficient("posterior_mean_coef1", index, schedule, x)
    of_x = _coefficient("posterior_mean_coef2", index, schedule, x)
    variance = _coefficient("posterior_variance", index, schedule, x)
    log_variance = _coefficient("posterior_log_variance_clipped", index, schedule, x)
    mean = (of_x0 * x0 + of_x * x).to(x.dtype)
    return mean, _tensor(variance, x), _tensor(log_variance, x)


def learned_log_variance(fraction: Tensor, index: int | Tensor, schedule: Schedule) -> Tensor:
    """Log-variance of p(x_{t-1} | x_t) from the model's fraction (B, C, ...).

    -1 is the posterior variance (clipped, as in `posterior`), 1 is beta; linear between them.
    """
    low = _coefficient("posterior_log_variance_clipped", index, schedule, fraction)
    high = _coefficient("log_betas", index, schedule, fraction)
    return low + (fraction + 1) / 2 * (high - low)


def split_variance(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Part a model's output in its prediction and its variance fraction, by the channel count.

    Args:
        output: (B, C, ...) with a fixed variance, (B, 2C, ...) with a learned one.
        channels: C.
    Returns:
        prediction (B, C, ...), and fraction (B, C, ...) in about [-1, 1] or None; both views.
    Raises:
        ValueError: any other number of channels.
    """
    found = output.shape[1]
    if found == channels:
        return output, None
    if found == 2 * channels:
        return output[:, :channels], output[:, channels:]
    raise ValueError(f"output must have {channels} or {2 * channels} channels, got {found}")


def mix_known(noisy: Tensor, clean: Tensor, known: Tensor | None) -> Tensor:
    """Clean data where it is known, the noisy state elsewhere, bit for bit.

    Args:
        noisy, clean: (B, C, T, H, W); what `clean` holds at unknown cells is never looked at.
        known: bool (B or 1, T) or (B or 1, T, H, W), True = given; None: nothing is.
    Raises:
        TypeError: `known` is not bool.
        ValueError: its shape is none of these.
    """
    return noisy if known is None else torch.where(known_cells(known, noisy), clean, noisy)


def known_cells(known: Tensor, like: Tensor) -> Tensor:
    """`known` as (B or 1, 1, T, H or 1, W or 1), ready to broadcast over `like` (B, C, T, H, W)."""
    if known.dtype != torch.bool:
        raise TypeError(f"known must be bool with True = given, got {known.dtype}")
    batch, _, frames, height, width = like.shape
    whole = known.ndim == 2
    if known.ndim not in (2, 4) or known.shape[0] not in (1, batch):
        fits = False
    else:
        fits = known.shape[1:] == ((frames,) if whole else (frames, height, width))
    if not fits:
        raise ValueError(
            f"known must be (B, T) or (B, T, H, W), B=1 or {batch} T={frames} H={height} "
            f"W={width}, got {tuple(known.shape)}"
        )
    return rearrange(known, "b t -> b 1 t 1 1") if whole else rearrange(known, "b ... -> b 1 ...")


def check_prediction(
    prediction: str, schedule: Schedule | None = None, index: int | Tensor | None = None
) -> None:
    """Refuse an unknown prediction, and noise prediction where x0 cannot be read from it."""
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction must be eps, v or x0, got {prediction!r}")
    if prediction != "eps" or schedule is None or schedule.terminal_snr > 0:
        return
    # A tensor index is not looked at: that would wait for its device.
    if not isinstance(index, int) or index == len(schedule) - 1:
        raise ValueError(
            "prediction must be v or x0 on a schedule with zero terminal SNR, got 'eps': its last "
            "step is pure noise, and the noise says nothing of the data"
        )


def check_fixed_variance(fixed_variance: str) -> None:
    if fixed_variance not in get_args(FixedVariance):
        raise ValueError(f"fixed_variance must be small or large, got {fixed_variance!r}")


def _coefficient(
    table: str, index: int | Tensor, schedule: Schedule, like: Tensor
) -> float | Tensor:
    if isinstance(index, int):
        return schedule.at(table, index)
    return schedule.gather(table, index, like)


def _tensor(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.full((), value, dtype=wide, device=like.device)
