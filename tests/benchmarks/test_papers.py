"""The papers' tables: published cells with a source, and counts that agree with those published."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import papers, rows
from benchmarks.models import bench_vdt
from benchmarks.papers import memory, tables, work
from benchmarks.rivals.vdt_eager import VDTEager
from fastvid.models.mardini import MARDINI_TINY, MarDini
from fastvid.models.vdt import VDT, VDTConfig


@pytest.mark.parametrize(("frames", "side"), [(4, 8), (3, 12)])
def test_the_count_of_vdt_is_what_a_flop_counter_reads(frames, side):
    config = VDTConfig(dim=32, depth=2, heads=2, frames=frames, height=side, width=side)
    model = VDTEager(config).eval()
    latents = torch.randn(1, frames, config.channels, side, side)
    # Over the CPU's fused attention the counter reads nothing.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents, torch.zeros(1, dtype=torch.int64))
    assert work.vdt(config).flops == counter.get_total_flops()


@pytest.mark.parametrize(
    ("frames", "side", "asymmetric", "symmetric"),
    [(9, 512, 519, 1164), (13, 256, 261, 261), (13, 512, 763, 1911), (17, 1024, 6277, 32948)],
)
def test_mardini_with_temporal_attention_costs(frames, side, asymmetric, symmetric):
    options = {"frames": frames, "side": side, "temporal": True}
    for resolution, tera in ((True, asymmetric), (False, symmetric)):
        done = work.mardini("L", asymmetric=resolution, **options)
        assert done.flops / 1e12 == pytest.approx(tera, abs=0.5)


def test_mardini_computed_by_hand_for_one_small_video():
    """1 frame of 8 x 8 pixels: one token everywhere, so every product is one weight matrix."""
    one = work.mardini("S", 1, 8, temporal=True, asymmetric=False, steps=1)
    planner = 8 * (2 * (8 * 4096**2 + 2 * 4096 * 4096) + 2 * 4 * 4096)
    context = 8 * 2 * 2 * 4096 * 1024
    generator = 8 * (2 * (10 * 1024**2 + 2 * 1024 * 4096) + 3 * 4 * 1024)
    assert one.flops == planner + context + generator


def test_the_pyramid_reaches_the_published_token_counts():
    """15,360 tokens at most, 119,040 at full resolution: section 1 of the paper."""
    last = tables.PUBLISHED["pyramid_flow"][-1]
    height, width, frames = last["height"], last["width"], last["frames"]
    assert sum(work.history(height, width, frames - 1, 2)) == last["longest_call"]
    assert frames * (height // 16) * (width // 16) == last["full_tokens"]
    assert work.history(height, width, 3, 2) == [240, 960, 3840, 3840]


@pytest.mark.parametrize(
    ("height", "frames", "tokens"),
    [
        (384, 16, (15360, 960, 1320, 2940)),
        (768, 16, (61440, 3840, 5280, 11760)),
        (768, 31, (119040, 7440, 8880, 15360)),
    ],
)
def test_the_table_says_the_tokens_of_the_pyramid(height, frames, tokens):
    assert work.pyramid_flow_tokens(height, height * 5 // 3, frames) == tokens
    notes = [line.note for line in tables.pyramid_flow([]).lines]
    says = "{:,} tokens in full; calls of the last unit {:,}, {:,}, {:,}".format(*tokens)
    assert sum(says in note for note in notes) == 1
    assert "paper: 119,040 and at most 15,360" in notes[-1]


def test_bytes_by_hand():
    """Weights once a call, the stream in and out of every block."""
    config = VDTConfig(dim=32, depth=2, heads=2, frames=4, height=8, width=8)
    stream = 2 * 2 * (3 * 4 * 16 * 32) * 4  # in and out of two blocks, batch 3, float32
    assert work.vdt(config, 3).nbytes == memory.vdt_weights(config) + stream
    one = work.mardini("S", 1, 8, temporal=True, asymmetric=False, steps=2)
    planner = 2 * memory.PLANNERS["S"] + 2 * 8 * 4096 * 2
    keys_and_values = 2 * 8 * 2 * 1024
    generator = 2 * memory.GENERATOR + keys_and_values + 2 * 8 * 1024 * 2
    assert one.nbytes == planner + 2 * generator
    image = work.pyramid_flow("MMDiT", 64, 64, 1, steps=(1, 1))
    streams = [2 * (128 + tokens) * 1536 * 2 * 2 * 24 for tokens in (1, 4, 16)]  # guided: twice
    assert image.nbytes == 3 * 2 * memory.PYRAMID_FLOW["MMDiT"] + sum(streams)


def test_every_line_with_work_has_its_bytes_and_memory():
    for name in ("mardini", "pyramid_flow", "vdt"):
        for line in tables.TABLES[name]([]).lines:
            assert line.moved_gb > 0
            assert line.estimate_gb > 0
    sampled = memory.pyramid_flow("miniFLUX", 15360)
    assert sampled == 2 * (1_972_059_200 + 2 * 15488 * 10 * 1920)


def test_the_causal_pyramid_counts_fewer_pairs_and_the_same_tokens():
    causal = work.pyramid_flow("MMDiT", 384, 640, 16)
    dense = work.pyramid_flow("MMDiT", 384, 640, 16, causal=False)
    assert causal.tokens == dense.tokens
    weights = 24 * work.linear(causal.tokens, 12 * 1536**2)
    assert (causal.flops - weights) / (dense.flops - weights) == pytest.approx(0.635, abs=0.005)


def test_every_published_cell_has_its_source_and_a_name_of_its_own():
    cells = [cell for name in tables.TABLES for cell in tables.PUBLISHED[name]]
    assert all(cell["source"] and cell["place"] for cell in cells)
    assert len({cell["key"] for cell in cells}) == len(cells)


def test_the_headline_row_is_forty_percent_of_an_a100():
    line = next(
        line for line in tables.mardini([]).lines if line.name == "L/T asymmetric 13 frames 512x512"
    )
    assert (line.seconds, line.memory_gb) == (6.05, 42.57)
    assert line.of_peak == pytest.approx(763e12 / 6.05 / 312e12, rel=1e-3)
    assert line.ours == (tables.NOT_MEASURED,)


def test_seconds_per_generated_frame_become_seconds_per_video():
    line = next(each for each in tables.mardini([]).lines if "17 frames 768" in each.name)
    assert line.seconds == pytest.approx(16 * 1.01)


def _row(**changes):
    return {
        "case": "vdt/forward S/2 frames=8 float32",
        "room": "vdt",
        "rival": "fastvid",
        "machine": "A CPU, 2 cores",
        "device": "cpu",
        "threads": 2,
        "dtype": "float32",
        "date": "2026-01-01",
        "size": "S",
        "job": "forward",
        "frames": 8,
        "side": 128,
        "batch": 1,
        "p50_ms": 500.0,
        "peak_mib": 1024.0,
        "matmul_fp32_tflop_per_s": 0.1,
        "match": True,
    } | changes


def _ours(*results):
    lines = tables.vdt(list(results)).lines
    return next(line.ours for line in lines if line.name == "S denoising step 8 frames 128x128")


def test_our_column_comes_from_results():
    (text,) = _ours(_row())
    flops = work.vdt(replace(work.VDT_SIZES["S"], frames=8)).flops
    share = 100 * flops / 0.5 / 0.1e12
    assert text.startswith(f"0.5 s, {share:.0f} % of its matmul, 1.1 GB (A CPU, 2 cores, 2 threads")


def test_a_batch_is_told_and_counted_clip_by_clip():
    (one,) = _ours(_row())
    (text,) = _ours(_row(batch=4, p50_ms=2000.0, wall_ratio_p50=1.25))
    assert text == one.replace(" matmul, ", " matmul, 1.25 x plain PyTorch, ").replace(
        "float32)", "float32, batch 4)"
    )


@pytest.mark.parametrize(("batch", "room"), [(16, 80), (6, 48)])
def test_the_batches_that_are_told_to_fit_are_measured_and_shown(batch, room):
    on_gpu = bench_vdt.specs(torch.device("cuda"), False)
    (spec,) = (spec for spec in on_gpu if spec["batch"] == batch)
    row = _row(**spec) | {"p50_ms": 1600.0, "peak_mib": 40_000.0}
    lines = {line.name: line for line in tables.vdt([row]).lines}
    line = lines[f"L training 16 frames 128x128 batch {batch}"]
    (text,) = line.ours
    assert text.startswith(f"{1.6 / batch:.3g} s, ")
    assert "41.9 GB" in text
    assert 0 < line.estimate_gb < line.memory_gb == room
    assert "VDT, report" in line.source


def test_the_plain_sampling_loop_has_rows():
    lines = {line.name: line for line in tables.vdt([]).lines}
    sample, step = (
        lines[f"L {what} 30 frames 256x256"] for what in ("sampling in 10 steps", "denoising step")
    )
    assert sample.tflop == pytest.approx(10 * step.tflop)
    assert sample.estimate_gb == step.estimate_gb
    row = _row(job="sample", steps=10)
    found = {line.name: line.ours for line in tables.vdt([row]).lines if line.ours}
    assert found.keys() == {"S sampling in 10 steps 8 frames 128x128"}
    assert not any(line.ours for line in tables.vdt([row | {"steps": 5}]).lines)


def test_every_case_of_the_model_has_a_name_of_its_own():
    (spec, *_) = bench_vdt.specs(torch.device("cpu"), True)
    changes = [{"job": "step"}, {"job": "sample"}, {"job": "sample", "steps": 5}, {"batch": 2}]
    changes += [{"compile": True}, {"dtype": "bfloat16"}, {"frames": 8}, {"side": 64}]
    labels = [bench_vdt.label(spec | change) for change in changes]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    "changes",
    [{"match": False}, {"frames": 16}, {"side": 256}, {"job": "step"}, {"rival": "eager"}],
)
def test_other_results_stay_out_of_the_row(changes):
    assert _ours(_row(**changes)) == ()


def test_seconds_without_a_ceiling_of_the_same_run_stay_out():
    assert _ours({k: v for k, v in _row().items() if not k.startswith("matmul")}) == ()


def test_small_videos_of_mardini_have_lines_of_their_own_that_say_so():
    case = "mardini/sample tiny/T asymmetric frames=13 side=128 batch=1 float32 25 steps"
    row = _row(case=case, room="mardini", job="sample", size="tiny", tokens=3328, flops=10**10)
    published = len(tables.PUBLISHED["mardini"])
    lines = tables.mardini([row, row | {"rival": "eager"}, row | {"threads": 1}]).lines
    (line,) = lines[published:]
    assert line.name == case.removeprefix("mardini/")
    assert (line.note, line.tokens, line.tflop) == ("reduced size", 3328, 0.01)
    assert line.seconds is line.estimate_gb is line.moved_gb is None
    assert [text.partition(" (")[0] for text in line.ours] == [
        "0.5 s, 20 % of its matmul, 1.1 GB"
    ] * 2
    assert not any(line.ours != (tables.NOT_MEASURED,) for line in lines[:published])
    for changes in ({"match": False}, {"size": "L"}, {"job": "forward"}):
        assert not tables._reduced_mardini([row | changes])


def test_a_result_of_a_model_at_reduced_depth_says_so():
    (text,) = _ours(_row(quick=True))
    assert "reduced depth" in text


def test_the_command_prints_every_table_and_writes_it(tmp_path, capsys):
    (tmp_path / "vdt.jsonl").write_text(json.dumps(_row()) + "\n")
    out = tmp_path / "tables.json"
    assert papers.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert set(json.loads(out.read_text())) == set(tables.TABLES)
    for piece in ("6.05", "42.57", tables.NOT_MEASURED, "11,520", "0.5 s"):
        assert piece in printed


def test_the_committed_results_fill_rows_of_vdt():
    found = tables.vdt(rows.latest(rows.read(rows.RESULTS)))
    ours = [text for line in found.lines for text in line.ours]
    assert ours
    assert all("% of its matmul" in text for text in ours)  # never seconds alone


def test_a_training_step_has_the_tokens_of_a_forward_and_three_times_its_work():
    lines = {line.name: line for line in tables.vdt([]).lines}
    step, forward = (lines[f"S {job} step 8 frames 128x128"] for job in ("training", "denoising"))
    assert step.tokens == forward.tokens == 8 * 64
    assert step.tflop == pytest.approx(3 * forward.tflop)


def test_no_share_of_a_peak_where_the_device_is_not_named():
    lines = {line.name: line for line in tables.pyramid_flow([]).lines}
    assert lines["384p 5 s"].of_peak is None
    assert lines["768p 5 s"].of_peak is not None


SMALL = [
    (VDTConfig(dim=192, depth=4, heads=3, frames=8, height=16, width=16), 1),
    (VDTConfig(dim=192, depth=8, heads=3, frames=16, height=16, width=16), 2),
    (VDTConfig(dim=384, depth=3, heads=6, frames=8, height=32, width=32), 1),
]


def _allocated(call):
    """Bytes that the allocator had handed out at the peak of a call, beyond what was there."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = peak = 0
    events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(("config", "batch"), SMALL)
