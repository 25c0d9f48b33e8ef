"""MarDini in training and sampling; see `families.Family`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastvid.diffusion import mardini
from fastvid.diffusion.process import mix_known
from fastvid.diffusion.schedule import Schedule, Spacing, respace
from fastvid.diffusion.tasks import PARTIAL
from fastvid.functional import masked_mse, noising
from fastvid.models.mardini import MarDini
from fastvid.models.mardini_config import MarDiniConfig
from fastvid.modules.hub import WEIGHTS, load_strictly, read_config, read_weights
from fastvid.training.build import model_folder
from fastvid.training.codec import Codec, shrink
from fastvid.training.config import TrainMarDini
from fastvid.training.draws import Draws
from fastvid.training.sample import Sampler, SamplerOf

MODEL = MarDini
SAMPLER = "ddim"
GUIDANCE = 2.5  # the paper's, where all that is given is one frame; none otherwise


def build_model(config: TrainMarDini) -> MarDini:
    """A model with fresh weights, or with those of `run.init` and `stage.planner`, strictly.

    Lengths and the attention between frames may differ: all weights fit both. What the stage does
    not train is frozen.
    """
    model = MarDini(config.model)
    if config.run.init:
        load_strictly(model, _weights(config.run.init, config.model))
    if config.stage.planner:
        weights = _weights(config.stage.planner, config.model, planner=True)
        load_strictly(model.planner, weights)
    trains = config.stage.trains
    for name, p in model.named_parameters():
        in_planner = name.startswith("planner.")
        # The head that rebuilds frames is of no use once the generator does.
        frozen = in_planner != (trains == "planner") and trains != "both"
        p.requires_grad_(not frozen and (trains == "planner" or ".head." not in name))
    return model


def _weights(source: str, wanted: MarDiniConfig, *, planner: bool = False) -> dict[str, Tensor]:
    """Those in a run or model folder, of a model like `wanted`, or of its planner alone."""
    folder = model_folder(Path(source))
    found = _lasting(read_config(folder / "config.json", MarDiniConfig), planner)
    for name, value in _lasting(wanted, planner).items():
        if found[name] != value:
            raise ValueError(
                f"weights in {source} were trained with {name} {found[name]!r}, the run wants "
                f"{value!r}"
            )
    weights = read_weights(folder / WEIGHTS)
    if not planner:
        return weights
    prefix = "planner."
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def _lasting(config: MarDiniConfig, planner: bool) -> dict[str, Any]:
    """What weights are bound to."""
    values = {"channels": config.channels}
    for part in ("planner",) if planner else ("planner", "generator"):
        values |= {f"{part}.{n}": v for n, v in asdict(getattr(config, part)).items()}
    values.pop("generator.attention", None)  # ST becomes T
    return values


def low_size(model: MarDini, size: tuple[int, int], factor: int) -> tuple[int, int]:
    rows, columns = model.planning_size(*(side // factor for side in size))
    return rows * factor, columns * factor


def losses(
    model: MarDini,
    clean: Tensor,
    low: Tensor,
    draws: Draws,
    schedule: Schedule,
    config: TrainMarDini,
) -> Tensor:
    """Mean square over the unknown frames: of the velocity, or of what the planner rebuilds."""
    known, trains, average = _frames(draws.known), config.stage.trains, config.diffusion.average
    if trains == "planner":
        rebuilt = model.reconstruct(model.plan(low, known), low.shape[3])
        return masked_mse(rebuilt, low, known, average=average)
    alpha, sigma = (
        schedule.gather(table, draws.index, clean).flatten()
        for table in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    )
    noisy, target = noising(clean, alpha, sigma, noise=draws.noise, known=known, target="v")
    plan = {"low": low, "dropped": draws.dropped} if trains == "both" else {}
    velocity = model(noisy, schedule.timesteps(draws.index), known=known, **plan)
    return masked_mse(velocity, target, known, average=average)


def posterior_mean(
    model: MarDini,
    clean: Tensor,
    low: Tensor,
    draws: Draws,
    schedule: Schedule,
    config: TrainMarDini,
) -> tuple[Tensor, Tensor]:
    last = respace(schedule, 1, spacing="trailing")
    return sample(model, clean, low, draws, last, config)


def sample(
    model: MarDini,
    clean: Tensor,
    low: Tensor,
    draws: Draws,
    schedule: Schedule,
    config: TrainMarDini,
) -> tuple[Tensor, Tensor]:
    """A planner alone makes no samples but what it takes for the mean, at its own resolution."""
    known = _frames(draws.known)
    if config.stage.trains == "planner":
        rebuilt = model.reconstruct(model.plan(low, known), low.shape[3])
        return mix_known(rebuilt.to(low.dtype), low, known), low
    guidance = 1.0 if config.stage.trains == "both" else 0.0
    made = mardini.sample(
        _Sharded(model) if isinstance(model, FSDPModule) else model,
        draws.noise,
        schedule,
        known=known,
        clean=clean,
        low=low,
        guidance=guidance,
    )
    return made, clean


class _Sharded:
    """MarDini under FSDP, whose blocks are whole within `forward` only: every step plans anew."""

    def __init__(self, model: MarDini):
        self.model = model

    def plan(self, low: Tensor, known: Tensor) -> Tensor:
        return low

    def project(self, signal: Tensor | None) -> Tensor | None:
        return signal

    def references(self, clean: Tensor, known: Tensor, planning: Tensor) -> None:
        raise NotImplementedError("references are not made of a sharded model")

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        known: Tensor,
        planning: Tensor | None,
        references: None,
    ) -> Tensor:
        return self.model(latents, timestep, known=known, low=planning)


def sampling(model: MarDini, task: str, frames: int, *, one_pass: bool) -> MarDini:
    if task in PARTIAL:
        raise ValueError(f"task must give whole frames, at least one, for mardini, got {task!r}")
    if one_pass and frames > model.config.frames:
        model.config = replace(model.config, longer=True, frames=frames)
    return model


def sampler_of(
    model: MarDini, codec: Codec, config: TrainMarDini, *, guidance: float | None = None
) -> tuple[SamplerOf, Spacing]:
    """The planner reads given frames from the video, those made in earlier windows as decoded.

    A generator that was trained alone samples without a plan.
    """
    if config.stage.trains == "planner":
        raise ValueError("a run of stage.trains = 'planner' makes no samples: train a stage on it")
    if config.stage.trains == "generator" and guidance is None:
        guidance = 0.0
    references = model.config.generator.ref_t == "zero"

    def sampler_for(video: Tensor | None, given: Tensor) -> Sampler:
        given = _frames(given)

        def make(
            noise: Tensor,
            schedule: Schedule,
            *,
            known: Tensor,
            clean: Tensor,
            start: int = 0,
            **settings: Any,
        ) -> Tensor:
            known = _frames(known).cpu()
            T = known.shape[1]
            real = torch.zeros_like(known)
            if video is not None:
                real[:] = given[:, start : start + T].cpu() & known
            drawn = settings.get("generator")  # one for each sample, or None
            low = _low(model, codec, video, start, real, known, clean, drawn)
            scale = guidance
            if scale is None:
                # One step alone is the mean of what may be, which guidance would shift.
                scale = GUIDANCE if len(schedule) > 1 and (known.sum(1) == 1).all() else 1.0
            return mardini.sample(
                model,
                noise,
                schedule,
                known=known,
                clean=clean,
                low=low,
                guidance=scale,
                references=references and bool((known.sum(1) == known[0].sum()).all()),
                **settings,
            )

        return make

    return sampler_for, "trailing"


def _low(
    model: MarDini,
    codec: Codec,
    video: Tensor | None,
    start: int,
    real: Tensor,
    known: Tensor,
    clean: Tensor,
    generators: Sequence[torch.Generator] | None,
) -> Tensor:
    """The known frames of a window at the planning resolution, (B, C, T, h, w).

    Args:
        real, known: (B, T), frames to take from the video, which has them from `start` on, and
            all; the others are decoded from `clean`, no more of them than are wanted.
        generators: of the codec's own draws, one per sample.
    """
    B, C, T, H, W = clean.shape
    size = low_size(model, (H * codec.factor, W * codec.factor), codec.factor)
    low = clean.new_zeros(B, C, T, size[0] // codec.factor, size[1] // codec.factor)
    for wanted, read in (
        (real, lambda t: video[:, :, start + t]),  # type: ignore[index]
        (known & ~real, lambda t: codec.decode(clean[:, :, t]).clamp(-1, 1)),
    ):
        at = wanted.any(0).nonzero().flatten()
        if len(at):
            frames = shrink(read(at.to(clean.device)), size)
            made = codec.encode(frames, generators=generators).to(low)
            there = wanted[:, None, at, None, None].to(low.device)
            low[:, :, at] = torch.where(there, made, low[:, :, at])
    return low


def _frames(known: Tensor) -> Tensor:
    """(B, T) of (B, T) or of (B, T, H, W)."""
    return known if known.ndim == 2 else known.flatten(2).all(2)
