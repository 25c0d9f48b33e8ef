"""Train a model from a recipe: on one process, or on many under torchrun.

fastvid train vdt-demo
fastvid train vdt-demo --config my.yaml --optim.lr 2e-4 --model.dim 192
fastvid train vdt-demo --resume
torchrun --nproc-per-node 8 -m fastvid train vdt-sky --run.folder runs/sky
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fastvid.cli._recipe import parse_recipe
from fastvid.training.config import TrainConfig

INTERRUPTED = 75  # EX_TEMPFAIL: nothing is wrong, try again

_EPILOG = """\
where it runs:
  run.device auto takes CUDA where there is one, else the CPU. run.precision bf16 computes in
  bfloat16 under autocast and keeps weights, optimiser and average in fp32: right for GPUs since
  Ampere. On a CPU fp32 is the safe choice, and the faster one unless it has bfloat16 instructions.

stopping and going on:
  SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 end the run at its next step, after saving. --resume goes on,
  on any number of processes that divides optim.batch; the run's own config.yaml then takes the
  place of the recipe. With nothing saved yet it starts at the beginning. A stop at a step that
  validates does so before it saves.

exit status:
  0 finished, 1 failed, 2 not understood, 75 stopped by a signal and saved.
"""


def main(argv: Sequence[str]) -> int:
    config, resume = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    from fastvid.data.video import VideoError
    from fastvid.training.checkpoint import CheckpointError
    from fastvid.training.guard import NonFiniteError
    from fastvid.training.interrupt import Interrupted, RunBusyError
    from fastvid.training.log import LogError
    from fastvid.training.loop import train

    try:
        folder = train(config, resume=resume)
    except Interrupted as stopped:
        print(f"fastvid train: {stopped}; go on with --resume", file=sys.stderr)
        return INTERRUPTED
    except (CheckpointError, LogError, NonFiniteError, RunBusyError, VideoError) as error:
        print(f"fastvid train: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {_made(folder)}")
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


def parse(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    """The config that a command line means, and whether to resume."""
    flags = {"resume": {"action": "store_true", "help": "go on where the run stopped"}}
    config, own = parse_recipe("train", argv, flags, (__doc__ or "").strip(), _EPILOG)
    return config, own["resume"]
