"""MarDini: a planner looks over all frames coarsely and once, a generator denoises them finely.

Some frames of a clip are known, the others are to be made. The planner reads the known frames at a
low resolution and says for every frame what belongs there; the generator removes the noise of the
unknown frames at full resolution and reads these planning signals by cross-attention. A known frame
sees only itself in both (identity attention).

Source: Liu et al., "MarDini: Masked Autoregressive Diffusion for Video Generation at Scale",
arXiv:2410.20280. Written from the paper; `mardini_config.py` says what it leaves open.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastvid.models.mardini_config import (
    MARDINI_L_ST,
    MARDINI_L_T,
    MARDINI_S_ST,
    MARDINI_S_T,
    MARDINI_TINY,
    GeneratorConfig,
    MarDiniConfig,
    PlannerConfig,
)
from fastvid.models.mardini_networks import (
    Condition,
    MarDiniGenerator,
    MarDiniPlanner,
    Planning,
    References,
)
from fastvid.modules.hub import HubModel
from fastvid.modules.linear import apply_linear
from fastvid.modules.tokens import drop_ends, to_latents

__all__ = [
    "MARDINI_L_ST",
    "MARDINI_L_T",
    "MARDINI_S_ST",
    "MARDINI_S_T",
    "MARDINI_TINY",
    "GeneratorConfig",
    "MarDini",
    "MarDiniConfig",
    "MarDiniGenerator",
    "MarDiniPlanner",
    "PlannerConfig",
    "Planning",
    "References",
]


class MarDini(HubModel):
    """Predict the velocity of the unknown frames of a clip, for any height and width.

    Training and a single call: `model(latents, timestep, known=known, low=low)`. Sampling plans
    once and reads the plan in every step:

        planning = model.project(model.plan(low, known))
        velocity = model(latents, timestep, known=known, planning=planning)

    On a GPU give `known` on the CPU: where the host knows which frames are given, the last block
    leaves them out.
    """

    config_class = MarDiniConfig
    config: MarDiniConfig
    # Methods that start a forward pass of their own, for what wraps `forward`.
    forward_methods = ("plan", "project", "reconstruct", "references")

    def __init__(self, config: MarDiniConfig):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = 0  # the first so many blocks of both networks are recomputed
        self.planner = MarDiniPlanner(config.planner, config.channels)
        self.generator = MarDiniGenerator(config.generator, config.channels, config.planner.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for the layers, small learned tokens; gates, modulation and the end are zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, Condition):
                nn.init.zeros_(module.fc2.weight)
        for name, value in self.named_parameters():
            if name.split(".")[-1] in ("unknown", "next", "unconditional"):
                nn.init.normal_(value, std=0.02)
        for layer in (self.generator.timestep.fc1, self.generator.timestep.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.generator.final_condition, self.generator.final):
            nn.init.zeros_(layer.weight)

    @property
    def blocks(self) -> list[nn.Module]:
        """Of both networks: what is sharded one by one."""
        return [*self.planner.blocks, *self.generator.blocks]

    def planning_size(self, height: int, width: int) -> tuple[int, int]:
        """Cells of what the planner reads, for latents of so many: the same picture, smaller."""
        config, longer = self.config.planner, max(height, width)
        patches = (round(size * config.side / (longer * config.patch)) for size in (height, width))
        rows, columns = (max(count, 1) * config.patch for count in patches)
        return rows, columns

    def plan(self, low: Tensor, known: Tensor) -> Tensor:
        """What belongs in every frame.

        Args:
            low: (B, C, T, h, w) latents at the planning resolution, `planning_size`. What stands
                in unknown frames is never read.
            known: (B or 1, T) bool, True where given.
        Returns:
            (B, T, tokens, planner width), for known frames too.
        Raises:
            ValueError: a shape is not the one above, T is over the config's, or no frame is known,
                or all are (looked at on the CPU only: elsewhere that would wait for the device).
            TypeError: `low` is not floating-point, or `known` not bool.
        """
        config = self.config.planner
        self._check_clip("low", low, config.patch)
        # A compiled graph would be made anew for a low resolution that lies on its side.
        if not torch.compiler.is_compiling() and max(low.shape[3:]) != config.side:
            raise ValueError(
                f"low must have {config.side} cells on its longer side, as planning_size says, "
                f"got {tuple(low.shape[3:])}"
            )
        _check_known(known, low)
        return self.planner(low, known.to(low.device, non_blocking=True), self.checkpoint_blocks)

    def project(self, signal: Tensor | None, dropped: Tensor | None = None) -> Planning:
        """Keys, values and modulation of a plan, once for all steps.

        Args:
            signal: what `plan` returned. None, no plan: the learned token stands in for it, which
                leaves one row to add in place of the cross-attention.
            dropped: (B,) bool, samples that get the learned token all the same.
        """
        return self.generator.planning(signal, dropped)

    def reconstruct(self, signal: Tensor, height: int | None = None) -> Tensor:
        """Read latents (B, C, T, h, w) off a plan, in the first stage of training.

        Args:
            signal: what `plan` returned.
            height: h; that of a square by default.
        """
        planner, p = self.planner, self.config.planner.patch
        ends = planner.next is not None and planner.config.signal_next
        rows = planner.config.side // p if height is None else height // p
        if signal.shape[2] % rows:
            raise ValueError(f"height must divide the {signal.shape[2]} tokens, got {height}")
        signal = drop_ends(signal, rows) if ends else signal
        return to_latents(apply_linear(planner.head, signal), rows, p)

    def references(self, clean: Tensor, known: Tensor, planning: Planning) -> References:
        """What the known frames are to the others in all steps, with `ref_t="zero"`.

        Args:
            clean: (B, C, T, H, W) latents, read in known frames.
            known: (B or 1, T) bool, as many frames in each sample; read back from its device.
            planning: what `project` returned.
        Raises:
            ValueError: known frames change with the timestep, see the others or are not as many.
        """
        config = self.config.generator
        if config.ref_t != "zero":
            raise ValueError(f'ref_t must be "zero" for references, got {config.ref_t!r}')
        if config.identity == "none":
            raise ValueError('identity must not be "none" for references: known frames see all')
        self._check_clip("clean", clean, config.patch)
        _check_known(known, clean)
        _check_planning(planning, clean)
        return self.generator.references(clean, known, planning)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        known: Tensor,
        planning: Planning | None = None,
        low: Tensor | None = None,
        dropped: Tensor | None = None,
        references: References | None = None,
    ) -> Tensor:
        """One denoising step.

        Args:
            latents: (B, C, T, H, W), known frames already clean.
            timestep: (B,) integers, or (1,) when all samples share it.
            known: (B or 1, T) bool, True where given.
            planning: what `project` returned.
            low: (B, C, T, h, w), to plan in the same call. With neither there is no plan.
            dropped: (B,) bool, samples that do without the plan that `low` gives.
            references: what `references` returned; `planning` and `known` are then part of it,
                and known frames are not computed.
        Returns:
            (B, C, T, H, W) velocities `alpha * noise - sigma * clean`, 0 in known frames. Dtype of
            `latents`.
        Raises:
            ValueError: a shape is not the one above, T is over the config's, or no frame is known,
                or all are (looked at on the CPU only: elsewhere that would wait for the device).
            TypeError: a dtype is not the one above.
        """
        self._check_clip("latents", latents, self.config.generator.patch)
        _check_timestep(timestep, latents)
        _check_known(known, latents)
        if references is not None:
            if references.frames != latents.shape[2]:
                raise ValueError(
                    f"references must be of {latents.shape[2]} frames, got {references.frames}"
                )
            return self.generator.with_references(latents, timestep, references)
        if dropped is not None and low is None:
            raise ValueError("dropped must come with low: a plan that is made is given to project")
        if planning is None:
            signal = None
            if low is not None:
                self._check_low(low, latents)
                _check_dropped(dropped, latents)
                signal = self.plan(low, known)
            planning = self.generator.planning(signal, dropped, project=False)
        _check_planning(planning, latents)
        return self.generator(latents, timestep, known, planning, self.checkpoint_blocks)

    def with_temporal(self, *, frames: int | None = None) -> "MarDini":
        """The same weights, shared, with attention over time instead of clips: ST becomes T."""
        config = replace(self.config, generator=replace(self.config.generator, attention="time"))
        with torch.device("meta"):
            model = MarDini(replace(config, frames=frames or config.frames))
        model.load_state_dict(self.state_dict(), assign=True)
        return model

    def _check_clip(self, name: str, latents: Any, patch: int) -> None:
        config = self.config
        if not isinstance(latents, Tensor) or not latents.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {_kind(latents)}")
        if latents.ndim != 5 or latents.shape[1] != config.channels:
            expected = f"(B, {config.channels}, T, H, W)"
            raise ValueError(f"{name} must be {expected}, got {tuple(latents.shape)}")
        T, *sides = latents.shape[2:]
        if config.frames < T and not config.longer:
            raise ValueError(
                f"{name} must have at most {config.frames} frames, as in training, got {T}; "
                "a config with longer=True takes more"
            )
        if any(side < 1 or side % patch for side in sides):
            raise ValueError(f"H and W of {name} must be multiples of {patch}, got {tuple(sides)}")

    def _check_low(self, low: Tensor, latents: Tensor) -> None:
        self._check_clip("low", low, self.config.planner.patch)
        if torch.compiler.is_compiling():
            return
        size = self.planning_size(*latents.shape[3:])
        if low.shape != (*latents.shape[:3], *size):
            raise ValueError(
                f"low must be {(*latents.shape[:3], *size)}, the planning resolution of these "
                f"latents, got {tuple(low.shape)}"
            )


def _check_known(known: Any, latents: Tensor) -> None:
    B, T = latents.shape[0], latents.shape[2]
    if not isinstance(known, Tensor) or known.dtype != torch.bool:
        raise TypeError(f"known must be bool, True where given, got {_kind(known)}")
    if known.shape not in ((B, T), (1, T)):
        raise ValueError(f"known must be ({B}, {T}) or (1, {T}), got {tuple(known.shape)}")
    if known.device.type == "cpu" and not torch.compiler.is_compiling():
        counts = known.sum(1)
        if (counts == 0).any() or (counts == T).any():
            raise ValueError(
                f"known must have 1 to {T - 1} known frames in each sample, got {counts.tolist()}"
            )


def _check_timestep(timestep: Any, latents: Tensor) -> None:
    whole = isinstance(timestep, Tensor) and not (
        timestep.is_floating_point() or timestep.is_complex() or timestep.dtype == torch.bool
    )
    if not whole:
        raise TypeError(f"timestep must be integers, as a tensor, got {_kind(timestep)}")
    B = latents.shape[0]
    if timestep.shape not in ((B,), (1,)):
        raise ValueError(f"timestep must be ({B},) or (1,), got {tuple(timestep.shape)}")


def _check_dropped(dropped: Any, latents: Tensor) -> None:
    if dropped is None:
        return
    if not isinstance(dropped, Tensor) or dropped.dtype != torch.bool:
        raise TypeError(f"dropped must be bool, got {_kind(dropped)}")
    if dropped.shape != latents.shape[:1]:
        raise ValueError(f"dropped must be ({len(latents)},), got {tuple(dropped.shape)}")


def _check_planning(planning: Planning, latents: Tensor) -> None:
    sizes = latents.shape[0], latents.shape[2]
    if any(
        found not in (1, size) for found, size in zip(planning.frame.shape, sizes, strict=False)
    ):
        raise ValueError(
            f"planning must be of {sizes[0]} samples and {sizes[1]} frames, or 1 of each, "
            f"got {tuple(planning.frame.shape[:2])}"
        )


def _kind(value: Any) -> Any:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__
