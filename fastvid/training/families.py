"""What differs between models in training: one module of plain functions per family.

The type of a config decides. A new family brings a config class (`config.py`), a module that keeps
the promises of `Family`, and a line in `family_of`.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fastvid.diffusion.schedule import Schedule, Spacing
from fastvid.modules.hub import HubModel
from fastvid.training import mardini, pyramid, vdt
from fastvid.training.codec import Codec
from fastvid.training.config import TrainConfig
from fastvid.training.draws import Draws
from fastvid.training.sample import SamplerOf


class Family(Protocol):
    """Latents are `clean` (B, C, T, H, W); a family that plans also sees them as `low`
    (B, C, T, h, w), those of the same clip made smaller."""

    @property
    def MODEL(self) -> type[HubModel]:
        """The class of the model."""

    @property
    def SAMPLER(self) -> str:
        """What its samples are made by, as scores tell it."""

    def build_model(self, config: Any) -> HubModel:
        """A model with fresh weights, or with those of `run.init`.

        Raises:
            ValueError: there are no such weights, or they belong to another architecture.
        """

    def low_size(self, model: Any, size: tuple[int, int], factor: int) -> tuple[int, int] | None:
        """Height and width of the clip that `low` is made of, where the whole clip has `size`, in
        pixels, `factor` to a latent cell; None: there is no `low`."""

    def losses(
        self,
        model: Any,
        clean: Tensor,
        low: Tensor | None,
        draws: Draws,
        schedule: Schedule,
        config: Any,
    ) -> Tensor:
        """The loss of every sample, (B,)."""

    def posterior_mean(
        self,
        model: Any,
        clean: Tensor,
        low: Tensor | None,
        draws: Draws,
        schedule: Schedule,
        config: Any,
    ) -> tuple[Tensor, Tensor]:
        """The mean of what the unknown may be, by one call; and the truth in latents like it."""

    def sample(
        self,
        model: Any,
        clean: Tensor,
        low: Tensor | None,
        draws: Draws,
        schedule: Schedule,
        config: Any,
    ) -> tuple[Tensor, Tensor]:
        """One sample by DDIM over `schedule`, from the noise of `draws`; and the truth like it."""

    def sampling(self, model: Any, task: str, frames: int, *, one_pass: bool) -> Any:
        """The model made ready to sample clips of `frames`: in one pass, or window by window.

        Raises:
            ValueError: the family does not do this task.
        """

    def sampler_of(
        self, model: Any, codec: Codec, config: Any, *, guidance: float | None = None
    ) -> tuple[SamplerOf | None, Spacing]:
        """What makes windows (see `sample_task`; None is plain DDIM), and how steps are spaced.

        Args:
            guidance: scale of classifier-free guidance; None is the family's own.
        Raises:
            ValueError: the family has no guidance, or the run trained nothing that samples.
        """


def family_of(config: TrainConfig) -> Family:
    """The functions for runs of this kind of config."""
    return {"vdt": vdt, "mardini": mardini, "pyramid": pyramid}[config.family]
