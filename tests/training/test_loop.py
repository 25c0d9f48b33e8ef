"""The run as a whole: resuming, the NaN guard, stopping, the lock."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvid.models import vdt
from fastvid.training import checkpoint, loop, setup
from fastvid.training.checkpoint import checkpoints
from fastvid.training.config import OptimConfig, write_config
from fastvid.training.distributed import World
from fastvid.training.guard import NonFiniteError
from fastvid.training.interrupt import Interrupted, RunBusyError, locked
from fastvid.training.log import read_log
from fastvid.training.loop import train
from fastvid.training.runs import load_run, summarize
from fastvid.training.state import learning_rate, new_state
from fastvid.training.tensors_only import TensorReader

pytest.importorskip("tqdm")


def saved(folder, step):
    """Every tensor of a checkpoint, and its JSON state."""
    import torch.distributed.checkpoint as dcp

    path = Path(folder) / "checkpoints" / f"step-{step:08d}"
    entries = TensorReader(path).read_metadata().state_dict_metadata
    tensors = {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in entries.items()}
    dcp.load(tensors, storage_reader=TensorReader(path), no_dist=True)
    return tensors, json.loads((path / "state.json").read_text())


def told(folder):
    """The log without what a clock decides."""
    timed = {"samples_per_s", "peak_gb"}
    return [{k: v for k, v in line.items() if k not in timed} for line in read_log(Path(folder))]


def assert_same_run(one, other, step):
    (tensors, state), (others, other_state) = saved(one, step), saved(other, step)
    assert tensors.keys() == others.keys()
    unequal = [n for n in tensors if not torch.equal(tensors[n], others[n])]
    assert not unequal
    assert state == other_state
    assert told(one) == told(other)


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal while step `step` (from 1) is computed."""
    original = loop._backward

    def backward(run, state, batch):
        if state.step + 1 == step:
            os.kill(os.getpid(), number)
        return original(run, state, batch)

    monkeypatch.setattr(loop, "_backward", backward)


def test_learning_rate_warms_up_and_follows_a_cosine():
    optim = OptimConfig(lr=1.0, lr_end=0.1, warmup=4)
    rates = [learning_rate(step, 24, optim) for step in range(24)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == pytest.approx(0.55)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(24, 24, optim) == pytest.approx(0.1)


@pytest.mark.parametrize("how", ["signal", "checkpoint"])
def test_resumed_run_equals_an_uncut_one_bit_for_bit(config, tmp_path, monkeypatch, how):
    straight = config(folder=str(tmp_path / "straight"), steps=7, save_every=2, validate_every=2)
    train(straight)
    cut = replace(straight, run=replace(straight.run, folder=str(tmp_path / "cut")))
    if how == "signal":  # inside an epoch and between two lines of the log
        stop_at(monkeypatch, 5)
        with pytest.raises(Interrupted, match="step 5"):
            train(cut)
        monkeypatch.undo()
    else:  # the process dies at step 6: steps after the checkpoint are done again
        monkeypatch.setattr(loop, "_backward", _die_at(6))
        with pytest.raises(KeyboardInterrupt):
            train(cut)
        monkeypatch.undo()
    torch.randn(7)  # the resumed process has another past
    train(cut, resume=True)
    assert_same_run(straight.run.folder, cut.run.folder, 7)


def _die_at(step, original=loop._backward):
    def backward(run, state, batch):
        if state.step + 1 == step:
            raise KeyboardInterrupt
        return original(run, state, batch)

    return backward


def test_training_lowers_the_loss_and_leaves_a_whole_run_folder(config):
    made = config(steps=30, lr=3e-3, validate_every=15, save_every=10, sample_every=30, keep=1)
    folder = train(made)
    lines = read_log(folder)
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    validations = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in validations] == [15, 30]
    assert {"loss", "psnr/predict", "psnr/complete", "psnr/unconditional"} <= validations[0].keys()
    best = min(validations, key=lambda line: line["loss"])
    assert set(checkpoints(folder / "checkpoints")) == {best["step"], 30}
    assert (folder / "samples" / "step-00000030.png").stat().st_size > 1000
    assert list((folder / "tb").iterdir())
    for name in ("last", "best"):
        model, loaded, codec = load_run(folder / "model" / name)
        assert not model.training
        assert loaded == made
        assert codec.channels == 48
    average = saved(folder, 30)[0]
    for name, p in load_run(folder / "model" / "last")[0].named_parameters():
        assert torch.equal(p, average[f"ema.{name}"])
    summary = summarize(folder)
    assert (summary.state, summary.step, summary.best_step) == ("finished", 30, best["step"])
    assert summary.validation == validations[-1]["loss"]


