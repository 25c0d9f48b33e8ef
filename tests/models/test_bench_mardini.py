"""The benchmark of MarDini runs and agrees, and its counts are those of a FLOP counter."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import goals, rows
from benchmarks.models import bench_mardini
from benchmarks.papers import tables, work
from benchmarks.rivals.mardini_eager import MarDiniEager
from fastvid.models.mardini import MARDINI_L_T
from tests.models.mardini_cases import config_of

SPEC = {"temporal": True, "asymmetric": True, "frames": 13, "side": 512, "batch": 1, "steps": 25}
SPEC |= {"job": "sample", "size": "L", "dtype": "bfloat16", "guided": False}
SPEC |= {"compile": False, "quick": False}


def test_quick_run(tmp_path, capsys):
    arguments = "--quick --attention ST --frames 3 --steps 2 --guided --job sample backward"
    arguments += f" --threads 1 --device cpu --out {tmp_path / 'rows.jsonl'}"
    assert bench_mardini.main(arguments.split()) == 0
    found = list(map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()))
    assert [row["match"] for row in found] == [True, True]
    assert [row["guided"] for row in found] == [True, False]
    assert "paper" not in found[0]
    name = "mardini/sample tiny/ST asymmetric frames=3 side=128 batch=1 float32 2 steps guided"
    assert name + " depth 2" in capsys.readouterr().out


def test_published_rows_find_their_cells():
    published = {cell["key"]: cell for cell in tables.PUBLISHED["mardini"]}
    found = bench_mardini.counts(SPEC)
    cell = published[found["paper"]]
    assert (cell["seconds"], cell["temporal"], cell["asymmetric"]) == (6.05, True, True)
    for cell in published.values():
        spec = SPEC | {name: cell[name] for name in ("size", "temporal", "asymmetric")}
        spec |= {name: cell[name] for name in ("frames", "side")}
        assert bench_mardini.counts(spec)["paper"] == cell["key"]
        config = bench_mardini.config_of(spec)
        assert (config.generator.attention == "time") is cell["temporal"]
        assert config.planner.side == (32 if cell["asymmetric"] else cell["side"] // 8)
    for other in ({"guided": True}, {"dtype": "float32"}, {"steps": 10}, {"quick": True}):
        assert "paper" not in bench_mardini.counts(SPEC | other)


def test_our_column_comes_from_a_row_of_the_benchmark():
    row = SPEC | bench_mardini.counts(SPEC) | {"case": "mardini/sample", "room": "mardini"}
    row |= {"rival": "fastvid", "match": True, "machine": "A GPU", "device": "cuda", "threads": 1}
    row |= {"p50_ms": 2180.0, "peak_mib": 10000.0, "matmul_bf16_tflop_per_s": 700.0}
    lines = {line.name: line.ours for line in tables.mardini([row]).lines}
    assert lines["L/T asymmetric 13 frames 512x512"] == (
        "2.18 s, 50 % of its matmul, 10.5 GB (A GPU; bfloat16)",
    )
    assert lines["L/T asymmetric 13 frames 256x256"] == (tables.NOT_MEASURED,)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"attention": "clip", "cross_scope": "clip", "planner": {"next_token": False}},
        {"next_token": True, "patch": 2, "planner": {"patch": 2}},
    ],
    ids=str,
)
def test_the_count_is_what_a_flop_counter_reads(rand, choices):
    config, T, cells = config_of(**choices), 3, 8
    peer = MarDiniEager(config).eval()
    known = torch.tensor([[True, False, False]])
    side = config.planner.side
    latents, low = rand(1, 4, T, cells, cells), rand(1, 4, T, side, side)

    def counted(call):
        # Over the CPU's fused attention the counter reads nothing.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = call()
        return counter.get_total_flops(), result

    plan, signal = counted(lambda: peer.plan(low, known))
    step, _ = counted(lambda: peer(latents, torch.tensor([5]), known, signal))
    again = work.mardini_context(config, T).flops  # the peer makes it in every step
    assert work.mardini_plan(config, T).flops == plan
    assert work.mardini_step(config, T, cells).flops == step - again
    video = work.mardini_of(config, T, cells, steps=4)
    assert video.flops == plan + again + 4 * (step - again)


def test_the_papers_formula_leaves_out_little():
    planner = replace(MARDINI_L_T.planner, next_token=False)
    whole = work.mardini_of(replace(MARDINI_L_T, planner=planner), 13, 64)
    formula = work.mardini("L", 13, 512, temporal=True, asymmetric=True)
    assert whole.tokens == formula.tokens
    assert 1 < whole.flops / formula.flops < 1.002


def test_the_goal_reads_the_share_of_matmul_off_a_row(tmp_path):
    (goal, memory_goal) = (goal for goal in goals.GOALS if goal.case.startswith("mardini/"))
    case = bench_mardini.label(SPEC)
    row = {"case": case, "match": True, "fastvid_p50_ms": 2000.0, "flops": 700e12}
    row |= {"matmul_bf16_tflop_per_s": 500.0, "fastvid_peak_mib": 9000.0, "dtype": "bfloat16"}
    row |= dict.fromkeys([f"wall_ratio_p{p}" for p in (20, 50, 80)], 1.5)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    found = rows.read(path)
    assert goals.measured(goal, found)[0] == pytest.approx(0.7)
    assert goals.measured(memory_goal, found)[0] == 9000
    assert goals.measured(goal, [each | {"match": False} for each in found]) is None
    labels = {
        bench_mardini.label(spec) for spec in bench_mardini.specs(torch.device("cuda"), False)
    }
    assert case in labels
