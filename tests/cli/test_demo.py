"""`fastvid demo`: a dry run leaves every file, and a model that learned nothing is told so."""

import json
from dataclasses import replace
from itertools import combinations

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from fastvid.cli import demo, main
from fastvid.data.synthetic import make_motion_clips
from fastvid.data.video import probe, write_mp4
from fastvid.models.vdt import VDT
from fastvid.training import sheets
from fastvid.training.codec import build_codec
from fastvid.training.log import read_log
from fastvid.training.loop import train
from fastvid.training.runs import load_run, summarize


@pytest.fixture
def few_clips(monkeypatch):
    """The demo as it is, on fewer clips."""
    for name, value in {"CLIPS": 16, "HELD_OUT": 4, "SCORED": 4, "SHOWN": 2}.items():
        monkeypatch.setattr(demo, name, value)


def planted(**psnr):
    """Scores of both tasks that the model wins, but for the rows in `psnr`."""
    rows = {"one_step_mean": 22.0, "sample": 19.0, "linear_blend": 20.0, "copy_nearest": 18.0}
    return {
        task: {"rows": {row: {"psnr": value} for row, value in (rows | psnr).items()}}
        for task in demo.RIVALS
    }


def test_a_dry_run_leaves_every_file(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--dry-run", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for task in ("predict", "interpolate"):
        assert probe(out / f"{task}.mp4").frames == 9
        assert (out / f"{task}.gif").stat().st_size > 0
        assert (out / f"{task}.png").stat().st_size > 0
        assert f"{task}: the mean reaches" in printed
    assert (out / "loss.png").stat().st_size > 0
    assert len(list((out / "clips" / "train").glob("*.mp4"))) == 16
    assert str(out) in printed

    assert "Stopped on purpose at step 6" in printed
    assert summarize(out / "run").state == "finished"
    steps = [line["step"] for line in read_log(out / "run") if line["kind"] == "train"]
    assert steps == list(range(1, 13))

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 12
    assert metrics["torch"] == torch.__version__
    assert metrics["verdicts"] == [v.text for v in demo.compare(metrics["scores"])]
    assert str(tmp_path) not in (out / "metrics.json").read_text()  # it can be published
    assert set(metrics["seconds"]) == {"clips", "training", "predict", "interpolate"}
    for scores in metrics["scores"].values():
        rows = {"sample", "one_step_mean", "copy_nearest", "linear_blend"}
        assert set(scores["rows"]) == rows
        assert all(0 < row["psnr"] < 60 for row in scores["rows"].values())


def test_sheets_show_the_truth_the_rival_the_mean_and_a_sample(tmp_path, monkeypatch):
    config = demo.demo_config(tmp_path, dry_run=True)
    torch.manual_seed(0)
    model = VDT(config.model).eval()
    torch.nn.init.normal_(model.final.weight, std=0.05)
    drawn = []
    monkeypatch.setattr(sheets, "save_contact_sheet", lambda path, rows, **_: drawn.append(rows))
    clips = torch.rand(2, 3, 9, 32, 32) * 2 - 1
    codec = build_codec(config.codec)
    for task, rival in (("predict", "last copied"), ("interpolate", "blended")):
        demo.draw_task(tmp_path, model, codec, config, clips, task, steps=3)
        rows = drawn.pop()
        assert [row.label for row in rows] == [
            "truth",
            rival,
            "model, mean",
            "model, one sample",
        ] * 2
        for clip, four in zip(clips, (rows[:4], rows[4:]), strict=True):
            known = four[0].known
            assert 0 < known.sum() < 9
            assert all(torch.equal(row.known, known) for row in four)
            assert torch.equal(four[0].video, clip)
            for row in four[1:]:
                torch.testing.assert_close(row.video[:, known], clip[:, known])
            made = [row.video[:, ~known] for row in four]
            assert all((a - b).abs().max() > 0.01 for a, b in combinations(made, 2))


def test_a_model_that_learned_nothing_fails_loudly(tmp_path, capsys, few_clips):
    assert main(["demo", "--steps", "2", "--out", str(tmp_path / "demo")]) == 1
    printed = capsys.readouterr().out
    assert "BELOW  interpolate" in printed
    assert "FAILED" in printed
    assert (tmp_path / "demo" / "interpolate.png").is_file()  # there is still something to look at


def test_user_clips_are_scored_without_a_promise(tmp_path, capsys, few_clips):
    folder = tmp_path / "mine"
    make_motion_clips(folder, clips=5, frames=20, size=(48, 80))
    out = tmp_path / "demo"
    assert main(["demo", "--data", str(folder), "--steps", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "BELOW" in printed
    assert "FAILED" not in printed
    assert not (out / "clips").exists()
    held_out = json.loads((out / "metrics.json").read_text())["scores"]["predict"]["clips"]
    assert held_out == 1  # one file of five, one window of 9 frames, every other one


def test_a_single_video_is_refused_before_training(tmp_path, capsys, rand):
    write_mp4(tmp_path / "mine" / "one.mp4", rand(20, 3, 48, 80).clamp(0, 1).mul(255).byte(), 25)
    out = tmp_path / "demo"
    assert main(["demo", "--data", str(tmp_path / "mine"), "--out", str(out)]) == 1
    assert "two videos" in capsys.readouterr().err
    assert not (out / "run" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("psnr", "lost"),
    [
        ({}, set()),
        ({"copy_nearest": 22.5}, {"predict", "interpolate"}),
        ({"linear_blend": 22.5}, {"interpolate"}),
        ({"one_step_mean": 19.9}, {"interpolate"}),
        ({"one_step_mean": 18.0}, {"predict", "interpolate"}),  # as good is not above
        ({"sample": 10.0}, set()),
        ({"one_step_mean": float("nan")}, {"predict", "interpolate"}),
    ],
)
def test_the_comparison_finds_planted_bad_numbers(psnr, lost):
    verdicts = demo.compare(planted(**psnr))
    assert {v.text.split()[1].rstrip(":") for v in verdicts if not v.won} == lost
    assert all(v.text.startswith("above" if v.won else "BELOW") for v in verdicts)
    assert len(verdicts) == 3


def test_a_second_call_keeps_the_finished_run(tmp_path, few_clips):
    config = demo.demo_config(tmp_path, dry_run=True)
    demo.make_clips(tmp_path / "clips", dry_run=True)
    assert demo.train_with_a_stop(config) == 6
    weights = (tmp_path / "run" / "model" / "last" / "model.safetensors").stat().st_mtime_ns
    assert demo.train_with_a_stop(config) is None  # nothing to mark on the curve
    after = (tmp_path / "run" / "model" / "last" / "model.safetensors").stat().st_mtime_ns
    assert after == weights


def test_every_source_of_clips_has_its_own_folder(tmp_path):
    made, mine = demo.default_out(None, False), demo.default_out(f"{tmp_path}/mine/", False)
    assert (made, mine) == ("runs/demo", "runs/demo-mine")
    assert demo.default_out(None, True) == "runs/demo-dry"
    assert demo.default_out(str(tmp_path / "mine"), True) == "runs/demo-mine-dry"


@pytest.mark.parametrize("steps", ["0", "-1"])
def test_no_steps_are_refused(tmp_path, capsys, steps):
    with pytest.raises(SystemExit) as refused:
        main(["demo", "--steps", steps, "--out", str(tmp_path / "demo")])
    assert refused.value.code == 2
    assert f"must be at least 1, got {steps}" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_recipe_learns_as_it_did(tmp_path):
    """The losses of 30 steps, in tens, against those of a run that went on to win."""
    make_motion_clips(tmp_path / "clips", clips=32, frames=32, **demo.MOTION)
    config = demo.demo_config(tmp_path, data=str(tmp_path / "clips"))
    run = replace(config.run, steps=30, log_every=10, validate_every=0, sample_every=0)
    train(replace(config, run=run, optim=replace(config.optim, warmup=10)))
    log = read_log(tmp_path / "run")
    losses = [line["loss"] for line in log if line["kind"] == "train"]
    assert losses == pytest.approx([0.1674, 0.0736, 0.0650], rel=0.05)
    assert losses[-1] < 0.65 * losses[0]
    model, _, _ = load_run(tmp_path / "run")
    assert sum(p.numel() for p in model.parameters()) == 1_588_416
