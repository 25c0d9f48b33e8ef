"""Score a model on held-out clips: PSNR, SSIM, LPIPS, FVD, beside copying and blending."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset, Subset

from fastvid.diffusion.tasks import TASKS

if TYPE_CHECKING:
    from fastvid.metrics import FVD
    from fastvid.training.codec import Codec
    from fastvid.training.config import DataConfig, TrainConfig
    from fastvid.training.evaluate import Metric


@torch.inference_mode()
def main(argv: Sequence[str]) -> int:
    from fastvid import __version__
    from fastvid.cli._sampling import latent_bound, pick_device, pick_task, progress_bar
    from fastvid.training.build import build_schedule
    from fastvid.training.evaluate import evaluate, format_table, write_json
    from fastvid.training.families import family_of
    from fastvid.training.runs import load_run
    from fastvid.training.sample import frames_at_once
    from fastvid.training.timeline import latent_frames

    if argv and argv[0] == "vidim":
        from fastvid.cli import _vidim

        return _vidim.main(argv[1:])
    options = _parser().parse_args(argv)
    device = pick_device(options.device)
    metrics, fvd = _metrics(options, device)  # first: a missing file should not cost a sampling
    model, config, codec = load_run(options.run)
    family, frames = family_of(config), options.frames or config.data.frames
    latents = latent_frames(frames, codec.time_factor, "--frames")
    model, codec = model.to(device), codec.to(device)
    model = family.sampling(model, options.task, latents, one_pass=False)
    sampler_of, spacing = family.sampler_of(model, codec, config)
    clips = _clips(options, config, codec)
    task, given = pick_task(config, options.task, options.given)

    with progress_bar(unit="call", desc=task, delay=0.1) as progress:
        result = evaluate(
            model,
            codec,
            build_schedule(config.diffusion),
            clips,
            task=task,
            given=given,
            window=frames_at_once(model, latents),
            prediction=config.diffusion.prediction,
            steps=options.steps,
            samples=options.samples,
            seed=options.seed,
            metrics=metrics,
            fvd=fvd,
            clip=latent_bound(config),
            sampler_of=sampler_of,
            spacing=spacing,
            batch=options.batch,
            device=device,
            progress=progress,
        )
    print(clips.dataset.report, file=sys.stderr)  # type: ignore[attr-defined]
    result["task"] = options.task  # as it was asked for
    result["sampler"] = family.SAMPLER
    print(format_table(result))
    out = Path(options.out or Path(options.run) / f"metrics-{options.task}.json")
    source = {"fastvid": __version__, "model": str(options.run), "data": options.data}
    write_json(source | result, out)
    print(f"definitions and values in {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvid evaluate",
        description=__doc__,
        epilog="One sample pays up to 3 dB against the mean of what may follow: compare the mean "
        "rows with blending. Frames that are given do not count; FVD leaves them out where 10 or "
        "more others remain, and says so. `fastvid evaluate vidim --help` has VIDIM-Bench, seven "
        "frames between two.",
    )
    add = parser.add_argument
    add("run", help="run folder of `fastvid train`, or a model folder in one")
    add("--data", metavar="DIR", help="folder of clips [what the run held out]")
    add("--task", choices=TASKS, required=True, metavar="TASK", help=", ".join(TASKS))
    add("--given", type=int, metavar="K", help="given frames [those of training, else of the task]")
    add(
        "--frames",
        type=int,
        metavar="N",
        help="per clip [those of training]; more than the model "
        "makes at once are made by sliding windows",
    )
    add("--clips", type=int, default=64, metavar="N", help="clips at most, spread over DIR [64]")
    add("--samples", type=int, default=8, help="per clip; over 1, their mean is scored too [8]")
    add("--steps", type=int, help="DDIM steps [50, or the whole of a shorter chain]")
    add("--seed", type=int, default=0, help="of noise and of what is given [0]")
    add("--batch", type=int, default=8, help="clips at a time; changes no result [8]")
    add("--lpips", metavar="FILE", help="torchvision's alexnet-owt-7be5be79.pth or vgg16 weights")
    add("--lpips-net", choices=("alex", "vgg"), default="alex", help="network of FILE [alex]")
    add("--lpips-heads", metavar="FILE", help="linear heads [those of the lpips package]")
    add("--fvd", metavar="FILE", help="StyleGAN-V's i3d_torchscript.pt")
    add(
        "--fvd-variant",
        choices=("styleganv", "videogpt", "tf"),
        default="styleganv",
        help="how frames are resized for it [styleganv]",
    )
    add("--device", choices=("cpu", "cuda"), help="[CUDA where there is one]")
    add("--out", metavar="JSON", help="where values and definitions go [RUN/metrics-TASK.json]")
    return parser


def _metrics(options: argparse.Namespace, device: str) -> tuple[dict[str, "Metric"], "FVD | None"]:
    from fastvid.metrics import FVD, LPIPS, psnr, ssim

    metrics: dict[str, Metric] = {"psnr": psnr, "ssim": ssim}
    if options.lpips:
        network = LPIPS(options.lpips, net=options.lpips_net, heads=options.lpips_heads)
        metrics["lpips"] = network.to(device)
    fvd = FVD(options.fvd, variant=options.fvd_variant, device=device) if options.fvd else None
    return metrics, fvd


def _clips(options: argparse.Namespace, config: "TrainConfig", codec: "Codec") -> Subset:
    """Up to `--clips` clips, evenly spread over the held-out set."""
    from fastvid.training.batches import open_sets

    for name in ("clips", "frames"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    # Clips are read once: a cache would only decode all files, those trained on among them.
    data = replace(config.data, frames=options.frames or config.data.frames, cache=False)
    held: Dataset | None
    if options.data:
        held = _open(options.data, data)
    elif config.data.kind == "latents":
        raise ValueError("--data must name a folder of clips: the run was trained on latents")
    else:
        _, held = open_sets(data, codec, config.run.seed)
        if held is None:
            raise ValueError("--data must name a folder of clips: the run held none out")
    size = len(held)  # type: ignore[arg-type]
    count = min(options.clips, size)
    return Subset(held, [number * size // count for number in range(count)])


def _open(folder: str, data: "DataConfig") -> Dataset:
    """All clips of a folder, cut as the run's were."""
    if data.kind in ("clips", "latents"):
        from fastvid.data.clips import ClipDataset

        return ClipDataset(
            folder,
            frames=data.frames,
            size=data.size,
            stride=data.stride,
            fit=data.fit,
            windows="grid",
        )
    from fastvid.data.frames import FrameFolderDataset, cityscapes_sequences, frame_folders

    find: Callable = cityscapes_sequences if data.kind == "cityscapes" else frame_folders
    return FrameFolderDataset(
        find(folder),
        frames=data.frames,
        size=data.size,
        stride=data.stride,
        fit=data.fit,
        windows="grid",
    )
