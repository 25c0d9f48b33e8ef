"""Score a model on held-out clips, always beside the trivial rivals.

One sample pays up to 3 dB against the mean of what may follow, so each table holds both: a single
sample, and estimates of that mean (one-step x0, mean of several samples).
"""

import inspect
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastvid.diffusion.process import Prediction
from fastvid.diffusion.sampling import Model
from fastvid.diffusion.schedule import Schedule, Spacing, respace
from fastvid.diffusion.tasks import task_known
from fastvid.metrics import FVD, copy_nearest, linear_blend, psnr, ssim
from fastvid.metrics.baselines import expand_known
from fastvid.metrics.frechet import MIN_FRAMES
from fastvid.training.codec import Codec
from fastvid.training.draws import generator
from fastvid.training.sample import (
    Sampler,
    SamplerOf,
    ddim_sampler,
    fill_windows,
    plan_windows,
    ticker,
)
from fastvid.training.timeline import known_in_video, latent_frames

Metric = Callable[[Tensor, Tensor], Tensor]  # (B, 3, T, H, W) pair in [0, 1] -> (B, T)


class Clips(Protocol):
    """A tensor of clips, a list or a dataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int, /) -> Any: ...


ROWS = {
    "sample": "model, one sample",
    "one_step_mean": "model, mean by one step",
    "sample_mean": "model, mean of samples",
    "copy_nearest": "copy nearest given",
    "linear_blend": "blend given",
}
MAX_STEPS = 50  # DDIM steps unless told otherwise


def to_unit(video: Tensor) -> Tensor:
    """Video in [-1, 1], clamped, to [0, 1], which the metrics take."""
    return (video.float().clamp(-1, 1) + 1) / 2


@torch.no_grad()
def evaluate(
    model: Model,
    codec: Codec,
    schedule: Schedule,
    clips: Clips,
    *,
    task: str,
    prediction: Prediction,
    given: int | None = None,
    window: int | None = None,
    steps: int | str | None = None,
    samples: int = 8,
    seed: int = 0,
    metrics: Mapping[str, Metric] | None = None,
    fvd: FVD | None = None,
    clip: float | None = None,
    sampler_of: SamplerOf | None = None,
    spacing: Spacing = "linspace",
    batch: int = 8,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Sample every clip by DDIM from its given frames and compare with the truth.

    Rows of the result: `sample` (one sample), `one_step_mean` (x0 from one call at pure noise;
    left out for a noise prediction, which does not determine it, and for several windows),
    `sample_mean` (mean of `samples` of them, if more than 1), and the rivals `copy_nearest` and
    `linear_blend`. Frames that are given as a whole do not count; given pixels are the truth in
    every row. The noise of a clip depends on its place and `seed` alone, not on `batch`.

    Args:
        model: in eval mode, on `device`; called as the samplers do.
        codec: on `device`. Where it joins frames, `given` and `window` count latent frames.
        schedule: the chain the model was trained on.
        clips: (N, 3, T, H, W) in [-1, 1], or a sequence (a dataset) of clips (3, T, H, W) or of
            mappings with such a "video".
        task, given: as in `task_known`. "unconditional" needs `fvd` and has the `sample` row alone.
        prediction: "eps", "v" or "x0".
        window: frames that the model makes at once; a longer clip is made as `sample_task` does.
            None: T.
        steps: as in `respace`; None takes 50, or the whole of a shorter chain.
        clip: bound of |x0| while sampling, in latents.
        sampler_of: as in `sample_task`; None is DDIM.
        spacing: of the steps, as in `respace`.
        samples: per clip; 1 leaves `sample_mean` out.
        metrics: name -> function of (video, target) in [0, 1] that returns (B, T); None takes
            PSNR and SSIM.
        fvd: scores the generated frames alone where all clips have the same number of them and it
            is enough, else whole clips with the given frames; "fvd_frames" says which.
        batch: clips at a time.
        progress: called with (model calls done, all) while sampling.
    Returns:
        `{"rows": {row: {metric: mean, "fvd": value}}, "clips": N, "frames": scored ones,
        "task", "given", "sampler", "steps", "samples", "seed", "definitions"}`, ready for JSON.
    Raises:
        ValueError, TypeError: an argument is not as above, or a metric refuses the clips' shape;
            no model was called.
    """
    _check(model, clips, task, samples, batch, fvd)
    paired = task != "unconditional"
    samples = samples if paired else 1
    metrics = ({"psnr": psnr, "ssim": ssim} if metrics is None else metrics) if paired else {}
    chain = respace(
        schedule, min(MAX_STEPS, len(schedule)) if steps is None else steps, spacing=spacing
    )

    first = _video(clips[0])[None].to(device)
    cells = (
        latent_frames(first.shape[2], codec.time_factor, "frames of clips"),
        *(side // codec.factor for side in first.shape[3:]),
    )
    given_cells = [_draw_known(task, cells, given, seed, place) for place in range(len(clips))]
    every = torch.cat(given_cells)  # of latents: (N, t) or (N, t, h, w)
    shown = known_in_video(every, codec.time_factor)  # (N, T) or (N, T, h, w)
    counts = ~(shown if shown.ndim == 2 else shown.all(dim=(2, 3)))  # (N, T), frames that count
    judged = _judged_by_fvd(counts)
    starts = plan_windows(every, window or cells[0], from_end=task == "backward")
    window = min(window or cells[0], cells[0])
    _try(metrics, fvd, to_unit(first), judged[:1])

    groups = range(0, len(clips), batch)
    tick = ticker(progress, len(groups) * samples * len(chain) * len(starts))
    scores: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    features: dict[str, list[Tensor]] = defaultdict(list)
    for group in groups:
        places = range(group, min(group + batch, len(clips)))
        video = torch.stack([_video(clips[place]) for place in places]).to(device)
        target = to_unit(video)
        if fvd is not None:
            features["target"].append(fvd.features(_frames(target, judged[places])))

        latents = codec.encode(video, generators=[generator(seed, "codec", i) for i in places])
        known, seen = every[places].to(device), shown[places].to(device)

        sampler = (
            sampler_of(video, every[places]) if sampler_of else ddim_sampler(model, prediction)
        )
        drawn = [generator(seed, "steps", place) for place in places]
        settings: dict[str, Any] = {"clip": clip, "progress": tick, "generator": drawn}
        noises = (_noise(latents, seed, places, sample) for sample in range(samples))
        made = (_fill(sampler, x, chain, latents, known, starts, window, settings) for x in noises)
        draws = (to_unit(codec.decode(each)) for each in made)
        rows = {"sample": next(draws)}
        if paired:
            if prediction != "eps" and len(starts) == 1:
                x = _noise(latents, seed, places, 0)
                last = respace(schedule, 1)
                mean = sampler(x, last, known=known, clean=latents, generator=drawn)
                rows["one_step_mean"] = to_unit(codec.decode(mean))
            if samples > 1:
                rows["sample_mean"] = sum(draws, rows["sample"]) / samples
            rows["copy_nearest"] = copy_nearest(target, seen)
            rows["linear_blend"] = linear_blend(target, seen)
        for row, output in rows.items():
            output = torch.where(expand_known(seen, video), target, output)
            for name, metric in metrics.items():
                scores[row][name].append(metric(output, target).double().cpu())
            if fvd is not None:
                features[row].append(fvd.features(_frames(output, judged[places])))

    table: dict[str, dict[str, float]] = {row: {} for row in rows}
    for row, by_name in scores.items():
        for name, parts in by_name.items():
            table[row][name] = torch.cat(parts)[counts].mean().item()
    result: dict[str, Any] = {
        "rows": table,
        "clips": len(clips),
        "frames": int(counts.sum()),
        "task": task,
        "given": given,
        "sampler": "ddim",
        "steps": len(chain),
        "windows": len(starts),
        "samples": samples,
        "seed": seed,
        "definitions": {name: _definition(metric) for name, metric in metrics.items()},
    }
    if fvd is not None:
        for row in table:
            value = fvd.score(torch.cat(features["target"]), torch.cat(features[row]))["fvd"]
            table[row]["fvd"] = float(value)
        result["fvd_frames"] = "all" if judged.all() and not counts.all() else "generated"
        which = {"all": "whole clips, given frames included", "generated": "generated frames alone"}
        result["definitions"]["fvd"] = (
            f"{fvd.definition} of {which[result['fvd_frames']]}, N={len(clips)}"
        )
    return result


def format_table(result: Mapping[str, Any]) -> str:
    """The rows of `evaluate` as text, one line each."""
    columns = list(next(iter(result["rows"].values())))
    places = {"psnr": ".2f", "ssim": ".4f", "lpips": ".4f", "fvd": ".1f"}
    lines = [f"{'':24}" + "".join(f"{name.upper():>10}" for name in columns)]
    for row, values in result["rows"].items():
        cells = (format(values[name], places.get(name, ".4g")) for name in columns)
        lines.append(f"{ROWS[row]:24}" + "".join(f"{cell:>10}" for cell in cells))
    lines.append(
        f"{result['task']}: {result['clips']} clips, {result['frames']} frames scored, "
        f"{result['sampler']} {result['steps']} steps, {result['samples']} samples per clip"
    )
    if "fvd" in result["definitions"]:
        lines.append(result["definitions"]["fvd"])
    return "\n".join(lines)


def write_json(result: Mapping[str, Any], path: str | Path) -> None:
    """Write `result` whole or not at all: a temporary file in the same folder, then a rename.

    Raises:
        ValueError: it holds NaN or infinity, which JSON has no words for.
    """
    path = Path(path)
    try:
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(
            f"result must be finite to be written as JSON to {path}: {error}"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check(
    model: Model, clips: Clips, task: str, samples: int, batch: int, fvd: FVD | None
) -> None:
    if getattr(model, "training", False):
        raise ValueError("model must be in eval mode, got one in training mode: call model.eval()")
    for name, value in (("samples", samples), ("batch", batch), ("clips", len(clips))):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if task == "unconditional" and fvd is None:
        raise ValueError("task 'unconditional' has no true continuation: only fvd can score it")
    if fvd is not None and len(clips) < 2:
        raise ValueError(f"clips must be at least 2 for fvd, got {len(clips)}")


def _try(metrics: Mapping[str, Metric], fvd: FVD | None, target: Tensor, judged: Tensor) -> None:
    """Score the truth against itself: what a metric cannot take shows before anything is made."""
    for metric in metrics.values():
        metric(target, target)
    if fvd is not None:
        fvd.features(_frames(target, judged))


def _judged_by_fvd(counts: Tensor) -> Tensor:
    """The frames that count (N, T), if they are equally many in all clips and enough, else all."""
    each = counts.sum(1)
    return counts if each.min() == each.max() >= MIN_FRAMES else torch.ones_like(counts)


def _frames(video: Tensor, chosen: Tensor) -> Tensor:
    """The `chosen` (B, T) frames of (B, C, T, H, W), equally many of every clip."""
    return torch.stack([clip[:, frames] for clip, frames in zip(video, chosen, strict=True)])


def _fill(
    sampler: Sampler,
    noise: Tensor,
    chain: Schedule,
    latents: Tensor,
    known: Tensor,
    starts: Sequence[int],
    window: int,
    settings: Mapping[str, Any],
) -> Tensor:
    """One sample of the whole clip, window by window; each takes its frames of `noise`."""

    def make(clean: Tensor, done: Tensor, start: int) -> Tensor:
        x = noise[:, :, start : start + window]
        return sampler(x, chain, known=done, clean=clean, start=start, **settings)

    return fill_windows(make, latents, known, starts, window)


def _draw_known(
    task: str, cells: tuple[int, ...], given: int | None, seed: int, place: int
) -> Tensor:
    """(1, T) or (1, T, H, W) with something given, where the task gives anything at all."""
    drawn = generator(seed, "known", place)
    for _ in range(1000):  # a draw of one frame in five gives none in 64 % of two-frame clips
        known = task_known(task, *cells, given=given, generator=drawn)
        if known.any() or task == "unconditional":
            return known
    raise ValueError(
        f"clips must have room for a given and a generated frame, got {cells[0]} frames for {task}"
    )


def _noise(latents: Tensor, seed: int, places: Iterable[int], sample: int) -> Tensor:
    """(B, C, T, H, W) noise that belongs to each clip's place and the number of the sample."""
    shape = latents.shape[1:]
    drawn = [torch.randn(shape, generator=generator(seed, "noise", i, sample)) for i in places]
    return torch.stack(drawn).to(latents)


def _video(clip: Any) -> Tensor:
    if isinstance(clip, Mapping):
        if "video" not in clip:
            raise ValueError(f"clips must hold a 'video', got only {', '.join(map(str, clip))}")
        return clip["video"]
    return clip


def _definition(metric: Metric) -> str:
    stated = getattr(metric, "definition", None)
    return stated or (inspect.getdoc(metric) or "").partition("\n")[0]
