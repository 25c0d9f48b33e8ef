"""A checkpoint is written whole or not at all, checked before it is read, and never runs code."""

import builtins
import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import fastvid
from fastvid.training import checkpoint
from fastvid.training.checkpoint import (
    CheckpointError,
    checkpoints,
    latest,
    load_state,
    prune,
    save_state,
    verify,
)
from fastvid.training.tensors_only import TensorReader

ROOT = Path(fastvid.__file__).parents[1]


def tensors(step):
    return {
        "model.weight": torch.full((8, 4), float(step)),
        "optim.step": torch.tensor(float(step)),
        "half": torch.full((3,), step, dtype=torch.bfloat16),
        "random": torch.arange(7, dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
        "count": torch.tensor([step]),
    }


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save_state(tmp_path, step, tensors(step), {"step": step, "best": {}})
    return tmp_path


def blank():
    return {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}


def test_state_comes_back_as_it_was(saved):
    loaded = blank()
    assert load_state(latest(saved), loaded) == {"step": 2, "best": {}}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(2).items())
    manifest = verify(latest(saved))
    assert manifest["step"] == 2
    assert manifest["world_size"] == 1
    assert set(manifest["files"]) == {".metadata", "__0_0.distcp", "state.json"}


def test_optional_tensors_may_be_absent_and_others_may_not(saved):
    extra = torch.ones(2)
    load_state(latest(saved), blank() | {"extra": extra}, optional=["extra"])
    assert torch.equal(extra, torch.ones(2))
    with pytest.raises(CheckpointError, match="has no tensor extra"):
        load_state(latest(saved), blank() | {"extra": extra})
    with pytest.raises(CheckpointError, match=r"half has shape \(3,\) .* needs \(4,\)"):
        load_state(latest(saved), {"half": torch.zeros(4)})


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        save_state(tmp_path, step, {"x": torch.ones(1)}, {})
    prune(tmp_path, 4, keep=2, best=1)
    assert list(checkpoints(tmp_path)) == [1, 3, 4]


def test_prune_keeps_what_was_just_saved_over_damaged_later_ones(tmp_path):
    for step in (2, 5, 10):
        save_state(tmp_path, step, {"x": torch.ones(1)}, {})
    (tmp_path / "step-00000010" / "state.json").write_text("damaged")
    assert latest(tmp_path) == tmp_path / "step-00000005"
    save_state(tmp_path, 7, {"x": torch.ones(1)}, {})
    prune(tmp_path, 7, keep=1, best=2)
    assert list(checkpoints(tmp_path)) == [2, 7]
    assert latest(tmp_path) == tmp_path / "step-00000007"


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json", "manifest.json"])
def test_truncated_or_missing_files_are_refused_by_name(saved, name, caplog):
    path = saved / "step-00000002"
    whole = (path / name).read_bytes()
    for size in {0, 4, 8, min(60, len(whole) - 2), len(whole) // 2, len(whole) - 1}:
        (path / name).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=name):
            load_state(path, blank())
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_state(path, blank())
    assert latest(saved) == saved / "step-00000001"
    assert name in caplog.text


def test_any_flipped_bit_is_found(saved):
    path = saved / "step-00000002"
    files = [".metadata", "__0_0.distcp", "state.json"]
    rng = random.Random(0)
    for _ in range(60):
        name = rng.choice(files)
        whole = (path / name).read_bytes()
        at = rng.randrange(len(whole))
        flipped = whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
        (path / name).write_bytes(flipped)
        with pytest.raises(CheckpointError, match=name):
            load_state(path, blank())
        (path / name).write_bytes(whole)
    verify(path)


def test_manifest_that_leads_outside_is_refused(saved):
    path = saved / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../step-00000001/state.json"] = manifest["files"]["state.json"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        load_state(path.parent, blank())


# Code in a checkpoint


class Payload:
    """Unpickled by torch as it is, this makes a folder."""

    def __init__(self, call, *args):
        self.reduced = call, args

    def __reduce__(self):
        return self.reduced


