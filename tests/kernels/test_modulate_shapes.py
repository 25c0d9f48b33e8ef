"""`norm_modulate` over whatever Hypothesis draws."""

import pytest
import torch

from fastvid.functional import norm_modulate
from fastvid.kernels.modulate import reference
from tests.kernels.modulate_cases import GRANULARITIES, LAYOUTS, eager, gradients, modulation_shape

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture],  # they hold no state
}
DRAWN = {
    "B": st.integers(1, 3),
    "frames": st.integers(1, 4),
    "per_frame": st.integers(1, 9),
    "shared": st.booleans(),
    "granularity": st.sampled_from(GRANULARITIES),
    "layout": st.sampled_from(sorted(LAYOUTS)),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "modulation_dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "rms": st.booleans(),
}


@hypothesis.settings(max_examples=60, **SETTINGS)
@hypothesis.given(D=st.integers(4, 70), **DRAWN)
def test_any_shape_stride_and_dtype(within_budget, cpu_path, D, **drawn):
    torch.manual_seed(D)
    # Eight together: in one of a few numbers, all of eager's roundings may be lucky.
    runs = [results(lambda B, N: torch.randn(B, N, D), D, **drawn) for _ in range(8)]
    for name, *triples in zip(("y", "dx", "dshift", "dscale"), *runs, strict=True):
        within_budget(*(torch.stack(same) for same in zip(*triples, strict=True)), name)


@hypothesis.settings(max_examples=40, **SETTINGS)
@hypothesis.given(D=st.integers(1, 3), **DRAWN)
def test_rows_of_one_to_three_numbers(cpu_path, D, **drawn):
    """Float32 inside and one rounding, whatever the dtype: dx of few numbers is 0 but for eps, so
    eager's error is luck and no budget. The numbers lie apart and away from 0, since a variance
    near 0 magnifies what the mean lost.
    """
    torch.manual_seed(D)
    apart = 3.0 * torch.arange(D) + 1
    (x, scale, dy), compared = inputs_and_results(
        lambda B, N: apart + torch.rand(B, N, D), D, **drawn
    )
    centred = x if drawn["rms"] else x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1) + 1e-6).max()  # 1000 for one number
    gain, gradient = 1 + scale.abs().max(), dy.abs().max()
    along, tokens = x.abs().max() * rstd, x[..., 0].numel()
    sizes = {  # of what is added up and may cancel
        "y": along * gain,
        "dx": gradient * gain * rstd,
        "dshift": gradient * tokens,
        "dscale": gradient * tokens * along,
    }
    for (name, size), (found, _, wanted) in zip(sizes.items(), compared, strict=True):
        room = 16 * torch.finfo(torch.float32).eps * size
        room = room + torch.finfo(found.dtype).eps * wanted.abs().max()
        assert (found.double() - wanted).abs().max() <= room, name


def results(*arguments, **drawn):
    """(ours, eager's, the exact one) of y and of each gradient."""
    return inputs_and_results(*arguments, **drawn)[1]


def inputs_and_results(
    draw, D, *, B, frames, per_frame, shared, granularity, layout, dtype, modulation_dtype, rms
):
    """x, scale and dy in float64, and what `results` says."""
    N = frames * per_frame
    shape = modulation_shape(1 if shared else B, N, D, granularity, frames)
    x, dy = (LAYOUTS[layout](t.to(dtype)) for t in (draw(B, N), torch.randn(B, N, D)))
    shift, scale = torch.randn(*shape[:-1], 2 * D).to(modulation_dtype).chunk(2, -1)

    def ours(*inputs):
        return norm_modulate(*inputs, rms=rms)

    def plain(*inputs):
        return eager(*inputs, rms).to(dtype)

    found, theirs = (
        (f(x, shift, scale), *gradients(f, dy, x, shift, scale)) for f in (ours, plain)
    )
    assert [t.dtype for t in found] == [dtype, dtype, modulation_dtype, modulation_dtype]
    exact = [tensor.double() for tensor in (x, shift, scale)]
    wanted = (
        reference.norm_modulate(*exact, rms=rms),
        *reference.norm_modulate_backward(dy.double(), exact[0], exact[2], rms=rms),
    )
    return (exact[0], exact[2], dy.double()), list(zip(found, theirs, wanted, strict=True))
