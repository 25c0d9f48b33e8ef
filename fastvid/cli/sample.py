"""Generate clips: predict, interpolate, complete or invent, as MP4, GIF and contact sheet."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastvid.diffusion.tasks import TASKS

if TYPE_CHECKING:
    from fastvid.training.codec import Codec
    from fastvid.training.config import TrainConfig

FPS = 12.0  # of what is made from no video
SMALLEST = 128  # pixels: smaller clips are enlarged in the files, by repeating pixels


class Clip(NamedTuple):
    """What is known of a clip before it is made."""

    name: str  # of its files
    video: Tensor | None  # (3, T0, H, W) in [-1, 1], T0 at most the length asked for
    fps: float


@torch.inference_mode()
def main(argv: Sequence[str]) -> int:
    from fastvid.cli._sampling import latent_bound, pick_device, pick_task, progress_bar
    from fastvid.training.build import build_schedule
    from fastvid.training.families import family_of
    from fastvid.training.runs import load_run
    from fastvid.training.sample import laid_out, sample_task
    from fastvid.training.timeline import latent_frames

    options = _parser().parse_args(argv)
    _check(options)
    model, config, codec = load_run(options.run)
    device = pick_device(options.device)
    model, codec = model.to(device), codec.to(device)
    frames = options.frames or config.data.frames
    latents = latent_frames(frames, codec.time_factor, "--frames")
    family = family_of(config)
    model = family.sampling(model, options.task, latents, one_pass=options.one_pass)
    sampler_of, spacing = family.sampler_of(model, codec, config, guidance=options.guidance)
    task, given = pick_task(config, options.task, options.given)
    known = _known(options, config, codec, task, given, latents)
    size = config.data.size[0] // codec.factor, config.data.size[1] // codec.factor

    clips = _clips(options, config, codec, task, known, frames)
    jobs = [(clip, seed) for clip in clips for seed in _seeds(options)]
    batches = [jobs[i : i + options.batch] for i in range(0, len(jobs), options.batch)]
    out = Path(options.out or Path(options.run) / "samples")
    with progress_bar(unit="step", desc=options.task) as progress:
        for number, jobs_together in enumerate(batches):

            def tick(done: int, total: int, before: int = number) -> None:
                progress(before * total + done, len(batches) * total)

            places = [seed - options.seed for _, seed in jobs_together]
            there = known[places]
            video = [
                laid_out(task, clip.video[None], there[i : i + 1], codec.time_factor)[0]
                for i, (clip, _) in enumerate(jobs_together)
                if clip.video is not None
            ]
            length = min((v.shape[1] for v in video), default=0)
            made = sample_task(
                model,
                codec,
                build_schedule(config.diffusion),
                torch.stack([v[:, :length] for v in video]) if length else None,
                task=task,
                seeds=[seed for _, seed in jobs_together],
                frames=frames,
                size=size,
                known=there,
                overlap=options.overlap,
                steps=min(options.steps, config.diffusion.steps),
                spacing=spacing,
                eta=options.eta,
                prediction=config.diffusion.prediction,
                clip=latent_bound(config),
                sampler_of=sampler_of,
                progress=tick,
            )
            for (clip, seed), video_made, known_made in zip(jobs_together, *made, strict=True):
                if task == "loop":  # its last frame is its first: repeated, it would stand still
                    video_made, known_made = video_made[:, :-1], known_made[:-1]
                name = f"{clip.name}-{options.task}-seed{seed}"
                _write(out / name, clip, video_made, known_made, f"{options.task}, seed {seed}")
                print(out / name)
    print(f"{len(jobs)} clips of {frames} frames: .mp4, .gif and contact sheet .png of each")
    return 0


def enlarged(video: Tensor, smallest: int = SMALLEST) -> Tensor:
    """(3, T, H, W) or (T, 3, H, W) with every pixel repeated until no side is below `smallest`."""
    times = -(-smallest // min(video.shape[2:]))
    return video.repeat_interleave(times, 2).repeat_interleave(times, 3)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastvid sample", description=__doc__)
    add = parser.add_argument
    add("run", help="run folder of `fastvid train`, or a model folder in one")
    add("--task", choices=TASKS, required=True, metavar="TASK", help=", ".join(TASKS))
    add(
        "--input",
        nargs="+",
        default=[],
        metavar="CLIP",
        help="video files, folders of frames, or images; what holds just as many frames as are "
        "given holds those",
    )
    add("--start", type=int, default=0, help="first frame of the input to use [0]")
    add("--stride", type=int, help="take every so manyth frame of the input [that of training]")
    add("--given", type=int, metavar="K", help="given frames [those of training, else of the task]")
    add(
        "--known",
        type=int,
        nargs="+",
        metavar="FRAME",
        help="which frames of the clip are given, from 0, in place of the task's own",
    )
    add("--frames", type=int, metavar="N", help="frames of the clip to make [those of training]")
    long = parser.add_mutually_exclusive_group()
    long.add_argument(
        "--window", action="store_true", help="make a long clip by sliding windows [as it is]"
    )
    long.add_argument(
        "--one-pass", action="store_true", help="make a long clip at once, by a longer time table"
    )
    add("--overlap", type=int, help="frames a window sees of the one before [as many as given]")
    add("--steps", type=int, default=50, help="DDIM steps [50]")
    add(
        "--guidance",
        type=float,
        metavar="SCALE",
        help="of a model that plans; 1 is none [2.5 from a single frame, else none]",
    )
    add(
        "--eta", type=float, default=0.0, help="noise of the DDIM steps: 0 none, 1 as ancestral [0]"
    )
    add("--seed", type=int, default=0, help="of the first sample; the next ones count up [0]")
    add("--samples", type=int, default=1, help="samples of every input [1]")
    add("--batch", type=int, default=8, help="clips at a time; changes no result [8]")
    add("--device", choices=("cpu", "cuda"), help="[CUDA where there is one]")
    add("--out", metavar="DIR", help="where files go [RUN/samples]")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("frames", "samples", "batch", "steps", "stride"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if options.start < 0:
        raise ValueError(f"--start must not be negative, got {options.start}")
    if options.task == "unconditional" and options.input:
        raise ValueError("--input must be left out: nothing is given for unconditional")
    if options.task != "unconditional" and not options.input:
        raise ValueError(f"--input must name a clip: {options.task} starts from given frames")


def _seeds(options: argparse.Namespace) -> range:
    return range(options.seed, options.seed + options.samples)


def _known(
    options: argparse.Namespace,
    config: "TrainConfig",
    codec: "Codec",
    task: str,
    given: int | None,
    frames: int,
) -> Tensor:
    """What is given of `frames` latent frames, by seed: bool (seeds, T) or (seeds, T, h, w)."""
    from fastvid.training.sample import draw_known

    if options.known is None:
        height, width = (side // codec.factor for side in config.data.size)
        return draw_known(task, frames, height, width, given=given, seeds=_seeds(options))
    known = torch.zeros(len(_seeds(options)), frames, dtype=torch.bool)
    if min(options.known) < 0 or max(options.known) >= frames or len(options.known) >= frames:
        raise ValueError(
            f"--known must name frames 0 to {frames - 1} and leave one to make, got {options.known}"
        )
    known[:, options.known] = True
    return known


def _clips(
    options: argparse.Namespace,
    config: "TrainConfig",
    codec: "Codec",
    task: str,
    known: Tensor,
    frames: int,
) -> list[Clip]:
    """The inputs at the run's size, each as long as the task needs or longer."""
    from fastvid.training.sample import needed_frames

    if not options.input:
        return [Clip("sample", None, FPS)]
    stride = options.stride or config.data.stride
    names = [Path(path).stem for path in options.input]
    clips = []
    for number, path in enumerate(map(Path, options.input)):
        video, fps = _read(path, options.start, frames, stride, config)
        needed = needed_frames(task, known, video.shape[1], codec.time_factor)
        if video.shape[1] < needed:
            raise ValueError(
                f"{path} is too short: {options.task} needs {needed} frames from frame "
                f"{options.start} on, one in {stride}, and it has {video.shape[1]}"
            )
        same_name = names.count(path.stem) > 1
        clips.append(Clip(f"{path.stem}-{number}" if same_name else path.stem, video, fps))
    return clips


