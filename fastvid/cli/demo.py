"""Make clips, train a small VDT, stop and resume it, sample and score it: minutes on two cores."""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastvid.models.vdt import VDT
    from fastvid.training.codec import Codec
    from fastvid.training.config import TrainConfig

RIVALS = {  # what the model's mean has to beat, by task: rows of the scores, in words
    "predict": {"copy_nearest": "copying the last given frame"},
    "interpolate": {
        "linear_blend": "blending the given frames",
        "copy_nearest": "copying the nearest given frame",
    },
}
CLIPS, HELD_OUT, LENGTH = 800, 32, 32  # motion clips to train on and to hold out, frames of each
MOTION: dict[str, Any] = {  # between two given frames a shape moves by more than its own size
    "shapes": (3, 4),
    "radius": (0.08, 0.13),  # in sides of the picture
    "speed": (0.08, 0.13),  # the same, per frame
    "spin": 0.05,
    "texture": 0.3,
}
SCORED, SHOWN = 96, 4  # held-out windows that are scored, and that are drawn, at most
DDIM_STEPS = 50
FPS = 4.0  # of the pictures: slow enough to see each frame


class Verdict(NamedTuple):
    """Whether the model's mean beats one rival in one task."""

    won: bool
    text: str


def main(argv: Sequence[str]) -> int:
    from fastvid import __version__
    from fastvid.training.batches import open_sets
    from fastvid.training.codec import build_codec
    from fastvid.training.evaluate import format_table, write_json
    from fastvid.training.runs import load_run

    options = _parser().parse_args(argv)
    out = Path(options.out or default_out(options.data, options.dry_run))
    config = demo_config(out, data=options.data, steps=options.steps, dry_run=options.dry_run)
    steps = 4 if options.dry_run else DDIM_STEPS
    seconds: dict[str, float] = {}

    if not options.data:
        with _timed("clips", seconds):
            make_clips(out / "clips", dry_run=options.dry_run)
    once = replace(config.data, cache=False)  # read for the scores: not worth keeping
    _, held_out = open_sets(once, build_codec(config.codec), config.run.seed)
    clips = windows(held_out, 8 if options.dry_run else SCORED)
    with _timed("training", seconds):
        stopped = train_with_a_stop(config)
    model, config, codec = load_run(config.run.folder)
    scores = {}
    for task in RIVALS:
        with _timed(task, seconds):
            scores[task] = score(model, codec, config, clips, task, steps=steps)
            shown = clips[:: max(1, len(clips) // SHOWN)][:SHOWN]
            draw_task(out, model, codec, config, shown, task, steps=steps)
    draw_losses(out / "loss.png", Path(config.run.folder), stopped)
    verdicts = compare(scores)
    result = {
        "fastvid": __version__,
        "torch": torch.__version__,
        "steps": config.run.steps,
        "scores": scores,
        "verdicts": [verdict.text for verdict in verdicts],
        "seconds": seconds,
    }
    write_json(result, out / "metrics.json")

    print("\n" + "\n\n".join(format_table(scores[task]) for task in scores))
    print("\n" + "\n".join(verdict.text for verdict in verdicts))
    print(f"\n{_where(out, Path(config.run.folder))}")
    if all(verdict.won for verdict in verdicts):
        return 0
    if options.dry_run or options.data:
        print("\nThese clips and this many steps promise nothing: the comparison is shown only.")
        return 0
    print("\nFAILED: the model's mean must beat copying and blending, and does not.")
    return 1


def default_out(data: str | None, dry_run: bool) -> str:
    """A folder for each source of clips: a run goes on with the clips it began with."""
    source = f"-{Path(data).resolve().name}" if data else ""
    return f"runs/demo{source}{'-dry' if dry_run else ''}"


def demo_config(
    out: Path, *, data: str | None = None, steps: int | None = None, dry_run: bool = False
) -> "TrainConfig":
    """The recipe `vdt-demo` on the demo's own clips, or on a folder of the user's."""
    from fastvid.training.recipes import RECIPES

    config = RECIPES["vdt-demo"]()
    if data:
        # Neighbouring frames of footage hardly differ: every other one makes the task worth it.
        sets = replace(config.data, train=data, validation="", validation_share=0.2, stride=2)
    else:
        clips = out / "clips"
        sets = replace(config.data, train=str(clips / "train"), validation=str(clips / "held-out"))
    run = replace(config.run, folder=str(out / "run"), steps=steps or config.run.steps)
    if dry_run:
        run = replace(
            run,
            steps=steps or 12,
            log_every=1,
            validate_every=6,
            validation_clips=4,
            sample_every=6,
        )
    return replace(config, data=sets, run=run)


def make_clips(folder: Path, *, dry_run: bool = False) -> None:
    """Write motion clips to train on and to hold out, as MP4 files, unless they are there."""
    from fastvid.data.synthetic import make_motion_clips

    for name, count, seed in (("train", CLIPS, 0), ("held-out", HELD_OUT, 1)):
        make_motion_clips(
            folder / name,
            clips=16 if dry_run else count,
            frames=LENGTH,
            size=32,
            seed=seed,
            **MOTION,
        )


def train_with_a_stop(config: "TrainConfig") -> int | None:
    """Train to the end, but stop halfway as a signal would, and resume from the checkpoint.

    A run that an earlier call left unfinished goes on; a finished one is kept as it is.

    Returns:
        the step of the stop, or None where this call made none.
    """
    from fastvid.training.checkpoint import checkpoints
    from fastvid.training.interrupt import Interrupted
    from fastvid.training.loop import train

    halfway = config.run.steps // 2
    try:
        train(config, resume=True, stop_at=halfway)
    except Interrupted:
        if max(checkpoints(Path(config.run.folder) / "checkpoints")) != halfway:
            raise  # somebody else's signal
        print(f"Stopped on purpose at step {halfway}; resuming from the checkpoint.", flush=True)
        train(config, resume=True)
        return halfway
    return None


def windows(held_out: Any, most: int) -> Tensor:
    """Up to `most` held-out clips (N, 3, T, H, W), spread evenly over the set.

    Raises:
        ValueError: nothing was held out.
    """
    if held_out is None:
        raise ValueError(
            "--data must hold at least two videos: one of them is held out to score on"
        )
    size = len(held_out)
    count = min(most, size)
    return torch.stack([held_out[i * size // count]["video"] for i in range(count)])


def score(
    model: "VDT",
    codec: "Codec",
    config: "TrainConfig",
    clips: Tensor,
    task: str,
    *,
    steps: int = DDIM_STEPS,
) -> dict[str, Any]:
    """One sample, the mean by one step, and the rivals on `clips`; see `training.evaluate`."""
    from fastvid.cli._sampling import latent_bound, pick_task, progress_bar
    from fastvid.training.build import build_schedule
    from fastvid.training.evaluate import evaluate

    task, given = pick_task(config, task, None)
    with progress_bar(unit="call", leave=False) as progress:
        return evaluate(
            model,
            codec,
            build_schedule(config.diffusion),
            clips,
            task=task,
            given=given,
            prediction=config.diffusion.prediction,
            steps=steps,
            samples=1,
            clip=latent_bound(config),
            batch=16,
            progress=progress,
        )


def compare(scores: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """The PSNR of the model's mean against each rival, the single sample told beside it."""
    verdicts = []
    for task, rivals in RIVALS.items():
        psnr = {row: values["psnr"] for row, values in scores[task]["rows"].items()}
        for row, words in rivals.items():
            mean, rival, one = psnr["one_step_mean"], psnr[row], psnr["sample"]
            text = (
                f"{'above' if mean > rival else 'BELOW'}  {task}: the mean reaches {mean:.2f} dB, "
                f"{words} {rival:.2f} ({mean - rival:+.2f}); one sample {one:.2f}"
            )
            verdicts.append(Verdict(mean > rival, text))
    return verdicts


def draw_task(
    out: Path,
    model: "VDT",
    codec: "Codec",
    config: "TrainConfig",
    clips: Tensor,
    task: str,
    *,
    steps: int = DDIM_STEPS,
) -> None:
    """TASK.png, TASK.mp4, TASK.gif in `out`: truth, rival, the model's mean and one sample."""
    from fastvid.cli._sampling import latent_bound, pick_task
    from fastvid.data.video import write_gif, write_mp4
    from fastvid.diffusion.sampling import draw_noise, one_step_x0, seeded
    from fastvid.metrics import linear_blend
    from fastvid.training.build import build_schedule
    from fastvid.training.sample import sample_task
    from fastvid.training.sheets import Row, moving_sheet, save_contact_sheet

    schedule, prediction = build_schedule(config.diffusion), config.diffusion.prediction
    made, known = sample_task(
        model,
        codec,
        schedule,
        clips,
        task=task,
        seeds=range(len(clips)),
        frames=clips.shape[2],
        given=pick_task(config, task, None)[1],
        steps=steps,
        prediction=prediction,
        clip=latent_bound(config),
    )
    latents = codec.encode(clips)
    noise = draw_noise(latents.shape, seeded(range(len(clips))))
    mean = codec.decode(
        one_step_x0(model, noise, schedule, known=known, clean=latents, prediction=prediction)
    )
    rows = {
        "truth": clips,
        "blended" if task == "interpolate" else "last copied": linear_blend(clips, known),
        "model, mean": mean,
        "model, one sample": made,
    }
    lines = [
        [Row(label, video[i], known[i]) for label, video in rows.items()] for i in range(len(clips))
    ]
    save_contact_sheet(
        out / f"{task}.png",
        [row for line in lines for row in line],
        title=f"{task}: given frames are outlined",
        cell=128,
        group=len(rows),
    )
    moving = moving_sheet(lines)
    write_mp4(out / f"{task}.mp4", moving, FPS)
    write_gif(out / f"{task}.gif", moving, FPS)


def draw_losses(path: Path, run: Path, stopped: int | None) -> None:
    """The losses in a run's log as one picture, with the step at which it was resumed, if any."""
    from fastvid.training.log import read_log
    from fastvid.training.sheets import save_curves

    curves: dict[str, tuple[list[float], list[float]]] = {}
    for line in read_log(run):
        if "loss" in line:
            steps, losses = curves.setdefault(line["kind"], ([], []))
            steps.append(line["step"])
            losses.append(line["loss"])
    marks = {} if stopped is None else {"stopped and resumed": stopped}
    save_curves(path, curves, title="vdt-demo: loss", marks=marks)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastvid demo", description=__doc__)
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="train on the videos in it; the comparison is only shown")
    add("--steps", type=_count, metavar="N", help="optimiser steps, in place of the recipe's")
    add(
        "--dry-run",
        action="store_true",
        help="the same in a few steps; the comparison is only shown",
    )
    add("--out", metavar="DIR", help="[runs/demo, with the name of FOLDER and -dry added]")
    return parser


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {count}")
    return count


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"{stage} ...", flush=True)
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 1)
    print(f"{stage}: {seconds[stage]:.0f} s", flush=True)


def _where(out: Path, run: Path) -> str:
    return "\n".join(
        [
            f"Look at {out}/",
            "  interpolate.png  interpolate.mp4  interpolate.gif   given frames outlined",
            "  predict.png      predict.mp4      predict.gif",
            "  loss.png         metrics.json",
            f"and go on with:  fastvid sample {run} --task interpolate --input CLIP",
        ]
    )
