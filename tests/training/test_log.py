"""Files of a run that cannot be written are named, and what was there before outlives it."""

import errno
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastvid.training import loop, preview
from fastvid.training.checkpoint import CheckpointError, checkpoints
from fastvid.training.config import write_config
from fastvid.training.log import LogError, read_log
from fastvid.training.loop import train

pytest.importorskip("tqdm")


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_after_a_part(path, text, **options):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text[:10])
    full()


def test_config_is_replaced_whole_or_not_at_all(config, monkeypatch):
    made = config(steps=1)
    folder = train(made)
    saved = folder / "config.yaml"
    before, written = saved.read_bytes(), saved.stat().st_mtime_ns
    train(made, resume=True)
    assert saved.stat().st_mtime_ns == written  # nothing new to say
    longer = replace(made, run=replace(made.run, steps=2))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_after_a_part)
        with pytest.raises(LogError, match=r"run/config\.yaml: .*No space left"):
            train(longer, resume=True)
    assert saved.read_bytes() == before
    train(longer, resume=True)


def test_history_outlives_a_resume_on_a_full_disk(config, monkeypatch):
    made = config(steps=3, log_every=1)
    folder = train(made)
    before = (folder / "log.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_after_a_part)
        with pytest.raises(LogError, match=r"log\.jsonl: .*No space left"):
            train(made, resume=True)
    assert (folder / "log.jsonl").read_bytes() == before


def test_damaged_lines_of_a_log_are_told_and_a_last_one_cut_short_is_not(tmp_path, caplog):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 1}\n\0\xff\0\n{"step": 3}\n{"st')
    assert read_log(tmp_path) == [{"step": 1}, {"step": 3}]
    assert [r.getMessage() for r in caplog.records] == [f"{log}: line 2 is damaged and left out"]


FILE_LIMIT = """
import resource, signal, sys
from pathlib import Path
from fastvid.training import loop
from fastvid.training.config import read_config

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
original = loop._backward

def backward(run, state, batch):
    if state.step + 1 == 2:  # the log may grow by no whole line from here on
        size = (run.folder / "log.jsonl").stat().st_size + 5
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return original(run, state, batch)

loop._backward = backward
loop.train(read_config(Path(sys.argv[1])))
"""


def test_log_that_cannot_be_written_is_named_and_a_resume_mends_it(config, tmp_path):
    made = config(log_every=1, save_every=1)
    write_config(made, tmp_path / "config.yaml")
    result = subprocess.run(
        [sys.executable, "-c", FILE_LIMIT, str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
        cwd=Path(loop.__file__).parents[2],
        check=False,
    )
    assert result.returncode == 1
    assert re.search(r"LogError: could not write \S*run/log\.jsonl: ", result.stderr)
    assert list(checkpoints(tmp_path / "run" / "checkpoints")) == [1]
    train(made, resume=True)
    lines = [line for line in read_log(tmp_path / "run") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_sheet_that_cannot_be_written_is_named_and_costs_no_checkpoint(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(preview, "save_contact_sheet", full)
    with pytest.raises(LogError, match=r"samples/step-00000002\.png: .*No space left"):
        train(config(sample_every=2, save_every=2))
    assert list(checkpoints(tmp_path / "run" / "checkpoints")) == [2]


def test_full_disk_while_weights_are_written_is_told(config, tmp_path, monkeypatch):
    from fastvid.models.vdt import VDT

    made = config(steps=2)
    train(made)
    before = (tmp_path / "run" / "model" / "last" / "model.safetensors").read_bytes()
    monkeypatch.setattr(VDT, "_save_pretrained", full)
    longer = replace(made, run=replace(made.run, steps=3))
    with pytest.raises(CheckpointError, match=r"bytes of weights .*last.*No space left"):
        train(longer, resume=True)
    folder = tmp_path / "run" / "model" / "last"
    assert (folder / "model.safetensors").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "config.yaml",
        "model.safetensors",
    }
    assert list(checkpoints(tmp_path / "run" / "checkpoints")) == [2, 3]