def _read(
    path: Path, start: int, frames: int, stride: int, config: "TrainConfig"
) -> tuple[Tensor, float]:
    """Up to `frames` frames as (3, T, H, W) in [-1, 1] at the run's size, and their rate."""
    from fastvid.data.frames import IMAGES, frame_folders, read_image
    from fastvid.data.video import probe, read_clip, resize

    size, fit = config.data.size, config.data.fit
    if path.is_dir():
        images = next((f for f in frame_folders(path) if f[0].parent == path), [])
        if not (wanted := images[start::stride][:frames]):
            raise ValueError(f"{path} has {len(images)} frames, none from --start {start} on")
        levels = torch.cat([resize(read_image(image)[None], size, fit) for image in wanted])
        fps = FPS
    elif path.suffix.lower() in IMAGES:
        levels, fps = resize(read_image(path)[None], size, fit), FPS
    else:
        info = probe(path)
        there = min(frames, -(-(info.frames - start) // stride))
        if there < 1:
            raise ValueError(f"{path} has {info.frames} frames, none from --start {start} on")
        levels = read_clip(path, start, there, stride=stride, size=size, fit=fit)
        fps = info.fps / stride
    return levels.transpose(0, 1).float().div(127.5).sub(1), fps


def _write(path: Path, clip: Clip, made: Tensor, known: Tensor, title: str) -> None:
    """`made` (3, T, H, W) as .mp4, .gif and .png; under the truth, where the input reaches on."""
    from fastvid.data.video import write_gif, write_mp4
    from fastvid.training.sheets import Row, save_contact_sheet, to_uint8

    path.parent.mkdir(parents=True, exist_ok=True)
    levels = to_uint8(enlarged(made))
    write_mp4(path.with_name(f"{path.name}.mp4"), levels, clip.fps)
    write_gif(path.with_name(f"{path.name}.gif"), levels, clip.fps)
    rows = [Row("made", made, known)]
    if clip.video is not None and clip.video.shape == made.shape:
        rows.insert(0, Row("input", clip.video, known))
    save_contact_sheet(path.with_name(f"{path.name}.png"), rows, title=f"{clip.name}: {title}")
