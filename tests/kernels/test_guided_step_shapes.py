"""`guided_step` over whatever Hypothesis draws."""

import torch

from fastvid.functional import guided_step
from tests.kernels.guided_step_cases import SCALES, STEP, TABLES, check, draw_known
from tests.kernels.latent_strategies import DTYPE, LAYOUT, SETTINGS, SHAPE, hypothesis, st
from tests.kernels.noising_cases import LAYOUTS


@hypothesis.settings(max_examples=80, **SETTINGS)
@hypothesis.given(
    shape=SHAPE,
    dtype=DTYPE,
    layout=LAYOUT,
    kind=st.sampled_from(["nothing", "frames", "frames for all", "cells", "cells for all"]),
    branches=st.sampled_from(sorted(SCALES)),
    clip=st.sampled_from([None, 0.5]),
    noisy=st.booleans(),
    row=st.integers(0, 7),
)
def test_guided_step(
    within_budget, cpu_path, shape, dtype, layout, kind, branches, clip, noisy, row
):
    torch.manual_seed(0)
    scales, table = SCALES[branches], TABLES["ddpm" if noisy else "ddim"]
    x, clean, noise, *each = torch.randn(4 + len(scales), *shape).to(dtype)
    x, clean, noise = (LAYOUTS[layout](t) for t in (x, clean, noise))
    prediction = LAYOUTS[layout](torch.cat(each))
    B, _, T, H, W = x.shape
    known = draw_known(kind, B, T, H, W)
    rest = known, None if known is None else clean, noise if noisy else None
    check(within_budget, STEP, x, prediction, table, row, scales, clip, *rest)


@hypothesis.settings(max_examples=40, **SETTINGS)
@hypothesis.given(shape=SHAPE, seed=st.integers(-(2**62), 2**62), stream=st.integers(0, 2**32 - 1))
def test_a_samples_noise_does_not_depend_on_its_batch(cpu_path, shape, seed, stream):
    x, at = torch.zeros(shape), torch.tensor([3])
    drawn = guided_step(x, x, TABLES["ddpm"], at, seed=seed, stream=stream)
    last = x[-1:]
    seed += shape[0] - 1
    alone = guided_step(last, last, TABLES["ddpm"], at, seed=seed, stream=stream)
    assert torch.equal(drawn[-1:], alone)
