"""Noise schedules: frozen float64 tables, and the ways to make, rescale and shorten a chain.

A chain of S steps is given by `betas`; index 0 is the least noisy step and S - 1 the noisiest.
`timestep_map[index]` is the number the model is told. Everything else is derived from these two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, repeat
from typing import Literal

import torch
from torch import Tensor

Spacing = Literal["linspace", "leading", "trailing"]


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """A diffusion chain of S steps; its tables are float64 on the CPU.

    Args:
        betas: (S,) float64, variance added by each step, in (0, 1]; only the last may be 1.
        timestep_map: (S,) int64, increasing; the timestep the model sees at each index.
    Raises:
        TypeError, ValueError: a table is not as above.
    Source: Ho et al., arXiv:2006.11239; Nichol & Dhariwal, arXiv:2102.09672.
    """

    betas: Tensor
    timestep_map: Tensor

    alphas_cumprod: Tensor = field(init=False)
    """Share of the data's variance left at each index."""
    alphas_cumprod_prev: Tensor = field(init=False)
    """`alphas_cumprod` one step cleaner; 1, clean data, before index 0."""
    sqrt_alphas_cumprod: Tensor = field(init=False)
    """alpha: the factor of the data in `alpha * x0 + sigma * noise`."""
    sqrt_one_minus_alphas_cumprod: Tensor = field(init=False)
    """sigma: the factor of the noise."""
    sqrt_recip_alphas_cumprod: Tensor = field(init=False)
    sqrt_recipm1_alphas_cumprod: Tensor = field(init=False)
    posterior_variance: Tensor = field(init=False)
    """Variance of q(x_{t-1} | x_t, x0); 0 at index 0."""
    posterior_log_variance_clipped: Tensor = field(init=False)
    """Its logarithm, with the -inf of index 0 replaced by the value of index 1."""
    log_betas: Tensor = field(init=False)
    """The upper end of a learned variance, in logarithm."""
    large_log_variance: Tensor = field(init=False)
    """The larger of the two fixed variances: `betas`, index 0 as in the clipped posterior."""
    posterior_mean_coef1: Tensor = field(init=False)
    """Factor of x0 in the mean of q(x_{t-1} | x_t, x0)."""
    posterior_mean_coef2: Tensor = field(init=False)
    """Factor of x_t in the mean of q(x_{t-1} | x_t, x0)."""
    terminal_snr: float = field(init=False)
    """Signal-to-noise ratio of the last step: exactly 0 where it holds nothing but noise."""

    _moved: dict[tuple[str, torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False
    )

    def __post_init__(self) -> None:
        betas, numbers = self.betas, self.timestep_map
        if betas.dtype != torch.float64 or betas.device.type != "cpu" or betas.ndim != 1:
            raise TypeError(
                f"betas must be a float64 CPU vector, got {betas.dtype} of shape "
                f"{tuple(betas.shape)} on {betas.device}"
            )
        if numbers.dtype != torch.int64 or numbers.shape != betas.shape:
            raise TypeError(
                f"timestep_map must be int64 of shape {tuple(betas.shape)}, got {numbers.dtype} "
                f"of shape {tuple(numbers.shape)}"
            )
        if not len(betas):
            raise ValueError("betas must hold at least one step, got none")
        if not ((betas > 0).all() and (betas[:-1] < 1).all() and betas[-1] <= 1):
            low, high = betas.aminmax()
            raise ValueError(
                f"betas must be in (0, 1), the last in (0, 1], got {low:.4g} to {high:.4g}"
            )
        if (numbers.diff() <= 0).any() or numbers[0] < 0:
            raise ValueError("timestep_map must increase from 0 or above")
        # Now, not on first use: the first to ask may be a function that is being compiled.
        for name, table in _derived(betas).items():
            object.__setattr__(self, name, table)

    def __len__(self) -> int:
        return len(self.betas)

    def __repr__(self) -> str:
        ends = f"{self.timestep_map[0]}..{self.timestep_map[-1]}"
        return (
            f"Schedule(steps={len(self)}, timesteps={ends}, terminal_snr={self.terminal_snr:.3g})"
        )

    def __reduce__(self) -> tuple:
        # What moved to a device stays behind: another process may not have that device.
        return Schedule, (self.betas, self.timestep_map)

    def at(self, table: str, index: int) -> float:
        """One entry of a table, as a Python number: no device is asked."""
        if not 0 <= index < len(self):
            raise ValueError(f"index must be in [0, {len(self)}), got {index}")
        return getattr(self, table)[index].item()

    def gather(self, table: str, index: Tensor, like: Tensor) -> Tensor:
        """Entries of a table for a batch, shaped to multiply `like`.

        Args:
            table: the name of one of this schedule's tables.
            index: (B,) or (1,) int64, on the device of `like`.
            like: (B, ...) tensor; float64 keeps float64 entries, any other float type gets float32.
        Returns:
            (B, 1, ...) or (1, 1, ...) with as many axes as `like`, on its device. The table moves
            there once, without waiting for the device.
        Raises:
            TypeError: `index` is of another type or shape.
            ValueError: it lies outside the chain. Looked at on the CPU only: elsewhere that would
                wait for the device.
        """
        if index.dtype != torch.int64 or index.shape not in ((like.shape[0],), (1,)):
            raise TypeError(
                f"index must be int64 of shape ({like.shape[0]},) or (1,), got {index.dtype} of "
                f"shape {tuple(index.shape)}"
            )
        self._expect_inside(index)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = table, like.device, dtype
        if key not in self._moved:
            self._moved[key] = getattr(self, table).to(dtype).to(like.device, non_blocking=True)
        return self._moved[key][index].reshape(-1, *repeat(1, like.ndim - 1))

    def timesteps(self, index: Tensor) -> Tensor:
        """The model's timesteps for `index` int64 (B,), on its device."""
        self._expect_inside(index)
        key = "timestep_map", index.device, torch.int64
        if key not in self._moved:
            self._moved[key] = self.timestep_map.to(index.device, non_blocking=True)
        return self._moved[key][index]

    def _expect_inside(self, index: Tensor) -> None:
        if index.device.type != "cpu" or torch.compiler.is_compiling():
            return
        low, high = (int(end) for end in index.aminmax())
        if low < 0 or high >= len(self):
            raise ValueError(f"index must be in [0, {len(self)}), got {low} to {high}")


def _derived(betas: Tensor) -> dict[str, Tensor | float]:
    """Everything that a chain's betas settle, by the name of its field."""
    left = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), left[:-1]])
    variance = betas * (1 - before) / (1 - left)
    clipped = variance.clone()
    clipped[0] = variance[1] if len(betas) > 1 else betas[0]
    return {
        "alphas_cumprod": left,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": left.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - left).sqrt(),
        "sqrt_recip_alphas_cumprod": (1 / left).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / left - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": clipped.log(),
        "log_betas": betas.log(),
        "large_log_variance": torch.cat([clipped[:1], betas[1:]]).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - left),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - left),
        "terminal_snr": float(left[-1] / (1 - left[-1])),
    }


