"""VIDIM-Bench: seven frames between two, scored beside the published tables.

SSIM and LPIPS are of the middle frame; FID and FVD of all seven, FVD with the two given frames,
since I3D needs nine. FVD over so few clips is biased high: only the same number of clips compares.

Source: Jain et al., VIDIM, arXiv:2404.01203 (the protocol, and its tables); Liu et al., MarDini,
arXiv:2410.20280, table 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from fastvid.data.frames import read_image
from fastvid.data.vidim import FRAMES, SIDE
from fastvid.diffusion.process import Prediction
from fastvid.diffusion.schedule import Schedule, Spacing
from fastvid.metrics import FVD, frechet_distance, linear_blend, psnr, ssim
from fastvid.training.codec import Codec, shrink
from fastvid.training.evaluate import Metric, to_unit
from fastvid.training.sample import SamplerOf, sample_task

MIDDLE = FRAMES // 2
KNOWN = torch.tensor([[True, *[False] * (FRAMES - 2), True]])

# SSIM and LPIPS of the middle frame, FID and FVD of all seven.
PUBLISHED: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "davis": {
        "AMT": (0.4853, 0.2865, 34.65, 234.50),
        "RIFE": (0.4546, 0.2954, 23.98, 240.04),
        "FILM": (0.4718, 0.3048, 30.16, 214.80),
        "LDMVFI": (0.4175, 0.2765, 22.10, 245.02),
        "VIDIM": (0.4221, 0.2986, 28.06, 199.32),
        "MarDini-S/ST-256": (0.4249, 0.3654, 49.21, 224.07),
        "MarDini-L/ST-256": (0.4959, 0.2768, 20.64, 102.87),
        "MarDini-S/ST-512": (0.5017, 0.3193, 25.92, 138.86),
        "MarDini-L/ST-512": (0.5314, 0.2736, 20.76, 99.05),
        "MarDini-L/T-512": (0.5085, 0.3083, 25.30, 117.13),
    },
    "ucf101": {
        "AMT": (0.7903, 0.1691, 31.60, 344.50),
        "RIFE": (0.7769, 0.1564, 18.72, 323.80),
        "FILM": (0.7869, 0.1620, 26.06, 328.20),
        "LDMVFI": (0.7712, 0.1564, 18.09, 316.30),
        "VIDIM": (0.6880, 0.1768, 34.48, 278.00),
        "MarDini-S/ST-256": (0.7654, 0.2480, 45.85, 258.08),
        "MarDini-L/ST-256": (0.7734, 0.2213, 28.85, 197.69),
        "MarDini-S/ST-512": (0.7960, 0.2315, 30.24, 205.71),
        "MarDini-L/ST-512": (0.7814, 0.2347, 30.08, 204.20),
        "MarDini-L/T-512": (0.7893, 0.2270, 30.72, 198.94),
    },
}
ROWS = {"model": "this model, one sample", "linear_blend": "blend of the two"}
COLUMNS = ("ssim", "lpips", "fid", "fvd")


@torch.no_grad()
def score_vidim(
    model: Any,
    codec: Codec,
    schedule: Schedule,
    clips: Sequence[Sequence[Path]],
    *,
    size: int = SIDE,
    prediction: Prediction = "v",
    sampler_of: SamplerOf | None = None,
    spacing: Spacing = "linspace",
    steps: int = 25,
    seed: int = 0,
    clip: float | None = None,
    batch: int = 4,
    lpips: Metric | None = None,
    fid: Callable[[Tensor], Tensor] | None = None,
    fvd: FVD | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Generate the seven frames between the first and the last of every clip, and score them.

    Args:
        clips: paths of 9 frames each, see `fastvid.data.vidim.prepared`.
        size: pixels of a side that the model works at. Frames are enlarged to it by cubics; what is
            made is brought back before it is scored.
        prediction, sampler_of, spacing, steps, clip: as in `sample_task`.
        lpips: see `fastvid.metrics.LPIPS`.
        fid: features (N, D) of frames (N, 3, H, W) in [0, 1].
        fvd: made with `min_frames=9`.
    Returns:
        `{"rows": {"model": {"ssim", "psnr", ...}, "linear_blend": ...}, "clips", "steps", "seed",
        "size"}`, ready for JSON. A metric that was not given is left out.
    Raises:
        ValueError: the codec joins frames, so that no seven stand between two.
    """
    if codec.time_factor > 1:
        raise ValueError("VIDIM-Bench needs a codec that codes each frame alone")
    device = next(model.parameters()).device
    metrics: dict[str, Metric] = {"ssim": ssim, "psnr": psnr}
    if lpips is not None:
        metrics["lpips"] = lpips
    sums = {row: dict.fromkeys(metrics, 0.0) for row in ROWS}
    frames: dict[str, list[Tensor]] = {row: [] for row in ("truth", *ROWS)}
    videos: dict[str, list[Tensor]] = {row: [] for row in ("truth", *ROWS)}
    for first in range(0, len(clips), batch):
        numbers = range(first, min(first + batch, len(clips)))
        levels = torch.stack([_read(clips[number]) for number in numbers]).to(device)
        truth = to_unit(levels)
        made, _ = sample_task(
            model,
            codec,
            schedule,
            _resized(levels, size),
            task="interpolate",
            known=KNOWN,
            frames=FRAMES,
            seeds=[seed + number for number in numbers],
            steps=steps,
            spacing=spacing,
            prediction=prediction,
            clip=clip,
            sampler_of=sampler_of,
        )
        made = to_unit(_resized(made.to(device), truth.shape[-1]))
        known = KNOWN.to(device)
        made = torch.where(known[:, None, :, None, None], truth, made)
        rows = {"model": made, "linear_blend": linear_blend(truth, known.expand(len(truth), -1))}
        for row, video in rows.items():
            middle = slice(MIDDLE, MIDDLE + 1)
            for name, metric in metrics.items():
                sums[row][name] += metric(video[:, :, middle], truth[:, :, middle]).sum().item()
        for row, video in ({"truth": truth} | rows).items():
            if fid is not None:
                frames[row].append(fid(rearrange(video[:, :, 1:-1], "b c t h w -> (b t) c h w")))
            if fvd is not None:
                videos[row].append(fvd.features(video))
        if progress:
            progress(numbers[-1] + 1, len(clips))
    table = {
        row: {name: total / len(clips) for name, total in totals.items()}
        for row, totals in sums.items()
    }
    for row in ROWS:
        if fid is not None:
            table[row]["fid"] = _distance(torch.cat(frames["truth"]), torch.cat(frames[row]))
        if fvd is not None:
            score = fvd.score(torch.cat(videos["truth"]), torch.cat(videos[row]))["fvd"]
            table[row]["fvd"] = float(score)
    return {"rows": table, "clips": len(clips), "steps": steps, "seed": seed, "size": size}


