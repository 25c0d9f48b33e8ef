"""What only the benchmark of `masked_attention` has."""

import pytest
import torch

from benchmarks import harness
from benchmarks.kernels import bench_masked_attention as bench
from fastvid.functional import masked_attention

CPU = torch.device("cpu")


def test_forward_and_backward_together_are_those_of_the_backward(rand):
    visibility = bench.causal([2, 3], CPU)
    inputs = [rand(1, 5, 2, 16).cpu() for _ in range(4)]

    def attend(q, k, v):
        return masked_attention(q, k, v, visibility)

    both, alone = (bind(attend)(*inputs)() for bind in (bench.both_of, harness.backward_of))
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize("tokens", [64, 128, 256, 1024])
def test_time_is_held_against_what_is_visible(tokens):
    names = [case.name for case in bench.cases(CPU, False) if f", {tokens} " in case.name]
    for mask in ("identity 9 of 17", "causal"):
        for direction in ("forward", "forward and backward"):
            assert f"{mask}, {tokens} {direction}" in names


def test_tables_match_to_the_last_number():
    case = bench.tables(CPU)
    (table,) = case.make_inputs(CPU)
    eager = case.rivals["eager"](table)()
    worth = harness.judge(case, (table,), eager)
    assert worth(case.rivals["fastvid"](table)())["match"]
    changed = [each.clone() for each in eager]
    changed[1][0, 0, 0, 0] += 1
    assert not worth(changed)["match"]
