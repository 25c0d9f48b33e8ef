"""MarDini with identity attention and without, at equal steps.

    python -m benchmarks.models.ablate_mardini --data CLIPS

The paper's figure 6c, small: two runs of the demo's joint stage from fresh weights, the same seed,
clips and noise, of which one lets given frames see the frames that are still noise. Writes their
validation losses as OUT/identity.json and OUT/identity.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastvid.training.config import TrainMarDini
from fastvid.training.log import read_log
from fastvid.training.loop import train
from fastvid.training.recipes_mardini import demo_config
from fastvid.training.sheets import save_curves

IDENTITIES = {"self_token": "identity attention", "none": "without"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of clips")
    parser.add_argument("--steps", type=int, default=600, help="of each run [600]")
    parser.add_argument("--out", default="runs/ablate-mardini", metavar="DIR")
    options = parser.parse_args(argv)
    out = Path(options.out)
    curves = {}
    for identity, label in IDENTITIES.items():
        config = ablated(identity, options.data, options.steps, out / identity)
        curves[label] = validation_losses(train(config, resume=True))
    save_curves(out / "identity.png", curves, title="MarDini, tiny: validation loss")
    table = {label: dict(zip(*curve, strict=True)) for label, curve in curves.items()}
    (out / "identity.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for label, (steps, losses) in curves.items():
        print(f"{label:20} {losses[-1]:.4f} after {steps[-1]:.0f} steps")
    return 0


def ablated(identity: Any, data: str, steps: int, folder: Path) -> TrainMarDini:
    """The demo's joint stage from fresh weights, one identity in both networks."""
    config = demo_config("joint")
    planner = replace(config.model.planner, identity=identity)
    generator = replace(config.model.generator, identity=identity)
    return replace(
        config,
        model=replace(config.model, planner=planner, generator=generator),
        data=replace(config.data, train=data),
        run=replace(
            config.run,
            folder=str(folder),
            init="",
            steps=steps,
            validate_every=max(1, steps // 10),
            sample_every=0,
        ),
    )


def validation_losses(folder: Path) -> tuple[list[float], list[float]]:
    """Steps and losses of a run's validations."""
    lines = [line for line in read_log(folder) if line["kind"] == "validation"]
    return [float(line["step"]) for line in lines], [line["loss"] for line in lines]


if __name__ == "__main__":
    raise SystemExit(main())
