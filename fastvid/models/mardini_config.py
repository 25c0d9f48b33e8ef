"""What a MarDini is made of. What the paper leaves open is a field with its reason below it.

Source: Liu et al., arXiv:2410.20280, table 1.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from fastvid.modules.frame_attention import Identity
from fastvid.modules.hub import expect_types

_MOST_FRAMES = 64  # of attention over time

Hidden = Literal["gelu", "silu", "swiglu"]


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_network(config: "PlannerConfig | GeneratorConfig") -> None:
    expect_types(config)
    for name, limit in (
        ("dim", 8192),
        ("depth", 1024),
        ("mlp", 65536),
        ("heads", 512),
        ("patch", 64),
    ):
        if not 1 <= (value := getattr(config, name)) <= limit:
            raise ValueError(f"{name} must be 1 to {limit}, got {value}")
    width, rest = divmod(config.dim, config.heads)
    if rest or width % 8 or not 16 <= width <= 256:
        raise ValueError(
            f"dim must be heads = {config.heads} times 16, 24, ..., 256, got {config.dim}"
        )
    if config.frame_channels % 2 or not 0 <= config.frame_channels < width:
        raise ValueError(
            f"frame_channels must be even and below {width}, the width of a head, "
            f"got {config.frame_channels}"
        )
    if config.theta <= 1:
        raise ValueError(f"theta must be above 1, got {config.theta}")
    _check_choice("hidden", config.hidden, ("gelu", "silu", "swiglu"))
    _check_choice("identity", config.identity, ("self_token", "self_frame", "bypass", "none"))
    _check_choice("qk_norm", config.qk_norm, ("layer", "rms"))


@dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """The network that looks over all frames at a low resolution."""

    dim: int = 4096
    depth: int = 16
    mlp: int = 8192
    heads: int = 32
    """Not published; 128 channels a head, as Llama has at this width."""
    side: int = 32
    """Latent cells of the longer side of what it reads: 256 pixels whatever the output, the one
    reading that fits the published times."""
    patch: int = 1
    """Cells of a token's side. The paper's tokens are as wide as the codec's 16 channels: one."""
    hidden: Hidden = "gelu"
    """Of the MLP. The parameter counts fit two matrices, or "swiglu" with the 2/3 rule."""
    next_token: bool = True
    """A learned token ends each row, as in the design that the paper cites for its positions."""
    signal_next: bool = False
    """Whether those tokens are part of the signal; not published, their meaning is a line break."""
    identity: Identity = "self_token"
    """What known frames see: the text says identity, so each token itself."""
    qk_norm: Literal["layer", "rms"] = "layer"
    """Over the whole width: the paper says LayerNorm, the design that it cites has it so."""
    theta: float = 10000.0
    """Of the rotary positions; not published, the usual value."""
    frame_channels: int = 0
    """Channels of a head that the frame's index turns; 0: half, the in-frame index the rest."""

    def __post_init__(self):
        _check_network(self)
        if self.side < 1 or self.side % self.patch:
            raise ValueError(f"side must be a positive multiple of patch, got {self.side}")


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The network that removes noise at full resolution."""

    dim: int = 1024
    depth: int = 8
    mlp: int = 4096
    heads: int = 16
    """Not published; 64 channels a head, as DiT has at this width."""
    attention: Literal["time", "clip"] = "time"
    """Between frames: "time" is the paper's T, "clip" its ST. The weights fit both."""
    patch: int = 1
    """As the planner's."""
    hidden: Hidden = "gelu"
    """Of the MLP; DiT's."""
    next_token: bool = False
    """Published for the planner alone; it would add 1.6 % to the tokens at 512 pixels."""
    identity: Identity = "self_token"
    """As the planner's; without it ("none") training does not converge, the paper says."""
    ref_t: Literal["shared", "zero"] = "shared"
    """The timestep of known frames: that of the others, as the paper's one t says, or 0, which
    makes them the same in every step (`MarDini.references`)."""
    cross_scope: Literal["frame", "clip"] = "frame"
    """Whose planning signals a frame reads: its own; reading all would not fit the times."""
    modulated_by_plan: bool = True
    """The MLP's modulation knows the plan, the paper says; how is open: the mean over a frame."""
    qk_norm: Literal["layer", "rms"] = "layer"
    """As the planner's."""
    theta: float = 10000.0
    """As the planner's; indices count cells of this resolution, nothing is rescaled."""
    frame_channels: int = 0
    """As the planner's."""

    def __post_init__(self):
        _check_network(self)
        _check_choice("attention", self.attention, ("time", "clip"))
        _check_choice("ref_t", self.ref_t, ("shared", "zero"))
        _check_choice("cross_scope", self.cross_scope, ("frame", "clip"))


@dataclass(frozen=True, kw_only=True)
class MarDiniConfig:
    """Both networks, and the clips that they are for."""

    channels: int = 16  # of the latents
    frames: int = 17  # of the longest clip in training
    longer: bool = False  # take longer clips too; positions are then extrapolated
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)

    def __post_init__(self):
        for name, kind in (("planner", PlannerConfig), ("generator", GeneratorConfig)):
            value = getattr(self, name)
            if isinstance(value, dict):  # as JSON has it
                object.__setattr__(self, name, kind(**value))
            elif not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}")
        expect_types(self)
        for name in ("channels", "frames"):
            if not 1 <= (value := getattr(self, name)) <= 65536:
                raise ValueError(f"{name} must be 1 to 65536, got {value}")
        if self.generator.attention == "time" and self.frames > _MOST_FRAMES:
            raise ValueError(
                f"frames must be at most {_MOST_FRAMES} with attention over time, got {self.frames}"
            )


_S = PlannerConfig(depth=8, mlp=4096)
_ST = GeneratorConfig(attention="clip")
MARDINI_S_ST = MarDiniConfig(frames=9, planner=_S, generator=_ST)  # 1.35 B + 0.29 B parameters
MARDINI_L_ST = MarDiniConfig(frames=9, generator=_ST)  # 3.23 B + 0.29 B
MARDINI_S_T = MarDiniConfig(planner=_S)
MARDINI_L_T = MarDiniConfig()
MARDINI_TINY = MarDiniConfig(
    planner=PlannerConfig(dim=256, depth=4, mlp=512, heads=8, side=8),
    generator=GeneratorConfig(dim=128, depth=4, mlp=512, heads=4),
)
