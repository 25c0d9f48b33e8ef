"""`fastvid train`: what a command line means, what it refuses, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import fastvid
from fastvid.cli import main
from fastvid.training.recipes import RECIPES

pytest.importorskip("jsonargparse")
pytest.importorskip("tqdm")
pytest.importorskip("av")

from fastvid.cli.train import INTERRUPTED, parse

ROOT = Path(fastvid.__file__).parents[1]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    from fastvid.data.synthetic import make_motion_clips

    folder = tmp_path_factory.mktemp("clips") / "motion"
    make_motion_clips(folder, clips=8, frames=8, size=16)
    return folder


@pytest.fixture
def tiny(clips, tmp_path):
    """A config file that makes vdt-demo tiny."""
    path = tmp_path / "tiny.yaml"
    values = {
        "model": {"height": 4, "width": 4, "frames": 4, "dim": 16, "depth": 1, "heads": 2},
        "data": {"train": str(clips), "frames": 4, "size": [16, 16], "validation_share": 0.3},
        "diffusion": {"tasks": {"predict": 1.0}},
        "optim": {"batch": 2},
        "run": {"folder": str(tmp_path / "run"), "steps": 3, "validation_clips": 2},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_recipe_file_and_options_lie_on_top_of_each_other(tiny):
    recipe = RECIPES["vdt-demo"]()
    config, resume = parse(["vdt-demo"])
    assert (config, resume) == (recipe, False)
    config, resume = parse(
        ["vdt-demo", "--config", str(tiny), "--optim.lr", "2e-4", "--run.steps", "5", "--resume"]
    )
    assert resume
    assert (config.optim.lr, config.run.steps) == (2e-4, 5)
    assert (config.model.dim, config.data.size) == (16, (16, 16))
    assert config.diffusion.prediction == recipe.diffusion.prediction
    assert config.diffusion.tasks == {"predict": 1.0}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vdt-demo", "--optim.learning_rate", "1"], "optim.learning_rate"),
        (["vdt-demo", "--optim.lr", "fast"], "optim.lr"),
        (["vdt-demo", "--data.size", "[1]"], "data.size"),
        (["vdt-demo", "--run.precision", "fp8"], "run.precision"),
        (["vdt-demo", "--optim.lr", "-1"], "lr must be positive"),
        (["vdt-dmeo"], "vdt-dmeo"),
        (["--run.steps", "3", "vdt-demo"], "RECIPE comes first"),
        ([], "recipe"),
    ],
)
def test_command_lines_that_make_no_sense_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["train", *argv])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_key_in_a_file_is_refused(tiny, capsys):
    tiny.write_text("optim:\n  learning_rate: 1.0\n")
    with pytest.raises(SystemExit) as refused:
        main(["train", "vdt-demo", "--config", str(tiny)])
    assert refused.value.code == 2
    assert "learning_rate" in capsys.readouterr().err


def test_help_tells_recipes_devices_and_exit_status(capsys):
    with pytest.raises(SystemExit) as done:
        main(["train", "vdt-demo", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for words in (*RECIPES, "bfloat16", "75 stopped by a signal", "Highest learning rate"):
        assert words in text


def test_help_shows_defaults_of_a_recipe_only(capsys):
    for argv, shown in ((["vdt-demo", "--help"], True), (["--help"], False)):
        with pytest.raises(SystemExit):
            main(["train", *argv])
        text = " ".join(capsys.readouterr().out.split())
        assert ("(type: int, default: 96)" in text) is shown  # model.dim of vdt-demo
        assert ("default: 1152)" in text) is False  # that of no demo
        assert ("name one before --help" in text) is not shown


def test_printed_config_is_one_that_can_be_read(tiny, capsys):
    with pytest.raises(SystemExit):
        main(["train", "vdt-demo", "--config", str(tiny), "--print_config"])
    printed = capsys.readouterr().out
    tiny.write_text(printed)
    assert parse(["vdt-demo", "--config", str(tiny)])[0].model.dim == 16


def test_run_and_resume_by_the_runs_own_config(tiny, tmp_path, capsys):
    assert main(["train", "vdt-demo", "--config", str(tiny)]) == 0
    printed = capsys.readouterr().out
    places = ("model/best", "model/last", "log.jsonl", "samples")
    assert printed.startswith(f"{tmp_path / 'run'}: ")
    assert all(f"in {place}" in printed for place in places)
    assert main(["train", "vdt-demo", "--config", str(tiny)]) == 1
    assert "--resume" in capsys.readouterr().err
    folder = str(tmp_path / "run")
    again = ["train", "vdt-demo", "--run.folder", folder, "--resume", "--run.steps", "4"]
    assert main(again) == 0  # neither the file nor its values are named again
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()


def test_only_what_was_made_is_told(tiny, capsys):
    alone = ["--data.validation_share", "0"]  # nothing held out: no best weights, no samples
    assert main(["train", "vdt-demo", "--config", str(tiny), *alone]) == 0
    printed = capsys.readouterr().out
    assert "model/last" in printed
    assert "model/best" not in printed
    assert "samples" not in printed


def test_missing_data_is_one_line_and_no_folder(tiny, tmp_path, capsys):
    assert main(["train", "vdt-demo", "--config", str(tiny), "--data.train", "/nowhere"]) == 1
    assert capsys.readouterr().err == "fastvid train: no folder /nowhere\n"
    assert not (tmp_path / "run").exists()


def test_sigterm_ends_with_its_own_status_and_a_checkpoint(tiny, tmp_path):
    command = [sys.executable, "-m", "fastvid", "train", "vdt-demo", "--config", str(tiny)]
    process = subprocess.Popen(
        [*command, "--run.steps", "100000", "--run.log_every", "1", "--run.sample_every", "0"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / "log.jsonl"
    end = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == INTERRUPTED, error
    assert "go on with --resume" in error
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-????????"))) == 1
