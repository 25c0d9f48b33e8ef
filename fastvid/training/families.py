"""What differs between models in training: one module of plain functions per family.

The type of a config decides. A new family brings a config class (`config.py`), a module that keeps
the promises of `Family`, and a line in `family_of`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from fastvid.diffusion.schedule import Schedule
from fastvid.modules.hub import HubModel
from fastvid.training import vdt
from fastvid.training.config import TrainConfig
from fastvid.training.draws import Draws


class Family(Protocol):
    """Latents are `clean` (B, C, T, H, W); a family that plans also sees them as `low`
    (B, C, T, h, w), those of the same clip made smaller."""

    @property
    def MODEL(self) -> type[HubModel]:
        """The class of the model."""

    def build_model(self, config: TrainConfig) -> HubModel:
        """A model with fresh weights, or with those of `run.init`.

        Raises:
            ValueError: there are no such weights, or they belong to another architecture.
        """

    def low_size(self, config: TrainConfig) -> tuple[int, int] | None:
        """Height and width in pixels of the clip that `low` is made of; None: there is no `low`."""

    def losses(
        self,
        model: nn.Module,
        clean: Tensor,
        low: Tensor | None,
        draws: Draws,
        schedule: Schedule,
        config: TrainConfig,
    ) -> Tensor:
        """The loss of every sample, (B,)."""

    def posterior_mean(
        self,
        model: nn.Module,
        clean: Tensor,
        low: Tensor | None,
        draws: Draws,
        schedule: Schedule,
        config: TrainConfig,
    ) -> tuple[Tensor, Tensor]:
        """The mean of what the unknown may be, by one call; and the truth in latents like it."""

    def sample(
        self,
        model: nn.Module,
        clean: Tensor,
        low: Tensor | None,
        draws: Draws,
        schedule: Schedule,
        config: TrainConfig,
    ) -> tuple[Tensor, Tensor]:
        """One sample by DDIM over `schedule`, from the noise of `draws`; and the truth like it."""


def family_of(config: TrainConfig) -> Family:
    """The functions for runs of this kind of config."""
    return {"vdt": vdt}[config.family]