def sign_again(path):
    """Make the manifest fit a planted folder: an attacker can do that too."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = checkpoint._digests(path, manifest["files"])
    (path / "manifest.json").write_text(json.dumps(manifest))


PAYLOADS = {
    "os.mkdir": lambda trap: Payload(os.mkdir, trap),
    "os.system": lambda trap: Payload(os.system, f"mkdir {trap}"),
    "eval": lambda trap: Payload(eval, f"__import__('os').mkdir({trap!r})"),
    "exec": lambda trap: Payload(exec, f"import os; os.mkdir({trap!r})"),
    "subprocess": lambda trap: Payload(subprocess.check_call, ["mkdir", trap]),
    "getattr": lambda trap: Payload(builtins.getattr, Payload(__import__, "os"), "mkdir"),
    "import": lambda trap: Payload(__import__, "this"),
    "torch.load": lambda trap: Payload(torch.load, trap, None),
    "shutil": lambda trap: Payload(shutil.copytree, str(ROOT / "fastvid" / "cli"), trap),
}


@pytest.mark.parametrize("kind", PAYLOADS)
@pytest.mark.parametrize("place", ["instead", "inside"])
def test_planted_metadata_does_not_run(saved, tmp_path, kind, place):
    path, trap = saved / "step-00000002", str(tmp_path / "trap")
    planted = PAYLOADS[kind](trap)
    if place == "inside":
        metadata = TensorReader(path).read_metadata()
        metadata.planner_data = planted
        planted = metadata
    (path / ".metadata").write_bytes(pickle.dumps(planted))
    sign_again(path)
    with pytest.raises(CheckpointError, match="refused"):
        load_state(path, blank())
    assert not os.path.exists(trap)


def test_planted_bytes_entry_does_not_run(saved, tmp_path):
    path, trap = saved / "step-00000002", tmp_path / "trap"
    entries = tensors(2) | {"extra": Payload(os.mkdir, str(trap))}
    dcp.save(entries, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    if trap.exists():  # saving alone may have set it off
        trap.rmdir()
    sign_again(path)
    with pytest.raises(CheckpointError, match=r"refused|not a tensor"):
        load_state(path, blank())
    assert not trap.exists()


def test_metadata_that_points_outside_the_folder_is_refused(saved):
    path = saved / "step-00000002"
    metadata = TensorReader(path).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = "../step-00000001/__0_0.distcp"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign_again(path)
    with pytest.raises(CheckpointError, match="outside the folder"):
        load_state(path, blank())


def test_only_tensors_are_written(tmp_path):
    with pytest.raises(TypeError, match="lr is a float"):
        save_state(tmp_path, 1, {"x": torch.ones(2), "lr": 0.1}, {})
    assert list(tmp_path.iterdir()) == []


# A save that fails


@pytest.mark.parametrize("where", ["tensors", "manifest"])
def test_full_disk_leaves_the_older_checkpoint_and_nothing_else(saved, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "tensors":
        monkeypatch.setattr(checkpoint.TensorWriter, "write_data", full)
    else:
        monkeypatch.setattr(checkpoint, "_write_synced", full)
    with pytest.raises(CheckpointError, match=r"step-00000003.*bytes.*No space left"):
        save_state(saved, 3, tensors(3), {})
    assert sorted(p.name for p in saved.iterdir()) == ["step-00000001", "step-00000002"]
    assert latest(saved) == saved / "step-00000002"


def test_full_file_system_is_reported_as_such(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        save_state(folder, 1, {"x": torch.ones(1000)}, {})
        with pytest.raises(CheckpointError, match=r"step-00000002.*4,000,000 bytes"):
            save_state(folder, 2, {"x": torch.ones(1_000_000)}, {})
        assert [p.name for p in folder.iterdir()] == ["step-00000001"]
        load_state(latest(folder), {"x": torch.zeros(1000)})
    finally:
        subprocess.run(["umount", folder], check=True)


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from fastvid.training.checkpoint import latest, load_state, prune, save_state

torch.set_num_threads(1)
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
made = lambda step: {f"t{i}": torch.full((64, 64), float(step)) for i in range(8)}
save_state(folder, 0, made(0), {"step": 0})
rng, step = random.Random(0), 0
for _ in range(kills):
    if not (child := os.fork()):
        while True:
            step += 1
            save_state(folder, step, made(step), {"step": step})
            prune(folder, step, keep=2)
    time.sleep(rng.uniform(0.02, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = made(-1)
    found = latest(folder)
    step = load_state(found, loaded)["step"]
    assert found.name == f"step-{step:08d}", found
    assert all((tensor == step).all() for tensor in loaded.values()), step
print(step)
"""


def test_killed_saves_never_lose_or_mix_a_checkpoint(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "20"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0  # saves were under way


RANK_KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from fastvid.training.checkpoint import checkpoints, latest, load_state, prune, save_state
from fastvid.training.distributed import World

torch.set_num_threads(1)
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
made = lambda step: {f"t{i}": torch.full((64, 64), float(step)) for i in range(8)}

def save_until_killed(rank, meeting, step):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"), init_device_mesh("cpu", (2,)))
    while True:
        step += 1
        save_state(folder, step, made(step), {"step": step}, world=world)
        if world.first:
            prune(folder, step, keep=2)

def start(*arguments):
    if child := os.fork():
        return child
    try:
        save_until_killed(*arguments)
    finally:
        os._exit(1)  # the other rank is gone

def ended(child, deadline):
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            sys.exit("a rank hangs after the other was killed")
        time.sleep(0.01)

save_state(folder, 0, made(0), {"step": 0})
rng, step = random.Random(0), 0
for number in range(kills):
    pair = [start(rank, folder / f".meeting-{number}", step) for rank in (0, 1)]
    while max(checkpoints(folder)) == step:  # until saves are under way
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.1))
    for victim in rng.choice(([0], [1], [0, 1])):
        os.kill(pair[victim], signal.SIGKILL)
    deadline = time.monotonic() + 60
    for child in pair:
        ended(child, deadline)
    loaded = made(-1)
    found = latest(folder)
    step = load_state(found, loaded)["step"]
    assert found.name == f"step-{step:08d}", found
    assert all((tensor == step).all() for tensor in loaded.values()), step
print(step)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_killed_rank_neither_loses_a_checkpoint_nor_keeps_the_other_waiting(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", RANK_KILLS, str(tmp_path), "6"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 6  # every pair saved