def test_validation_is_the_same_every_time_and_moves_no_randomness(config, tmp_path):
    with_validation = config(folder=str(tmp_path / "a"), validate_every=1, lr=1e-12, ema=0.0)
    without = config(folder=str(tmp_path / "b"), validate_every=0, lr=1e-12, ema=0.0)
    lines = read_log(train(with_validation))
    losses = [line["loss"] for line in lines if line["kind"] == "validation"]
    assert len(losses) == 4
    assert max(losses) == pytest.approx(min(losses), rel=1e-6)
    train(without)
    (one, _), (other, _) = saved(tmp_path / "a", 4), saved(tmp_path / "b", 4)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_accumulated_gradients_are_those_of_the_whole_batch(config, tmp_path, awake):
    same = {"drop_labels": False, "steps": 1, "init": awake}
    train(config(folder=str(tmp_path / "whole"), **same))
    train(config(folder=str(tmp_path / "parts"), accumulate=4, **same))
    whole, parts = (saved(tmp_path / name, 1)[0] for name in ("whole", "parts"))
    for name, gradient in whole.items():
        if name.endswith("exp_avg"):  # a tenth of the clipped gradient after one step
            allowed = 1e-5 * gradient.abs().max().item()
            assert allowed > 0
            torch.testing.assert_close(parts[name], gradient, rtol=0, atol=allowed, msg=name)