def format_vidim(result: Mapping[str, Any], dataset: str) -> str:
    """Our rows above the published ones; a dash where a metric was not asked for."""
    lines = [f"{dataset + '-7':24}" + "".join(f"{name.upper():>10}" for name in COLUMNS)]
    rows = {ROWS[row]: values for row, values in result["rows"].items()}
    for name, published in PUBLISHED[dataset].items():
        rows[f"{name} (published)"] = dict(zip(COLUMNS, published, strict=True))
    for name, values in rows.items():
        cells = (
            format(values[column], ".4f" if column in ("ssim", "lpips") else ".2f")
            if column in values
            else "-"
            for column in COLUMNS
        )
        lines.append(f"{name:24}" + "".join(f"{cell:>10}" for cell in cells))
    lines.append(
        f"{result['clips']} clips, {result['steps']} DDIM steps at {result['size']} pixels; "
        "SSIM and LPIPS of the middle frame, FID and FVD of all seven"
    )
    return "\n".join(lines)


def _read(paths: Sequence[Path]) -> Tensor:
    """(3, 9, H, W) in [-1, 1]."""
    frames = torch.stack([read_image(path) for path in paths], dim=1)
    return frames.float() / 127.5 - 1


def _resized(video: Tensor, size: int) -> Tensor:
    """(B, 3, T, H, W) with square frames of another size: by cubics, and antialiased downwards."""
    if video.shape[-1] == size:
        return video
    return shrink(video, (size, size), mode="bicubic").clamp(-1, 1)


def _distance(real: Tensor, fake: Tensor) -> float:
    real, fake = real.double().cpu(), fake.double().cpu()
    return frechet_distance(real.mean(0), real.T.cov(), fake.mean(0), fake.T.cov())
