"""`noising` and `masked_mse` over whatever Hypothesis draws."""

import torch

from fastvid.functional import masked_mse, noising
from tests.kernels.latent_strategies import DTYPE, LAYOUT, SETTINGS, SHAPE, hypothesis, st
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
)


@hypothesis.settings(max_examples=80, **SETTINGS)
@hypothesis.given(
    shape=SHAPE,
    dtype=DTYPE,
    layout=LAYOUT,
    kind=st.sampled_from(KNOWN),
    per_frame=st.booleans(),
    own=st.booleans(),
    target=st.sampled_from(TARGETS),
)
def test_noising(within_budget, cpu_path, shape, dtype, layout, kind, per_frame, own, target):
    torch.manual_seed(0)
    x0, noise = (LAYOUTS[layout](t) for t in torch.randn(2, *shape).to(dtype))
    B, _, T, H, W = x0.shape
    known = draw_known(kind, B, T, H, W)
    levels = draw_levels(B, T if per_frame else 1)
    own_level = draw_levels(1, T) if own and known is not None else None
    check_noising(within_budget, NOISING, x0, noise, levels, known, own_level, target)


@hypothesis.settings(max_examples=60, **SETTINGS)
@hypothesis.given(
    shape=SHAPE,
    dtype=DTYPE,
    layout=LAYOUT,
    kind=st.sampled_from(["nothing", "cells", "cells for all"]),
    average=st.sampled_from(["unknown", "all"]),
)
def test_masked_mse(within_budget, cpu_path, shape, dtype, layout, kind, average):
    torch.manual_seed(0)
    pred, target = (LAYOUTS[layout](t) for t in torch.randn(2, *shape).to(dtype))
    B, _, T, H, W = pred.shape
    known = draw_known(kind, B, T, H, W)
    check_mse(within_budget, MSE, MSE_BACKWARD, pred, target, known, average)


@hypothesis.settings(max_examples=40, **SETTINGS)
@hypothesis.given(shape=SHAPE, seed=st.integers(-(2**62), 2**62), stream=st.integers(0, 2**32 - 1))
def test_a_samples_noise_does_not_depend_on_its_batch(cpu_path, shape, seed, stream):
    x0, level = torch.zeros(shape), torch.ones(shape[0])
    eps, _ = noising(x0, level, level, seed=seed, stream=stream)
    alone, _ = noising(x0[-1:], level[:1], level[:1], seed=seed + shape[0] - 1, stream=stream)
    assert torch.equal(eps[-1:], alone)
    assert masked_mse(eps, x0).isfinite().all()
