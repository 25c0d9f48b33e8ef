"""Sampling of pyramidal flow matching: unit after unit of a video, each through all stages.

Source: Jin et al., arXiv:2410.05954, algorithm 1 and section 3.3.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastvid.functional import guided_step, latent_pyramid, noise_pyramid, noising, pyramid_renoise

from .pyramid import (
    HistoryClip,
    PyramidSchedule,
    StageSteps,
    count_units,
    history_plan,
    stage_steps,
    unit_frames,
)
from .tables import euler_table

Guidance = Callable[[int], float]  # the scale of a unit
Progress = Callable[[int, int], None]  # (calls of the model done, calls in all)


class Text(NamedTuple):
    """Encoded prompts: `embeddings` (B, L, D), of which `lengths` (B,) int are no padding, and
    `pooled` (B, P)."""

    embeddings: Tensor
    lengths: Tensor
    pooled: Tensor


class PyramidModel(Protocol):
    """What the sampler calls: the noisy unit (B, C, t, H, W) and its history in, the velocity out.

    `timestep` is float32 (B,); the clips of `history`, the oldest first, have resolutions of their
    own. With a cache it also takes `prefix` and has `extend`, which takes `keep` too and returns
    the velocity and a new prefix, whose `frames` says how many of the oldest frames it stands for
    and `nbytes` what it costs.
    """

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        history: Sequence[Tensor],
        text: Tensor,
        text_lengths: Tensor,
        pooled: Tensor,
    ) -> Tensor: ...


def constant_guidance(first: float = 7.0, later: float = 5.0) -> Guidance:
    """One scale for unit 0, the image, and one for all that follow."""
    return lambda unit: later if unit else first


def linear_guidance(first: float = 7.0, slope: float = 0.5, least: float = 2.0) -> Guidance:
    """A scale that falls by `slope` per unit, down to `least`."""
    return lambda unit: max(first - slope * unit, least)


@torch.no_grad()
def sample_pyramid(
    model: PyramidModel,
    prompt: Text,
    shape: tuple[int, int, int, int],
    schedule: PyramidSchedule,
    *,
    negative: Text | None = None,
    guidance: Guidance | None = None,
    first_steps: int | Sequence[int] = 20,
    steps: int | Sequence[int] = 10,
    given: Tensor | None = None,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    block_noise: Sequence[Tensor] | None = None,
    frames_per_unit: int = 1,
    patch: int = 2,
    skip_last: bool = False,
    cache_gb: float = 0.0,
    progress: Progress | None = None,
) -> Tensor:
    """Make videos from text, from an image, or from the frames that came before.

    The state is float32; the model sees the dtype of `prompt.embeddings`. Where the guidance of a
    unit is 1, the negative prompt is not computed.

    Args:
        model: returns the velocity of the noisy unit, see `PyramidModel`.
        prompt: of B samples.
        shape: (C, T, H, W) of the latents, H and W divisible by `patch * 2^(stages - 1)`.
        negative: of one sample, for all, or of B; as many tokens as `prompt`. None: no guidance.
        guidance: scale of each unit, see `constant_guidance` (the default) and `linear_guidance`.
        first_steps, steps: Euler steps of every stage, or of each, for unit 0 and for the others.
        given: (B or 1, C, t, H, W) normalised latents of the first t < T frames, whole units: an
            image to start from (t = 1), or a clip to continue.
        seed: an int or int64 of shape () or (1,): sample b draws with `seed + b`; or int64 (B,).
            All noise comes from it, by unit and stage: a sample depends neither on its batch nor
            on how many units follow.
        noise: instead of the seed's: (B, C, T, H, W) standard normal at full resolution.
        block_noise: instead of the seed's: that of every jump, stage by stage, unit by unit,
            (B, C, t, h, w) each.
        frames_per_unit: frames of every unit but the first.
        patch: side of the model's patches in latent cells.
        skip_last: leave out the last step of every stage, see `stage_steps`.
        cache_gb: memory, in 10^9 bytes, for keys and values of the text and the oldest frames,
            which later units use again. 0: none; `math.inf`: all of them. The longest are kept,
            which save the most work per byte; what does not fit is computed again.
        progress: called with (calls of the model done, calls in all) after each.
    Returns:
        (B, C, T, H, W) float32, normalised latents; the given frames as they came.
    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    B, K, seen = len(prompt.embeddings), len(schedule), prompt.embeddings.dtype
    device = prompt.embeddings.device
    units = count_units(shape[1], frames_per_unit)
    branches = _branches(prompt, negative)
    _check_size(shape, patch * 2 ** (K - 1))
    first_plan = _plan(schedule, "first_steps", first_steps, skip_last)
    later_plan = _plan(schedule, "steps", steps, skip_last)
    plans = [later_plan if unit else first_plan for unit in range(units)]
    known = 0 if given is None else _known_units(given, (B, *shape), frames_per_unit)
    _check_noise(noise, block_noise, seed, (B, *shape), (units - known) * (K - 1))
    cache = _Cache(model, cache_gb)
    guidance = guidance or constant_guidance()
    calls = sum(len(stage.timesteps) for plan in plans[known:] for stage in plan)
    done, jumps = 0, iter(block_noise or ())

    # Finished frames at the resolution of every stage.
    C, T, H, W = shape
    shrinks = [2 ** (K - 1 - stage) for stage in range(K)]
    levels = [torch.empty(B, C, T, H // s, W // s, device=device) for s in shrinks]
    video = levels[-1]

    for unit in range(units):
        frames = _slice(unit, frames_per_unit)
        if unit < known and given is not None:
            x = given[:, :, frames].to(video).expand(B, -1, -1, -1, -1)
            _keep(x, levels, frames)
            continue
        if noise is None:
            x = _draw(levels[0][:, :, frames], seed, unit * K)
        else:
            x = noise_pyramid(noise[:, :, frames].float(), K)[0]
        scale = 1.0 if negative is None else guidance(unit)
        texts = branches if scale != 1 else branches[-1:]
        condition = _condition(texts)
        for i, (stage, plan) in enumerate(zip(schedule.stages, plans[unit], strict=True)):
            if i:
                own: dict[str, Any] = {"seed": seed, "stream": unit * K + i}
                if block_noise is not None:
                    own = {"noise": next(jumps)}
                x = pyramid_renoise(x, stage.alpha, stage.beta, gamma=schedule.gamma, **own)
            clips = history_plan(unit, i, frames_per_unit)
            history = [levels[clip.stage][:, :, clip.start : clip.stop] for clip in clips]
            condition["history"] = [_repeat(clip.to(seen), len(texts)) for clip in history]
            kept = 0 if unit == units - 1 else _kept_frames(clips)
            table = euler_table(plan.stage_times).to(device)
            rows = torch.arange(len(table), device=device)
            for j, timestep in enumerate(plan.timesteps.to(device)):
                velocity = cache.call(
                    (i, j, len(texts)),
                    kept,
                    _repeat(x.to(seen), len(texts)),
                    timestep.expand(len(texts) * B),
                    condition,
                )
                x = guided_step(
                    x, velocity, table, rows[j], guidance=(scale,) if len(texts) > 1 else None
                )
                done += 1
                if progress:
                    progress(done, calls)
        _keep(x, levels, frames)
    return video


class _Cache:
    """Prefixes of the steps, by stage, step and number of branches, in a budget of memory.

    A byte of a prefix saves as many linear FLOPs as any other, and the more attention the longer
    the prefix. Those of lower stages hold more frames, so later stages make room, and in a stage
    later steps: always the same ones, or each unit would drop what it needs next.
    """

    def __init__(self, model: PyramidModel, gigabytes: float):
        if gigabytes < 0:
            raise ValueError(f"cache_gb must be at least 0, got {gigabytes}")
        if gigabytes and not hasattr(model, "extend"):
            raise TypeError(
                f"model must have extend where cache_gb is not 0, got {type(model).__name__}"
            )
        self.model: Any = model
        self.budget = gigabytes * 1e9
        self.prefixes: dict[tuple[int, int, int], Any] = {}

    def call(
        self,
        key: tuple[int, int, int],
        kept: int,
        latents: Tensor,
        timestep: Tensor,
        condition: dict[str, Any],
    ) -> Tensor:
        """The model's velocity; `kept` frames stay as they are for later units, 0: none does."""
        if not self.budget:
            return self.model(latents, timestep, **condition)
        prefix = self.prefixes.get(key)
        if not kept:
            return self.model(latents, timestep, prefix=prefix, **condition)
        velocity, longer = self.model.extend(
            latents, timestep, keep=kept, prefix=prefix, **condition
        )
        self._store(key, longer)
        return velocity

    def _store(self, key: tuple[int, int, int], prefix: Any) -> None:
        """Put it in place of its shorter self, unless only those before it could make room."""
        others = {k: p for k, p in self.prefixes.items() if k != key}
        room = self.budget - prefix.nbytes - sum(p.nbytes for p in others.values())
        for later in sorted((k for k in others if k > key), reverse=True):
            if room >= 0:
                break
            room += others.pop(later).nbytes
        if room >= 0:
            self.prefixes = others | {key: prefix}


def _kept_frames(clips: Sequence[HistoryClip]) -> int:
    """How many of the oldest frames of a unit the next one sees as they are."""
    return sum(clip.stop - clip.start for clip in clips if clip.stage == 0)


def _slice(unit: int, frames_per_unit: int) -> slice:
    frames = unit_frames(unit, frames_per_unit)
    return slice(frames.start, frames.stop)


def _keep(latents: Tensor, levels: Sequence[Tensor], frames: slice) -> None:
    for level, part in zip(levels, latent_pyramid(latents, len(levels)), strict=True):
        level[:, :, frames] = part


def _repeat(tensor: Tensor, branches: int) -> Tensor:
    return tensor.repeat(branches, *(1,) * (tensor.dim() - 1)) if branches > 1 else tensor


def _draw(like: Tensor, seed: int | Tensor | None, stream: int) -> Tensor:
    """Noise by number: 0 * x0 + 1 * eps."""
    level = torch.ones(1, device=like.device)
    zeros = torch.zeros_like(like)
    return noising(zeros, 1 - level, level, seed=seed, stream=stream, target="x0")[0]


def _condition(texts: Sequence[Text]) -> dict[str, Any]:
    """The branches of guidance as one batch, the negative prompts first."""
    joined = Text(*(torch.cat(parts) for parts in zip(*texts, strict=True)))
    return {
        "text": joined.embeddings,
        "text_lengths": joined.lengths,
        "pooled": joined.pooled,
    }


def _plan(
    schedule: PyramidSchedule, name: str, steps: int | Sequence[int], skip_last: bool
) -> list[StageSteps]:
    """The steps of every stage."""
    counts = [steps] * len(schedule) if isinstance(steps, int) else list(steps)
    if len(counts) != len(schedule) or min(counts) < 1:
        raise ValueError(
            f"{name} must be at least 1, one number or one for each of the {len(schedule)} stages,"
            f" got {steps}"
        )
    return [
        stage_steps(schedule, stage, count, skip_last=skip_last)
        for stage, count in enumerate(counts)
    ]


def _branches(prompt: Text, negative: Text | None) -> list[Text]:
    """Checked texts of B samples each: the negative ones, if any, and the prompts."""
    B = len(prompt.embeddings)
    _check_text("prompt", prompt, prompt)
    if negative is None:
        return [prompt]
    _check_text("negative", negative, prompt)
    if len(negative.embeddings) not in (1, B):
        raise ValueError(
            f"negative must be of 1 sample or of {B} like prompt, got {len(negative.embeddings)}"
        )
    return [Text(*(part.expand(B, *part.shape[1:]) for part in negative)), prompt]


def _check_text(name: str, text: Text, prompt: Text) -> None:
    """Sizes agree within the text, and with those of the prompt but for the batch."""
    B = len(text.embeddings)
    wanted = {
        "embeddings": (B, *prompt.embeddings.shape[1:]),
        "lengths": (B,),
        "pooled": (B, *prompt.pooled.shape[1:]),
    }
    ranks = {"embeddings": 3, "lengths": 1, "pooled": 2}
    for part, shape in wanted.items():
        tensor = getattr(text, part)
        if tensor.shape != shape or tensor.dim() != ranks[part]:
            raise ValueError(
                f"{name}.{part} must have {ranks[part]} axes, {shape}, got {tuple(tensor.shape)}"
            )
    if (
        not prompt.embeddings.is_floating_point()
        or text.embeddings.dtype != prompt.embeddings.dtype
    ):
        raise TypeError(
            f"{name}.embeddings must be floats of the dtype of prompt, {prompt.embeddings.dtype},"
            f" got {text.embeddings.dtype}"
        )


def _check_size(shape: Sequence[int], divisor: int) -> None:
    _, _, H, W = shape
    if H < 1 or W < 1 or H % divisor or W % divisor:
        raise ValueError(
            f"shape must have H and W divisible by {divisor}, so that the lowest stage has whole"
            f" patches, got H={H} W={W}"
        )


def _known_units(given: Tensor, shape: tuple[int, ...], frames_per_unit: int) -> int:
    """How many units `given` holds."""
    B, C, T, H, W = shape
    frames = given.shape[2] if given.dim() == 5 else 0
    if given.dim() != 5 or given.shape not in ((B, C, frames, H, W), (1, C, frames, H, W)):
        raise ValueError(
            f"given must be (B or 1, C, t, H, W), B={B} C={C} H={H} W={W}, got {tuple(given.shape)}"
        )
    if not 1 <= frames < T or (frames - 1) % frames_per_unit:
        raise ValueError(
            f"given must hold whole units, fewer frames than T={T}, got {frames} frames at"
            f" frames_per_unit={frames_per_unit}"
        )
    return count_units(frames, frames_per_unit)


def _check_noise(
    noise: Tensor | None,
    block_noise: Sequence[Tensor] | None,
    seed: int | Tensor | None,
    shape: tuple[int, ...],
    jumps: int,
) -> None:
    if seed is None and (noise is None or block_noise is None):
        raise ValueError("seed must be given, unless noise and block_noise are, got None")
    if seed is not None and noise is not None and block_noise is not None:
        raise ValueError(
            "seed must be None where noise and block_noise are given: nothing is drawn"
        )
    if noise is not None and noise.shape != shape:
        raise ValueError(f"noise must be {shape}, got {tuple(noise.shape)}")
    if block_noise is not None and len(block_noise) != jumps:
        raise ValueError(f"block_noise must be that of {jumps} jumps, got {len(block_noise)}")