def _chain(betas: Tensor) -> Schedule:
    return Schedule(betas, torch.arange(len(betas)))


def linear(steps: int = 1000, start: float = 1e-4, end: float = 2e-2) -> Schedule:
    """Betas rising linearly; `start` and `end` hold for 1000 steps and grow as 1000 / steps.

    Raises:
        ValueError: so few steps that a beta reaches 1 (20 with the default ends).
    Source: Ho et al., arXiv:2006.11239; the scaling is Nichol & Dhariwal's, arXiv:2102.09672.
    """
    grow = 1000 / _positive("steps", steps)
    if end * grow >= 1:
        raise ValueError(
            f"steps must be above {1000 * end:g} for end = {end:g}, got {steps}: make a longer "
            "chain and shorten it with respace()"
        )
    return _chain(torch.linspace(start * grow, end * grow, steps, dtype=torch.float64))


def scaled_linear(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Schedule:
    """Betas whose square roots rise linearly, for any number of steps.

    Source: Rombach et al., arXiv:2112.10752 (latent diffusion).
    """
    roots = torch.linspace(start**0.5, end**0.5, _positive("steps", steps), dtype=torch.float64)
    return _chain(roots**2)


def squared_cosine(steps: int = 1000, largest: float = 0.999) -> Schedule:
    """Betas for which `alphas_cumprod` falls as a squared cosine, each at most `largest`.

    Source: Nichol & Dhariwal, arXiv:2102.09672.
    """
    edges = torch.arange(_positive("steps", steps) + 1, dtype=torch.float64) / steps
    left = ((edges + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return _chain((1 - left[1:] / left[:-1]).clamp(max=largest))


def rescale_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The same chain, stretched so that its last step is pure noise and its first unchanged.

    Source: Lin et al., arXiv:2305.08891, algorithm 1.
    """
    if len(schedule) < 2:
        raise ValueError(f"schedule must have at least 2 steps, got {len(schedule)}")
    alpha = schedule.sqrt_alphas_cumprod
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return _from_cumprod(alpha**2, schedule.timestep_map)


def respace(
    schedule: Schedule, steps: int | str | Sequence[int], *, spacing: Spacing = "linspace"
) -> Schedule:
    """Keep some steps of a chain; the noise levels of those that stay do not change.

    Args:
        schedule: S steps.
        steps: how many to keep, as one of
            * `25` or `"25"`: that many, spaced by `spacing`;
            * `[10, 15, 20]` or `"10,15,20"`: the chain is cut in equal sections and each keeps that
              many, its two ends among them; the first number is for the cleanest section;
            * `"ddim50"`: every S/50-th from index 0, by a whole stride.
            One step alone is the last, whatever the form: sampling starts at pure noise.
        spacing: `"linspace"` keeps both ends of the chain; `"leading"` goes up from index 0 by a
            whole stride; `"trailing"` goes down from the last. Zero terminal SNR needs the last
            step, which "leading" and "ddim50" leave out.
    Raises:
        ValueError: more steps than there are, no such whole stride, or a string not as above.
    Source: Nichol & Dhariwal, arXiv:2102.09672 (sections); Song et al., arXiv:2010.02502 (stride);
        Lin et al., arXiv:2305.08891, table 2 (spacings).
    """
    if spacing not in ("linspace", "leading", "trailing"):
        raise ValueError(f"spacing must be linspace, leading or trailing, got {spacing!r}")
    total = len(schedule)
    if isinstance(steps, str) and steps.startswith("ddim"):
        kept = _strided(total, _count(steps.removeprefix("ddim"), steps))
    else:
        if isinstance(steps, str):
            counts = [_count(part, steps) for part in steps.split(",")]
        else:
            counts = [steps] if isinstance(steps, int) else list(steps)
        if not counts:
            raise ValueError("steps must name at least one section, got none")
        for count in counts:
            _positive("steps", count)
        if len(counts) == 1 and spacing != "linspace":
            kept = _spaced(total, counts[0], spacing)
        elif spacing != "linspace":
            raise ValueError(f"spacing must be linspace with sections, got {spacing!r}")
        else:
            kept = _sections(total, counts)
    index = torch.tensor(kept if len(kept) > 1 else [total - 1])
    return _from_cumprod(schedule.alphas_cumprod[index], schedule.timestep_map[index])


def _from_cumprod(alphas_cumprod: Tensor, timestep_map: Tensor) -> Schedule:
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return Schedule(1 - alphas_cumprod / previous, timestep_map)


def _sections(total: int, counts: list[int]) -> list[int]:
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = total // len(counts) + (section < total % len(counts))
        if count > size:
            raise ValueError(f"steps must be at most {size} in section {section}, got {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # A running sum, not a product: where an entry falls halfway between two steps its rounding
        # errors decide, and published chains were cut this way.
        kept += [start + round(at) for at in accumulate(repeat(stride, count - 1), initial=0.0)]
        start += size
    return kept


def _strided(total: int, count: int) -> list[int]:
    stride = -(-total // count)
    if len(range(0, total, stride)) != count:
        raise ValueError(f"steps must divide {total} by a whole stride, got 'ddim{count}'")
    return list(range(0, total, stride))


def _spaced(total: int, count: int, spacing: Spacing) -> list[int]:
    if count > total:
        raise ValueError(f"steps must be at most {total}, got {count}")
    if spacing == "leading":
        return list(range(0, total // count * count, total // count))
    return sorted(round(total - k * total / count) - 1 for k in range(count))


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _count(text: str, whole: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"steps must read like '250', 'ddim50' or '10,15,20', got {whole!r}")
    return _positive("steps", int(text))
