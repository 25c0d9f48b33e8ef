"""Two processes train like one: same loss, same state, whatever world a run goes on in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvid
from fastvid.training.config import write_config
from fastvid.training.log import read_log
from fastvid.training.loop import train
from fastvid.training.runs import load_run
from tests.training.mardini_stages import tiny_stage
from tests.training.pyramid_run import tiny_pyramid

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)
ROOT = Path(fastvid.__file__).parents[1]

# Trains by the configs named on the command line, one after another.
WORKER = """
import os, signal, sys
from pathlib import Path
import torch
from fastvid.training import loop
from fastvid.training.config import read_config
from fastvid.training.guard import NonFiniteError
from fastvid.training.interrupt import Interrupted

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
for argument in sys.argv[1:]:
    mode, path = argument.split(":", 1)
    backward = loop._backward
    if mode == "nan":
        def spoiled(run, state, batch):
            loss = backward(run, state, batch)
            return loss * float("nan") if state.world.rank == 1 and state.step == 1 else loss
        loop._backward = spoiled
    if mode == "stop":
        def stopped(run, state, batch):
            if state.world.rank == 1 and state.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return backward(run, state, batch)
        loop._backward = stopped
    if mode == "kill":
        def killed(run, state, batch):
            once = Path(path).with_suffix(".killed")
            if state.world.rank == 1 and state.step == 3 and not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return backward(run, state, batch)
        loop._backward = killed
    try:
        loop.train(read_config(Path(path)), resume=mode in ("resume", "kill"))
        assert mode not in ("nan", "stop")
    except NonFiniteError as error:
        assert mode == "nan", error
    except Interrupted as error:
        assert mode == "stop", error
    loop._backward = backward
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def run_two(tmp_path, *jobs):
    """Start two gloo processes under torchrun's launcher; each job is (mode, config)."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    arguments = []
    for number, (mode, config) in enumerate(jobs):
        write_config(config, tmp_path / f"{number}.yaml")
        arguments.append(f"{mode}:{tmp_path / f'{number}.yaml'}")
    environment = os.environ | {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else restarts of a killed rank can hang
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "--max-restarts=1",
            script,
        ]
        + arguments,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]


def losses(folder):
    return [line["loss"] for line in read_log(Path(folder)) if line["kind"] == "train"]


@pytest.mark.slow
def test_two_processes_train_like_one_and_take_over_from_each_other(config, tmp_path, awake, rand):
    same = {"drop_labels": False, "init": awake, "log_every": 1}
    same |= {"validate_every": 2, "save_every": 2}

    def run(name, **changes):
        return config(folder=str(tmp_path / name), **(same | changes))

    alone = run("alone")
    train(alone)
    half = run("grown", steps=2, lr_end=1e-3)
    train(half)  # begins in one process, goes on in two
    run_two(
        tmp_path,
        ("kill", run("restarted")),  # first: a restart begins the list anew
        ("train", run("pair")),
        ("resume", run("grown", lr_end=1e-3)),
        ("train", run("shrunk", steps=2, lr_end=1e-3)),
        ("nan", run("spoiled", save_every=1, validate_every=0, keep=9)),
        ("stop", run("stopped", steps=9, save_every=0, validate_every=0)),
    )
    assert (tmp_path / "0.killed").exists()
    assert losses(tmp_path / "restarted") == losses(tmp_path / "pair")
    weights = [
        (tmp_path / name / "model" / "last" / "model.safetensors").read_bytes()
        for name in ("restarted", "pair")
    ]
    assert weights[0] == weights[1]
    assert losses(tmp_path / "pair") == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)
    one, two = (load_run(tmp_path / name / "model" / "last")[0] for name in ("alone", "pair"))
    # Outputs, not weights: a key's bias changes nothing, so Adam follows its rounding noise.
    latents, timestep = rand(2, 48, 4, 4, 4), torch.tensor([3, 700])
    with torch.no_grad():
        torch.testing.assert_close(
            one(latents, timestep), two(latents, timestep), rtol=1e-4, atol=1e-5
        )
    values = [
        [line for line in read_log(tmp_path / name) if line["kind"] == "validation"]
        for name in ("alone", "pair")
    ]
    for line, other in zip(*values, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"kind"}:
            assert line[name] == pytest.approx(other[name], rel=1e-4), name

    train(run("shrunk", lr_end=1e-3), resume=True)  # begins in two processes, goes on in one
    constant = run("constant", lr_end=1e-3)
    train(constant)
    for name in ("grown", "shrunk"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "constant"), rel=1e-6)

    line = next(line for line in read_log(tmp_path / "spoiled") if line["kind"] == "nonfinite")
    assert line["step"] == 2
    assert line["ranks"] == {"1": "the loss"}
    assert [p.name for p in (tmp_path / "spoiled" / "checkpoints").iterdir()] == ["step-00000001"]

    manifest = tmp_path / "stopped" / "checkpoints" / "step-00000003" / "manifest.json"
    assert json.loads(manifest.read_text())["world_size"] == 2


@pytest.mark.slow
def test_two_processes_train_every_family_like_one(clips, tmp_path):
    """A planner alone runs beside `forward`, as packed columns do; validation and sheets sample a
    sharded model."""
    often = {"validate_every": 2, "sample_every": 2, "steps": 2, "lr": 1e-3}
    runs = {}
    for world in ("alone", "pair"):
        runs[world] = [
            tiny_stage(clips, tmp_path / world / trains, trains, **often)
            for trains in ("planner", "generator", "both")
        ]
        runs[world].append(tiny_pyramid(clips, tmp_path / world / "pyramid", **often))
    for config in runs["alone"]:
        train(config)
    run_two(tmp_path, *(("train", config) for config in runs["pair"]))
    for one, two in zip(runs["alone"], runs["pair"], strict=True):
        lines, others = read_log(Path(one.run.folder)), read_log(Path(two.run.folder))
        for line, other in zip(lines, others, strict=True):
            for name in {"loss", "psnr/arbitrary-interpolation", "psnr/predict"} & line.keys():
                assert line[name] == pytest.approx(other[name], rel=1e-4), (one.run.folder, name)
        assert list(Path(two.run.folder, "samples").iterdir())
