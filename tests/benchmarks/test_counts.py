"""The bytes and FLOPs of the benchmarks: by hand, and against PyTorch's counter.

The counter reads 0 over SDPA on a CPU, so it runs under `SDPBackend.MATH`. Backward there is four
products; the rooms make the scores anew, which is the fifth, and count it as everybody does.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import run
from benchmarks.kernels import (
    bench_guided_step,
    bench_masked_attention,
    bench_modulate,
    bench_pyramid_renoise,
    bench_temporal_attention,
)

CPU = torch.device("cpu")


def counted(case, rival):
    """FLOPs of a call of the rival, that of forward included if it is a backward."""
    inputs = case.make_inputs(CPU)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        case.rivals[rival](*inputs)()
    return counter.get_total_flops()


# The rival that does no work on what is hidden: SDPA on slices.
@pytest.mark.parametrize(
    ("room", "rival"),
    [
        ("asymmetric_attention", "eager"),
        ("masked_attention", "sliced"),
        ("temporal_attention", "permute"),
    ],
)
def test_flops_are_those_of_the_counter(room, rival):
    cases = run.cases(room, CPU, quick=True)
    assert any("backward" in case.name for case in cases)
    for case in cases:
        if "known" in case.name or "window" in case.name:
            continue  # in a tile so small every rival computes what is hidden too
        found = counted(case, rival)
        if "backward" in case.name:
            found *= 5 / 6  # two products forward and four backward were counted; five are meant
        assert case.flops == found


def test_flops_by_hand():
    causal = run.cases("masked_attention", CPU, quick=True)[0]
    pairs = 16 * 16 * (1 + 2 + 3 + 4)  # frames of 16 tokens: each sees itself and those before
    assert causal.flops == 2 * 2 * (1 * 2) * pairs * 16
    sizes = {"B": 3, "T": 5, "N": 7, "heads": 2, "E": 24}
    assert bench_temporal_attention.flops(True, **sizes) == 2 * 2 * 3 * 7 * 2 * 25 * 24
    assert bench_temporal_attention.flops(False, **sizes) == 5 * 2 * 3 * 7 * 2 * 25 * 24
    cases = run.cases("temporal_attention", CPU, quick=True)
    (windowed,) = (c for c in cases if c.name == "forward, window" and c.dtype == torch.float32)
    pairs = 3 + 4 + 5 + 4 + 3  # two frames before and two after, of five
    assert windowed.flops == 2 * 2 * 8 * 2 * pairs * 24
    assert bench_masked_attention.flops("backward", 100.0, B=1, heads=2, E=8) == 5 * 2 * 1600
    both = bench_masked_attention.flops("forward and backward", 100.0, B=1, heads=2, E=8)
    assert both == 7 * 2 * 1600


def test_bytes_by_hand():
    one = 2 * 64 * 2 * 16 * 4  # a float32 tensor of (2, 64, 2, 16)
    count = bench_masked_attention.bytes_moved
    sizes = {"B": 2, "N": 64, "heads": 2, "E": 16, "itemsize": 4}
    assert count("forward", **sizes) == 4 * one  # q k v | out
    assert count("backward", **sizes) == 8 * one  # q k v out dout | dq dk dv
    assert count("forward and backward", **sizes) == 12 * one
    count = bench_temporal_attention.bytes_moved
    assert count(True, B=2, T=8, N=8, heads=2, E=16, itemsize=4) == 4 * one  # q k v | out
    assert count(False, B=2, T=8, N=8, heads=2, E=16, itemsize=4) == 7 * one  # q k v dout | 3
    one = 2 * 64 * 384 * 2  # a bfloat16 tensor of (2, 64, 384)
    count = bench_modulate.bytes_moved
    assert count(True, B=2, N=64, D=384, itemsize=2) == 2 * one  # x | y
    assert count(False, B=2, N=64, D=384, itemsize=2) == 3 * one  # x dy | dx
    numbers = 2 * 3 * 4 * 8 * 8
    count = bench_guided_step.nbytes
    # state and two bfloat16 branches | state; where known, clean | state
    assert count((2, 3, 4, 8, 8), torch.bfloat16) == (4 + 2 * 2 + 4) * numbers
    assert count((2, 3, 4, 8, 8), torch.float32, 0.25) == (4 + 2 * 4 * 0.75 + 4) * numbers
    count, numbers = bench_pyramid_renoise.nbytes, 2 * 3 * 4 * 8 * 8
    assert count((2, 3, 4, 8, 8), torch.float32, given=False) == (1 + 4) * 4 * numbers  # x | out
    assert count((2, 3, 4, 8, 8), torch.bfloat16, given=True) == (1 + 4 + 4) * 2 * numbers  # noise


def counts_of(room, column="nbytes"):
    """By the name of the case, in float32."""
    cases = run.cases(room, CPU, quick=True)
    return {c.name: getattr(c, column) for c in cases if c.dtype == torch.float32}


def test_bytes_of_the_small_cases_by_hand():
    q, k = 2 * 3 * 8 * 2 * 16 * 4, 3 * 4 * 2 * 16 * 4  # (2, 3, 8, 2, 16), and one set of 4 keys
    assert counts_of("asymmetric_attention") == {
        "frame forward": 2 * q + 2 * k,  # q k v | out
        "frame backward": 4 * q + 4 * k,  # q k v out dout | dq dk dv
        "clip forward": 2 * q + 4 * k,  # keys of either sample
        "clip backward": 4 * q + 8 * k,
    }
    one = 2 * 4 * 8 * 8 * 4  # (1, 2, 4, 8, 8)
    assert counts_of("noising") == {
        "given": 4 * one,  # x0 noise | noisy target
        "drawn": 3 * one,
        "mse": 2 * one,  # pred target | a number
        "mse backward": 3 * one,  # pred target | dpred
    }
    one = 24 * 2 * 24 * 4  # (1, 24, 2, 24)
    assert counts_of("qk_norm_rope") == {
        "forward of quick": 4 * one,  # q k | q' k'
        "backward of quick": 6 * one,  # q k dq' dk' | dq dk
    }
    one = 2 * 4 * 6 * 4  # (1, 2, 1, 4, 6)
    clip = 2 * 2 * 8 * 12 * 4  # (1, 2, 2, 8, 12)
    found = counts_of("pyramid_renoise")
    found.pop("training columns")  # as long as the plan of its units
    assert found == {
        "drawn, looped": 5 * one,  # x | a plane of four times the size
        "drawn": 5 * one,
        "given": 9 * one,  # x noise | the same
        "latent pyramid": clip + clip // 4 + clip // 16,  # x | two levels
        "stage endpoints": 2 * clip + clip // 4 + 2 * clip,  # x noise lower | sample target
    }


def test_flops_of_the_small_cases_by_hand():
    pairs = 2 * 3 * 8 * 4  # of every frame with its own keys
    assert counts_of("asymmetric_attention", "flops") == {
        "frame forward": 2 * 2 * pairs * 2 * 16,
        "frame backward": 5 * 2 * pairs * 2 * 16,
        "clip forward": 2 * 2 * 3 * pairs * 2 * 16,
        "clip backward": 5 * 2 * 3 * pairs * 2 * 16,
    }


@pytest.mark.parametrize("room", run.rooms())
def test_no_room_counts_more_bytes_than_its_tensors_have(room):
    """Saved results may be read beside the inputs; nothing is counted twice."""
    for case in run.cases(room, CPU, quick=True):
        inputs = case.make_inputs(CPU)
        result = case.rivals["eager"](*inputs)()
        results = [result] if isinstance(result, torch.Tensor) else [*result]
        tensors = sum(tensor.nbytes for tensor in [*inputs, *results])
        assert 0 < case.nbytes <= 1.3 * tensors
