"""Samplers as tables of coefficients, for `fastvid.functional.guided_step`.

A row is one step: x0 = x0_of_x * x + x0_of_prediction * prediction, clipped where asked, and the
next state is of_x0 * x0 + of_x * x + of_noise * noise. Rows stand in the order in which the steps
are taken, the noisiest first, so row 0 of a schedule is its last index. Columns are those five, in
this order. Tables are made in float64 and come in `dtype` on the CPU, float32 unless the state is
float64: move them once.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .process import FixedVariance, Prediction, check_fixed_variance
from .schedule import Schedule
from .steps import check_eta, ddim_factors, fixed_spread, x0_factors


def ddim_table(
    schedule: Schedule,
    *,
    eta: float = 0.0,
    prediction: Prediction = "eps",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """DDIM: deterministic for `eta` 0, as noisy as ancestral for `eta` 1.

    Returns:
        (S, 5).
    Raises:
        ValueError: an argument is not as in `ddim_step`, or noise prediction at zero terminal SNR.
    Source: Song et al., arXiv:2010.02502.
    """
    check_eta(eta)
    return _table(
        (
            (*x0_factors(index, schedule, prediction), *ddim_factors(index, schedule, eta))
            for index in reversed(range(len(schedule)))
        ),
        dtype,
    )


def ddpm_table(
    schedule: Schedule,
    *,
    prediction: Prediction = "eps",
    fixed_variance: FixedVariance = "small",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Ancestral sampling with a fixed variance; a learned one is not a number of the schedule.

    Returns:
        (S, 5); the last step adds no noise.
    Raises:
        ValueError: an argument is not as in `ddpm_step`, or noise prediction at zero terminal SNR.
    Source: Ho et al., arXiv:2006.11239.
    """
    check_fixed_variance(fixed_variance)
    return _table(
        (
            (
                *x0_factors(index, schedule, prediction),
                schedule.at("posterior_mean_coef1", index),
                schedule.at("posterior_mean_coef2", index),
                fixed_spread(index, schedule, fixed_variance) if index else 0.0,
            )
            for index in reversed(range(len(schedule)))
        ),
        dtype,
    )


def euler_table(sigmas: Sequence[float] | Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Flow matching by Euler's rule, for a model that predicts the velocity eps - x0.

    Args:
        sigmas: (S + 1,) falling noise levels from at most 1, the last usually 0.
    Returns:
        (S, 5).
    Raises:
        ValueError: they do not fall, or leave [0, 1].
    Source: Lipman et al., arXiv:2210.02747.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64).tolist()
    if len(levels) < 2 or not (levels[0] <= 1 and levels[-1] >= 0):
        raise ValueError(f"sigmas must be at least two numbers in [0, 1], got {levels}")
    pairs = list(pairwise(levels))
    if not all(high > low for high, low in pairs):
        raise ValueError(f"sigmas must fall from step to step, got {levels}")
    # x + (low - high) v, with v = (x - x0) / high.
    return _table(((1.0, -high, 1 - low / high, low / high, 0.0) for high, low in pairs), dtype)


def _table(rows: Iterable[tuple[float, ...]], dtype: torch.dtype) -> Tensor:
    return torch.tensor(list(rows), dtype=dtype)
