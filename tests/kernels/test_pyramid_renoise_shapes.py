"""The pyramid's ops over whatever Hypothesis draws."""

import torch

from fastvid.functional import pyramid_renoise
from tests.kernels.latent_strategies import DTYPE, LAYOUT, SETTINGS, SHAPE, hypothesis, st
from tests.kernels.noising_cases import LAYOUTS
from tests.kernels.pyramid_renoise_cases import (
    ENDPOINTS,
    HALVE,
    KINDS,
    LEVELS,
    RENOISE,
    check_endpoints,
    check_halve,
    check_renoise,
)


@hypothesis.settings(max_examples=60, **SETTINGS)
@hypothesis.given(
    shape=SHAPE,
    dtype=DTYPE,
    layout=LAYOUT,
    kind=st.sampled_from(KINDS),
    gamma=st.floats(1e-6, 1 / 3),
)
def test_pyramid_renoise(within_budget, cpu_path, shape, dtype, layout, kind, gamma):
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    check_renoise(within_budget, RENOISE, x, gamma, kind)


@hypothesis.settings(max_examples=60, **SETTINGS)
@hypothesis.given(
    shape=SHAPE, dtype=DTYPE, layout=LAYOUT, lowest=st.booleans(), endpoints=st.booleans()
)
def test_pyramids_and_endpoints(within_budget, cpu_path, shape, dtype, layout, lowest, endpoints):
    torch.manual_seed(0)
    B, C, T, H, W = shape
    latents, noise = (LAYOUTS[layout](t) for t in torch.randn(2, B, C, T, 2 * H, 2 * W).to(dtype))
    lower = None if lowest else LAYOUTS[layout](torch.randn(shape).to(dtype))
    check_halve(within_budget, HALVE, latents, 2.0)
    check_endpoints(within_budget, ENDPOINTS, latents, lower, noise, endpoints)


@hypothesis.settings(max_examples=40, **SETTINGS)
@hypothesis.given(shape=SHAPE, seed=st.integers(-(2**62), 2**62), stream=st.integers(0, 2**32 - 1))
def test_a_samples_noise_does_not_depend_on_its_batch(cpu_path, shape, seed, stream):
    x, B = torch.zeros(shape), shape[0]
    whole = pyramid_renoise(x, *LEVELS, seed=seed, stream=stream)
    alone = pyramid_renoise(x[-1:], *LEVELS, seed=seed + B - 1, stream=stream)
    torch.testing.assert_close(whole[-1:], alone, rtol=0, atol=1e-6)