def test_the_memory_model_is_within_a_tenth_of_what_is_allocated(config, batch):
    model = VDT(config)
    weights = sum(p.nbytes for p in model.parameters())
    assert memory.vdt_weights(config) == pytest.approx(weights, rel=0.02)
    shape = batch, config.channels, config.frames, config.height, config.width
    latents, timestep = torch.randn(shape), torch.zeros(batch, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        optimizer.zero_grad()
        model(latents, timestep).square().mean().backward()
        optimizer.step()

    def forward():
        with torch.inference_mode():
            model(latents, timestep)

    forward()
    measured = weights + _allocated(forward)
    assert memory.vdt_forward(config, batch) == pytest.approx(measured, rel=0.1)
    step()
    optimizer.zero_grad()
    moments = 2 * weights
    measured = weights + moments + _allocated(step)
    assert memory.vdt_training(config, batch) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("frames", "cells", "changes"),
    [(5, 16, {}), (9, 8, {"depth": 2}), (3, 16, {"attention": "clip", "mlp": 256})],
)
def test_the_memory_model_of_mardini_is_within_a_tenth_too(frames, cells, changes):
    generator = replace(MARDINI_TINY.generator, **changes)
    config = replace(MARDINI_TINY, generator=generator)
    model = MarDini(config).eval()
    latents = torch.randn(1, config.channels, frames, cells, cells)
    low = torch.randn(1, config.channels, frames, config.planner.side, config.planner.side)
    known = torch.zeros(1, frames, dtype=torch.bool)
    known[:, 0] = True

    def video():
        with torch.inference_mode():
            planning = model.project(model.plan(low, known))
            for step in (999, 499):
                model(latents, torch.tensor([step]), known=known, planning=planning)

    video()
    beyond = memory.mardini(config, frames, cells, width=4) - sum(
        p.nbytes for p in model.parameters()
    )
    assert beyond == pytest.approx(_allocated(video), rel=0.1)


def test_a_batch_that_fits_by_the_published_evidence_fits_by_the_model():
    line = {line.name: line for line in tables.vdt([]).lines}
    for batch, room in ((16, 80), (6, 48)):
        found = line[f"L training 16 frames 128x128 batch {batch}"]
        assert found.memory_gb == room
        assert found.estimate_gb < room
