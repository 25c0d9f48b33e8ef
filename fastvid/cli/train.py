"""Train a model from a recipe: on one process, or on many under torchrun.

fastvid train vdt-demo
fastvid train vdt-demo --config my.yaml --optim.lr 2e-4 --model.dim 192
fastvid train vdt-demo --resume
fastvid train mardini-demo --data.train clips --run.folder runs/tiny
torchrun --nproc-per-node 8 -m fastvid train vdt-sky --run.folder runs/sky
"""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from fastvid.cli._recipe import parse_recipe
from fastvid.training.config import TrainConfig
from fastvid.training.recipes import CHAINS, RECIPES

INTERRUPTED = 75  # EX_TEMPFAIL: nothing is wrong, try again

_EPILOG = """\
where it runs:
  run.device auto takes CUDA where there is one, else the CPU. run.precision bf16 computes in
  bfloat16 under autocast and keeps weights, optimiser and average in fp32: right for GPUs since
  Ampere. On a CPU fp32 is the safe choice, and the faster one unless it has bfloat16 instructions.

recipes in a chain:
  mardini and mardini-demo are all their stages, one after another, each from the weights of the one
  before. Options hold for every stage, and run.folder is the folder of their folders; a single
  stage (mardini-joint) is a recipe like any other. --resume goes on where the chain stopped.

stopping and going on:
  SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 end the run at its next step, after saving. --resume goes on,
  on any number of processes that divides optim.batch; the run's own config.yaml then takes the
  place of the recipe. With nothing saved yet it starts at the beginning. A stop at a step that
  validates does so before it saves.

exit status:
  0 finished, 1 failed, 2 not understood, 75 stopped by a signal and saved.
"""


def main(argv: Sequence[str]) -> int:
    runs = parse_chain(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    from fastvid.data.video import VideoError
    from fastvid.training.checkpoint import CheckpointError
    from fastvid.training.guard import NonFiniteError
    from fastvid.training.interrupt import Interrupted, RunBusyError
    from fastvid.training.log import LogError
    from fastvid.training.loop import train

    try:
        for config, resume in runs:
            folder = train(config, resume=resume)
            print(f"{folder}: {_made(folder)}")
    except Interrupted as stopped:
        print(f"fastvid train: {stopped}; go on with --resume", file=sys.stderr)
        return INTERRUPTED
    except (CheckpointError, LogError, NonFiniteError, RunBusyError, VideoError) as error:
        print(f"fastvid train: {error}", file=sys.stderr)
        return 1
    return 0


def _made(folder: Path) -> str:
    """What a run has left, of what it may."""
    places = {
        "best weights": "model/best",
        "last weights": "model/last",
        "losses": "log.jsonl",
        "curves": "tb",
        "contact sheets": "samples",
    }
    return ", ".join(f"{what} in {at}" for what, at in places.items() if (folder / at).exists())


def parse_chain(argv: Sequence[str]) -> list[tuple[TrainConfig, bool]]:
    """`parse` of every run that a command line means, in order: one, or those of a chain."""
    if not argv or argv[0] not in CHAINS:
        return [parse(argv)]
    rest, root = _without_folder(list(argv[1:]))
    runs: list[tuple[TrainConfig, bool]] = []
    for recipe in CHAINS[argv[0]]:
        own = []
        if root:
            own = ["--run.folder", str(Path(root, Path(RECIPES[recipe]().run.folder).name))]
            own += ["--run.init", runs[-1][0].run.folder] if runs else []
        runs.append(parse([recipe, *rest, *own]))
    return runs


def _without_folder(argv: list[str]) -> tuple[list[str], str]:
    """A command line less its `--run.folder`, and that."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run.folder", dest="folder", default="")
    found, rest = parser.parse_known_args(argv)
    return rest, found.folder


def parse(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    """The config that a command line means, and whether to resume."""
    flags = {"resume": {"action": "store_true", "help": "go on where the run stopped"}}
    config, own = parse_recipe("train", argv, flags, (__doc__ or "").strip(), _EPILOG)
    return config, own["resume"]
