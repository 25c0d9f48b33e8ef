"""Everything that decides a training run, as frozen dataclasses that YAML and a shell can set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastvid.data.atomic import whole
from fastvid.diffusion.tasks import PARTIAL, TASKS
from fastvid.models.autoencoder import FACTOR
from fastvid.models.mardini_config import MarDiniConfig
from fastvid.models.pyramid_flow import PyramidFluxConfig
from fastvid.models.vdt import VDTConfig
from fastvid.training.timeline import latent_frames
from fastvid.training.typed import expect_types, from_mapping, positive


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where clips come from and how they are cut."""

    kind: Literal["clips", "frames", "cityscapes", "latents"] = "clips"
    """Video files, folders of frames, Cityscapes sequences, or what `fastvid encode` wrote."""
    train: str = ""
    """Folder to train on."""
    validation: str = ""
    """Folder to validate on; empty takes a share of the training files away."""
    validation_share: float = 0.1
    """That share, by file or folder of frames: its clips never stand on both sides."""
    split_seed: int = 0
    """Which files that share takes; run.seed has no say in it."""
    frames: int = 16
    """Frames per clip; 1 + 8 n with codec.kind causal-video."""
    size: tuple[int, int] = (128, 128)
    """Height and width in pixels."""
    stride: int = 1
    """Take every `stride`-th frame of a file."""
    fit: Literal["crop", "letterbox"] = "crop"
    """How a file of another aspect ratio meets size."""
    hflip: bool = False
    """Mirror half of the training clips."""
    cache: bool = False
    """Decode every file once and keep it in memory; for small sets."""
    workers: int = 0
    """Processes that read clips, per trainer; 0 reads in the trainer itself."""

    def __post_init__(self):
        expect_types(self, "data")
        positive(self, "data", "frames", "stride")
        if min(self.size) < 1:
            raise ValueError(f"data.size must be (height, width) in pixels, got {self.size}")
        if not 0 <= self.validation_share < 1:
            raise ValueError(
                f"data.validation_share must be in [0, 1), got {self.validation_share}"
            )
        if self.workers < 0:
            raise ValueError(f"data.workers must not be negative, got {self.workers}")


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """How video becomes latents."""

    kind: Literal["pixel", "diffusers", "causal-video"] = "pixel"
    """Space-to-depth without weights, or an autoencoder from a local folder: an AutoencoderKL, a
    frame at a time, or a CausalVideoVAE, 8 frames to a latent frame."""
    factor: int = 4
    """pixel: pixels per latent cell along height and width."""
    path: str = ""
    """diffusers, causal-video: the autoencoder's folder."""
    scale: float = 0.18215
    """diffusers: latents = (posterior - shift) * scale."""
    shift: float = 0.0
    """diffusers: see scale."""
    chunk: int = 16
    """diffusers, causal-video: frames per call of the autoencoder. causal-video takes a multiple
    of 8, or 0 for as many as memory has room for."""
    posterior: Literal["sample", "mode"] = "sample"
    """diffusers, causal-video: draw latents from the posterior or take its mean."""
    statistics: Literal["miniflux", "sd3", "none"] = "miniflux"
    """causal-video: whose mean and spread of image and video latents normalise them."""
    tile: int = 0
    """causal-video: side in pixels of tiles that are coded one by one; 0 codes whole frames."""

    def __post_init__(self):
        expect_types(self, "codec")
        positive(self, "codec", "factor")
        if self.kind != "pixel" and not self.path:
            raise ValueError(f"codec.path must name a local folder for {self.kind}")
        for name in ("chunk", "tile"):
            if getattr(self, name) < 0:
                raise ValueError(f"codec.{name} must not be negative, got {getattr(self, name)}")

    @property
    def time_factor(self) -> int:
        """Frames per latent frame after the first."""
        return FACTOR if self.kind == "causal-video" else 1


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """What the model learns to undo."""

    schedule: Literal["linear", "scaled_linear", "squared_cosine"] = "linear"
    """Noise schedule."""
    steps: int = 1000
    """Length of the schedule."""
    zero_snr: bool = False
    """Rescale so that the last step is pure noise; eps prediction cannot use it."""
    respacing: str = ""
    """Train on a respaced chain, for example "500" or "ddim50"; empty keeps every step."""
    prediction: Literal["eps", "v", "x0"] = "eps"
    """What the model's first C channels are."""
    average: Literal["unknown", "all"] = "unknown"
    """Divide the loss by the cells to generate, or by all cells as published VDT models did."""
    variational: float = 1.0
    """Factor of the variational term, where the model learns its variance."""
    tasks: dict[str, float] = field(
        default_factory=lambda: {"predict": 1.0, "interpolate": 1.0, "unconditional": 1.0}
    )
    """Training mix: task name to weight. Each clip draws its own task. "predict" alone, with
    average "unknown", is the same as training on given frames put before the noisy ones."""
    given: dict[str, int] = field(default_factory=dict)
    """Number of given frames by task name, where it is not the task's own; of latent frames where
    the codec joins frames."""
    ref_ratio: tuple[float, float] = (0.0, 0.0)
    """Share of frames that "arbitrary-interpolation" gives, drawn evenly from this interval for
    each clip; at least one is given and one is not. (0, 0) gives each frame one time in five."""
    drop: float = 0.0
    """Share of training clips whose condition is left out, for guidance; VDT has none."""

    def __post_init__(self):
        expect_types(self, "diffusion")
        positive(self, "diffusion", "steps")
        if self.zero_snr and self.prediction == "eps":
            raise ValueError("diffusion.zero_snr needs prediction 'v' or 'x0', got 'eps'")
        if unknown := sorted((set(self.tasks) | set(self.given)) - set(TASKS)):
            raise ValueError(f"diffusion.tasks and given know {sorted(TASKS)}, got {unknown}")
        if not 0 <= self.ref_ratio[0] <= self.ref_ratio[1] <= 1:
            raise ValueError(
                f"diffusion.ref_ratio must rise and lie in [0, 1], got {self.ref_ratio}"
            )
        if not 0 <= self.drop < 1:
            raise ValueError(f"diffusion.drop must be in [0, 1), got {self.drop}")
        if min(self.tasks.values(), default=0) < 0 or not sum(self.tasks.values()) > 0:
            raise ValueError(f"diffusion.tasks must weigh at least one task, got {self.tasks}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its learning rate over the run, and the batch."""

    batch: int = 16
    """Clips per optimiser step, over all processes: the run is the same on any number of them."""
    accumulate: int = 1
    """Parts a process cuts its share of the batch into, one after another; saves memory."""
    lr: float = 1e-4
    """Highest learning rate."""
    lr_end: float = 0.0
    """Learning rate that the cosine ends at; equal to lr keeps it constant."""
    warmup: int = 0
    """Steps of linear rise to lr."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    weight_decay: float = 0.0
    """AdamW's; on matrices only, not on biases and norms."""
    clip: float = 1.0
    """Largest gradient norm; larger ones are scaled down to it. 0 clips nothing."""
    skip_loss: float = 0.0
    """Updates are left out where the loss of their batch is this or more. 0 leaves none out."""
    ema: float = 0.9999
    """Decay of the averaged weights, ramped up as (1 + step) / (10 + step). 0 keeps none."""

    def __post_init__(self):
        expect_types(self, "optim")
        positive(self, "optim", "batch", "accumulate", "lr", "eps")
        if not 0 <= self.lr_end <= self.lr:
            raise ValueError(f"optim.lr_end must be in [0, lr = {self.lr}], got {self.lr_end}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"optim.ema must be in [0, 1), got {self.ema}")
        for name in ("warmup", "clip", "weight_decay", "skip_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} must not be negative, got {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise ValueError(
                f"optim.batch must be a multiple of accumulate = {self.accumulate}, "
                f"got {self.batch}"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives, how long it takes and what it does on the way. An interval of 0 is off."""

    folder: str = "runs/vdt"
    """Everything the run writes."""
    steps: int = 100_000
    """Optimiser steps in all, those before a resume included."""
    seed: int = 0
    """Decides first weights, order of clips, noise, timesteps and tasks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes under autocast; weights, optimiser and EMA stay in fp32."""
    compile: bool = False
    """torch.compile the model: for long runs on GPUs, on a CPU compiling takes minutes."""
    checkpoint_blocks: int = 0
    """The first so many blocks are recomputed in the backward pass instead of remembered."""
    init: str = ""
    """First weights: a run or model folder, or an official VDT checkpoint file."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    validate_every: int = 1000
    """Steps between validations; the best one's checkpoint is kept."""
    validation_clips: int = 64
    """Clips in a validation, always the same ones with the same noise."""
    sample_every: int = 5000
    """Steps between contact sheets of samples."""
    save_every: int = 1000
    """Steps between checkpoints; the last step always saves."""
    keep: int = 2
    """Newest checkpoints to keep, beside the best."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A NaN or infinite loss or gradient: end the run, or leave out that update."""
    skip_limit: int = 5
    """Updates in a row that "skip" may leave out before the run ends after all."""

    def __post_init__(self):
        expect_types(self, "run")
        positive(self, "run", "steps", "log_every", "keep", "validation_clips", "skip_limit")
        for name in ("validate_every", "sample_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"run.{name} must not be negative, got {getattr(self, name)}")
        if not self.folder:
            raise ValueError("run.folder must name a folder")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a run of any family has. `fastvid train` starts from a recipe's and overrides values."""

    family: str
    model: Any
    data: DataConfig = field(default_factory=DataConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    diffusion: Any = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        frames = self.latent_frames
        if frames > getattr(self.model, "frames", frames):
            latent = " latent frames" if frames != self.data.frames else ""
            raise ValueError(
                f"data.frames must be at most model.frames = {self.model.frames}{latent}, "
                f"got {frames}"
            )
        if self.codec.kind == "pixel":
            self.check_latents(3 * self.codec.factor**2, self.codec.factor)

    @property
    def latent_frames(self) -> int:
        """Of a clip; refused with a ValueError where the codec makes no whole number of them."""
        return latent_frames(self.data.frames, self.codec.time_factor, "data.frames")

    def check_latents(self, channels: int, factor: int) -> None:
        """Refuse a model that does not fit latents of `channels`, at `factor` pixels per cell."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TrainVDT(TrainConfig):
    """A whole run of VDT."""

    family: Literal["vdt"] = "vdt"
    """The kind of model."""
    model: VDTConfig = field(default_factory=VDTConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    def check_latents(self, channels: int, factor: int) -> None:
        made = (channels, *(side / factor for side in self.data.size))
        model = self.model
        if made != (model.channels, model.height, model.width):
            raise ValueError(
                f"model.channels, height and width must be what the codec makes of data.size = "
                f"{self.data.size}: {', '.join(f'{n:g}' for n in made)}, "
                f"got {model.channels}, {model.height}, {model.width}"
            )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What a stage of MarDini's training teaches."""

    trains: Literal["both", "planner", "generator"] = "both"
    """planner: alone, by rebuilding the unknown frames at its own resolution. generator: alone, the
    learned token in place of a plan. both: end to end, by the generator's loss."""
    planner: str = ""
    """First weights of the planner, where not those of run.init: a run or model folder."""

    def __post_init__(self):
        expect_types(self, "stage")


@dataclass(frozen=True, kw_only=True)
class TrainMarDini(TrainConfig):
    """A whole run of MarDini: one stage of its training."""

    family: Literal["mardini"] = "mardini"
    """The kind of model."""
    model: MarDiniConfig = field(default_factory=MarDiniConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    stage: StageConfig = field(default_factory=StageConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.data.kind == "latents":
            raise ValueError(
                "data.kind must be clips or frames for mardini, got 'latents': the planner needs "
                "the same clips made smaller, which `fastvid encode` does not keep"
            )
        if self.codec.time_factor > 1:
            raise ValueError(
                "codec.kind must be pixel or diffusers for mardini, which plans frame by frame, "
                f"got {self.codec.kind!r}"
            )
        if self.data.frames < 2:
            raise ValueError(f"data.frames must be at least 2, got {self.data.frames}")
        if self.diffusion.prediction != "v":
            raise ValueError(
                f"diffusion.prediction must be 'v' for mardini, got {self.diffusion.prediction!r}"
            )
        drawn = {name for name, weight in self.diffusion.tasks.items() if weight > 0}
        if refused := sorted(drawn & PARTIAL):
            raise ValueError(
                f"diffusion.tasks must give whole frames, at least one, for mardini, got {refused}"
            )
        if not self.diffusion.ref_ratio[1] and "arbitrary-interpolation" in drawn:
            raise ValueError(
                "diffusion.ref_ratio must be given for mardini: without it "
                "'arbitrary-interpolation' may give no frame at all"
            )

    def check_latents(self, channels: int, factor: int) -> None:
        model, sides = self.model, tuple(side / factor for side in self.data.size)
        if channels != model.channels:
            raise ValueError(f"model.channels must be the codec's {channels}, got {model.channels}")
        patch = model.generator.patch
        if any(side % patch for side in sides):
            raise ValueError(
                f"data.size must be whole tokens of {factor * patch} pixels, got {self.data.size}"
            )
        if model.planner.side > max(sides):
            raise ValueError(
                f"model.planner.side must be at most the {max(sides):g} cells of data.size, "
                f"got {model.planner.side}"
            )


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """Flow through stages of rising resolution, each frame from the coarser the older ones."""

    sample_ratios: tuple[int, ...] = (1, 2, 1)
    """Shares of a batch that train each stage, lowest resolution first; as many as stages."""
    sync_group: int = 1
    """How many frames of the clip a stage learns to predict in one step; the steps go through all.
    Fewer make larger batches of a kind, and faster steps."""
    shift: float = 1.0
    """Of the noise levels, towards noise where it is above 1."""
    gamma: float = 1 / 3
    """The noise of a jump between stages has correlation -gamma in each block of 2 x 2 cells."""
    steps: int = 1000
    """Points of a stage's time that training draws from."""
    corrupt: float = 1 / 3
    """The most noise on the frames before, in training; drawn evenly from 0 on for each clip."""
    context: int = 1
    """First frames that validation, contact sheets and `--task predict` start from; 0: nothing."""

    def __post_init__(self):
        expect_types(self, "diffusion")
        positive(self, "diffusion", "sync_group", "shift", "steps")
        if not self.sample_ratios or min(self.sample_ratios) < 1:
            raise ValueError(
                f"diffusion.sample_ratios must give each stage a share, got {self.sample_ratios}"
            )
        if not 0 < self.gamma <= 1 / 3:
            raise ValueError(f"diffusion.gamma must be in (0, 1/3], got {self.gamma}")
        if not 0 <= self.corrupt <= 1:
            raise ValueError(f"diffusion.corrupt must be in [0, 1], got {self.corrupt}")
        if self.context < 0:
            raise ValueError(f"diffusion.context must not be negative, got {self.context}")
        if self.steps < (stages := len(self.sample_ratios)):
            raise ValueError(f"diffusion.steps must be at least the {stages} stages")

    # What other families choose: this one always predicts a velocity and leaves no condition out.
    prediction = property(lambda self: "v")
    ref_ratio = property(lambda self: (0.0, 0.0))
    drop = property(lambda self: 0.0)

    @property
    def tasks(self) -> dict[str, float]:
        return {"predict" if self.context else "unconditional": 1.0}

    @property
    def given(self) -> dict[str, int]:
        return {"predict": self.context} if self.context else {}


@dataclass(frozen=True, kw_only=True)
class TrainPyramid(TrainConfig):
    """A whole run of Pyramid Flow, by miniFLUX and without text."""

    family: Literal["pyramid"] = "pyramid"
    """The kind of model."""
    model: PyramidFluxConfig = field(default_factory=PyramidFluxConfig)
    diffusion: PyramidConfig = field(default_factory=PyramidConfig)

    def __post_init__(self):
        super().__post_init__()
        columns, group = sum(self.diffusion.sample_ratios), self.diffusion.sync_group
        if self.optim.batch % (columns * group):
            raise ValueError(
                f"optim.batch must be a multiple of the {columns} columns of "
                f"diffusion.sample_ratios x sync_group = {group}, got {self.optim.batch}"
            )
        if self.diffusion.context >= self.latent_frames:
            raise ValueError(
                f"diffusion.context must leave one of {self.latent_frames} latent frames to make, "
                f"got {self.diffusion.context}"
            )

    def check_latents(self, channels: int, factor: int) -> None:
        if channels != self.model.channels:
            raise ValueError(
                f"model.channels must be the codec's {channels}, got {self.model.channels}"
            )
        patch = factor * self.model.patch * 2 ** (len(self.diffusion.sample_ratios) - 1)
        if any(side % patch for side in self.data.size):
            raise ValueError(
                f"data.size must be multiples of {patch} pixels, whole patches at the lowest "
                f"stage, got {self.data.size}"
            )


_FAMILIES = (TrainVDT, TrainMarDini, TrainPyramid)
FAMILIES: dict[str, type[TrainConfig]] = {kind.family: kind for kind in _FAMILIES}


def write_config(config: TrainConfig, path: Path) -> None:
    """Write every value as YAML. `read_config` and `fastvid train --config` read it back.

    The file is replaced whole, and not touched where it says the same already.
    """
    import yaml  # type: ignore[import-untyped]

    text = yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def read_config(path: Path) -> TrainConfig:
    """The config in a YAML file.

    Raises:
        ValueError: a key is unknown or a value refused; the message names the file.
    """
    import yaml

    try:
        return config_from(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


def config_from(values: Mapping[str, Any]) -> TrainConfig:
    """The config in nested mappings; what they leave out keeps its default, `family` is "vdt".

    Raises:
        ValueError: a key is unknown, named with its path, or a value is refused.
    """
    family = values.get("family", "vdt") if isinstance(values, Mapping) else "vdt"
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    return from_mapping(FAMILIES[family], values)


def config_hash(config: TrainConfig) -> str:
    """16 hex digits that change when any value does."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:16]