def test_bf16_computes_in_half_and_keeps_full_weights(config, tmp_path, awake):
    same = {"init": awake, "log_every": 1}
    full = train(config(folder=str(tmp_path / "full"), **same))
    half = train(config(folder=str(tmp_path / "half"), precision="bf16", **same))
    losses = [[line["loss"] for line in told(folder) if "loss" in line] for folder in (full, half)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    kept = {t.dtype for n, t in saved(half, 4)[0].items() if n.startswith("model.")}
    assert kept == {torch.float32}


def test_recomputed_blocks_change_no_bit(config, tmp_path, awake, monkeypatch):
    plain = train(config(folder=str(tmp_path / "plain"), init=awake))
    again, recomputed = vdt.checkpoint, []
    monkeypatch.setattr(vdt, "checkpoint", lambda *a, **k: recomputed.append(1) or again(*a, **k))
    made = train(config(folder=str(tmp_path / "again"), init=awake, checkpoint_blocks=1))
    assert len(recomputed) == 4  # one block in each of four steps
    one, other = saved(plain, 4)[0], saved(made, 4)[0]
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


def poison(monkeypatch, steps, what):
    """Spoil the loss or one gradient at these steps (from 1)."""
    original = loop._backward

    def backward(run, state, batch):
        loss = original(run, state, batch)
        if state.step + 1 in steps:
            if what == "loss":
                return loss * float("nan")
            dict(state.model.named_parameters())["final.bias"].grad[3] = float("inf")
        return loss

    monkeypatch.setattr(loop, "_backward", backward)


def test_nan_stops_the_run_before_it_reaches_a_weight(config, tmp_path, monkeypatch):
    poison(monkeypatch, {3}, "gradient")
    made = config(save_every=1, keep=9)
    with pytest.raises(NonFiniteError, match=r"step 3: rank 0 in the gradient of final\.bias"):
        train(made)
    assert list(checkpoints(tmp_path / "run" / "checkpoints")) == [1, 2]
    assert all(t.isfinite().all() for t in saved(tmp_path / "run", 2)[0].values())
    line = next(line for line in read_log(tmp_path / "run") if line["kind"] == "nonfinite")
    assert line["step"] == 3
    assert line["ranks"] == {"0": "the gradient of final.bias"}


def test_nan_can_be_left_out_but_not_for_ever(config, tmp_path, monkeypatch, caplog):
    poison(monkeypatch, {2, 3}, "loss")
    skipping = config(on_nonfinite="skip", skip_limit=2, save_every=1, keep=9)
    train(skipping)
    (before, _), (after, state) = saved(tmp_path / "run", 1), saved(tmp_path / "run", 3)
    for name in before:
        if not name.startswith("random"):
            assert torch.equal(before[name], after[name])
    assert state["left_out"] == 2
    assert "clip-" in caplog.text  # the clips of that batch are named
    final, _ = saved(tmp_path / "run", 4)
    assert not torch.equal(final["model.final.bias"], after["model.final.bias"])
    poison(monkeypatch, {2, 3, 4}, "loss")
    with pytest.raises(NonFiniteError, match="giving up"):
        train(replace(skipping, run=replace(skipping.run, folder=str(tmp_path / "other"))))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_at_the_next_step_and_gives_the_handlers_back(
    config, tmp_path, monkeypatch, number
):
    before = signal.getsignal(number)
    stop_at(monkeypatch, 2, number)
    with pytest.raises(Interrupted, match="step 2"):
        train(config())
    assert list(checkpoints(tmp_path / "run" / "checkpoints")) == [2]
    assert signal.getsignal(number) is before
    assert summarize(tmp_path / "run").state == "stopped"


def test_second_trainer_is_refused_and_a_dead_one_is_not_in_the_way(config, tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from fastvid.training.interrupt import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    root = Path(loop.__file__).parents[2]
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, cwd=root
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunBusyError, match=str(holder.pid)):
            train(config())
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with locked(tmp_path / "run"):
        pass


def test_folder_is_looked_at_again_under_the_lock(config, tmp_path, monkeypatch):
    made = config()

    def meanwhile(*args):  # another process trains and ends while this one builds its model
        write_config(made, tmp_path / "run" / "config.yaml")
        return new_state(*args)

    monkeypatch.setattr(setup, "new_state", meanwhile)
    with pytest.raises(ValueError, match="holds a run"):
        train(made)


def test_another_run_in_the_folder_is_refused(config):
    train(config(steps=1))
    with pytest.raises(ValueError, match="--resume"):
        train(config(steps=2))


def test_resume_as_another_run_is_refused_by_name(config):
    folder = train(config(steps=2))
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    for change, message in (
        ({"dim": 32}, r"model\.dim was 16 .* got 32"),
        ({"seed": 1}, r"run\.seed was 0 .* got 1"),
        ({"batch": 2}, r"optim\.batch was 4 .* got 2"),
        ({"ema": 0.0}, r"optim\.ema was 'on' .* got 'off'"),
        ({"hflip": True}, r"data\.hflip was False .* got True"),
        ({"split_seed": 1}, r"data\.split_seed was 0 .* got 1"),
        ({"prediction": "v"}, r"diffusion\.prediction was 'x0' .* got 'v'"),
        ({"steps": 1}, r"run\.steps must be at least 2, where .* got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config(**{"steps": 3} | change), resume=True)
    assert before == {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


def test_what_changes_no_clip_may_change_at_a_resume(config):
    folder = train(config(steps=2))
    train(config(steps=3, workers=1, cache=True, lr=2e-3, ema=0.8, save_every=1), resume=True)
    assert read_log(folder)[-1]["step"] == 3


def test_resume_passes_over_a_damaged_checkpoint_and_refuses_when_none_is_left(config, caplog):
    made = config(save_every=2, steps=6)
    folder = train(made)
    assert list(checkpoints(folder / "checkpoints")) == [4, 6]
    (folder / "checkpoints" / "step-00000006" / "state.json").write_text("{}")
    longer = replace(made, run=replace(made.run, steps=7, keep=1))
    with pytest.raises(Interrupted):
        train(longer, resume=True, stop_at=5)
    assert "state.json" in caplog.text
    assert list(checkpoints(folder / "checkpoints")) == [5]
    train(longer, resume=True)
    assert read_log(folder)[-1]["step"] == 7
    for path in checkpoints(folder / "checkpoints").values():
        (path / "state.json").unlink()
    with pytest.raises(RuntimeError, match=r"state\.json is missing"):
        train(longer, resume=True)


def test_resume_hashes_its_checkpoint_once(config, monkeypatch):
    made = config(steps=2)
    train(made)
    hashed, digests = [], checkpoint._digests
    monkeypatch.setattr(
        checkpoint, "_digests", lambda path, names: hashed.append(path.name) or digests(path, names)
    )
    train(made, resume=True)
    assert hashed == ["step-00000002"]


@pytest.mark.parametrize(("how", "step"), [("signal", 2), ("stop_at", 4), ("signal", 5)])
def test_stop_at_a_step_that_validates_leaves_nothing_out(config, tmp_path, monkeypatch, how, step):
    same = {"validate_every": 2, "sample_every": 2, "steps": 5, "lr": 3e-3}
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    train(config(folder=str(straight), **same))
    made = config(folder=str(cut), **same)
    if how == "signal":
        stop_at(monkeypatch, step)
    with nullcontext() if step == 5 else pytest.raises(Interrupted, match=f"step {step}"):
        train(made, stop_at=step if how == "stop_at" else 0)
    monkeypatch.undo()
    train(made, resume=True)
    assert_same_run(straight, cut, 5)
    for name in ("model/best/model.safetensors", "model/last/model.safetensors"):
        assert (cut / name).read_bytes() == (straight / name).read_bytes()
    for folder in (straight, cut):
        sheets = sorted(path.name for path in (folder / "samples").iterdir())
        assert sheets == [f"step-0000000{n}.png" for n in (2, 4, 5)]


def test_processes_must_share_the_batch_evenly(config):
    from fastvid.training.setup import prepared

    world = World(0, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"multiple of processes x accumulate = 3 x 1, got 4"):
        prepared(config(), world, False).__enter__()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "/nowhere"}, "no folder /nowhere"),
        ({"train": ""}, "data.train must name"),
        ({"init": "/nowhere"}, "neither a run"),
    ],
)
def test_errors_come_before_anything_is_written(config, tmp_path, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        train(config(**change))
    assert not (tmp_path / "run").exists()


def test_clips_too_short_are_refused_with_their_length(config, tmp_path):
    made = config(frames=4, stride=5)
    with pytest.raises(RuntimeError, match="needs 16 frames"):
        train(made)


def test_weights_start_from_another_run_and_from_an_image_model(config, tmp_path):
    from fastvid.models.vdt import VDT
    from fastvid.training.vdt import build_model

    folder = train(config(steps=2))
    again = build_model(config(init=str(folder)))
    for name, p in load_run(folder)[0].named_parameters():
        assert torch.equal(p, dict(again.named_parameters())[name])
    image = VDT(replace(config().model, mode="image", frames=1))
    image.save_pretrained(tmp_path / "image")
    video = build_model(config(init=str(tmp_path / "image")))
    assert torch.equal(video.blocks[0].mlp.fc1.weight, image.blocks[0].mlp.fc1.weight)
    with pytest.raises(ValueError, match="the run wants"):
        build_model(config(init=str(folder), depth=1))
