"""The weights of Pyramid Flow's networks under the official names: read for sizes, laid out."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from fastvid.modules.hub import read_json

_TABLE = "pos_embed.pos_embed"  # of the MMDiT: sinusoids, which we compute
_ENDS = {  # ours: official
    "context": "context_embedder",
    "timestep.fc1": "time_text_embed.timestep_embedder.linear_1",
    "timestep.fc2": "time_text_embed.timestep_embedder.linear_2",
    "pooled.0": "time_text_embed.text_embedder.linear_1",
    "pooled.2": "time_text_embed.text_embedder.linear_2",
    "final": "proj_out",
}
_JOINT = {
    "video.modulation": "norm1.linear",
    "video.proj": "attn.to_out.0",
    "video.mlp.fc1": "ff.net.0.proj",
    "video.mlp.fc2": "ff.net.2",
    "text.modulation": "norm1_context.linear",
    "text.proj": "attn.to_add_out",
    "text.mlp.fc1": "ff_context.net.0.proj",
    "text.mlp.fc2": "ff_context.net.2",
}
_PLAIN = ("to_{}", "norm_{}")  # linear layers of q, k, v, and norms of q, k
_SINGLE = {"modulation": "norm.linear", "fc": "proj_mlp", "proj": "proj_out"}
_VARIANTS = {  # what only one of the two has, the prefix of its text norms, its patches
    "PyramidFlux": ("x_embedder.weight", "added", "x_embedder"),
    "PyramidMMDiT": ("pos_embed.proj.weight", "add", "pos_embed.proj"),
}
_AXES = {  # of the tensors that tell the sizes
    "context_embedder.weight": 2,
    "proj_out.weight": 2,
    "time_text_embed.text_embedder.linear_1.weight": 2,
    "transformer_blocks.0.attn.norm_q.weight": 1,
}


Rule = Literal["joined", "halves swapped", "channels last"]


class Parts(NamedTuple):
    """The official tensors that make up one of ours, and how."""

    names: tuple[str, ...]
    shape: tuple[int, ...]  # of each
    rule: Rule = "joined"

    def to_own(self, state: Mapping[str, Tensor]) -> Tensor:
        values = [state[name] for name in self.names]
        if self.rule == "channels last":
            return rearrange(values[0], "d c p q -> d (p q c)").contiguous()
        if self.rule == "halves swapped":
            return torch.cat(values[0].chunk(2)[::-1])
        return values[0] if len(values) == 1 else torch.cat(values)

    def to_official(self, own: Tensor) -> dict[str, Tensor]:
        values = own.chunk(len(self.names))
        if self.rule == "channels last":
            p, q = self.shape[2:]
            values = (rearrange(own, "d (p q c) -> d c p q", p=p, q=q),)
        elif self.rule == "halves swapped":
            values = (torch.cat(own.chunk(2)[::-1]),)
        return {k: v.clone().contiguous() for k, v in zip(self.names, values, strict=True)}


def layout(variant: str, config: Any, own: Mapping[str, torch.Size]) -> dict[str, Parts]:
    """For each tensor of ours, of shapes `own`, what it is made of."""
    _, added, patches = _VARIANTS[variant]
    modules: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _ENDS.items()}
    modules |= {"modulation": ("norm_out.linear",), "patch": (patches,)}
    swapped = {"modulation"}
    norms: dict[str, str] = {}
    for index in range(config.joint_blocks + getattr(config, "single_blocks", 0)):
        here, single = f"blocks.{index}.", index - config.joint_blocks
        if single < 0:
            there, names = f"transformer_blocks.{index}.", _JOINT
            sides = {"video.": _PLAIN, "text.": ("add_{}_proj", f"norm_{added}_{{}}")}
        else:
            there, names = f"single_transformer_blocks.{single}.", _SINGLE
            sides = {"": _PLAIN}
        modules |= {here + ours: (there + theirs,) for ours, theirs in names.items()}
        for side, (linear, norm) in sides.items():
            qkv = (f"{there}attn.{linear.format(letter)}" for letter in "qkv")
            modules[f"{here}{side}qkv"] = tuple(qkv)
            norms |= {
                f"{here}{side}{letter}_norm": f"{there}attn.{norm.format(letter)}.weight"
                for letter in "qk"
            }
    if variant == "PyramidMMDiT":  # whose last text norm is like the one before the output
        swapped.add(f"blocks.{config.joint_blocks - 1}.text.modulation")
    found = {}
    for name, size in own.items():
        if name in norms:
            found[name] = Parts((norms[name],), tuple(size))
            continue
        module, _, kind = name.rpartition(".")
        shape = (size[0] // len(modules[module]), *size[1:])
        rule: Rule = "halves swapped" if module in swapped else "joined"
        if variant == "PyramidMMDiT" and name == "patch.weight":
            shape, rule = (size[0], config.channels, *[config.patch] * 2), "channels last"
        found[name] = Parts(tuple(f"{part}.{kind}" for part in modules[module]), shape, rule)
    return found


def shapes_of(parts: Mapping[str, Parts], variant: str, config: Any) -> dict[str, tuple[int, ...]]:
    """The official names and shapes of a whole state dict."""
    shapes = {name: part.shape for part in parts.values() for name in part.names}
    if variant == "PyramidMMDiT":
        shapes[_TABLE] = (1, config.positions**2, config.dim)
    return shapes


def check_table(state: Mapping[str, Tensor], table: Tensor) -> None:
    """ValueError unless the position table of the weights is `table` (H, W, D), up to rounding."""
    found = state[_TABLE].float()
    if (found - table.flatten(0, 1)).abs().max() > (1e-5 if state[_TABLE].itemsize == 4 else 1e-2):
        raise ValueError(f"{_TABLE} is not the sinusoidal table that the config describes")


def table_of(table: Tensor) -> dict[str, Tensor]:
    """The position table under its official name."""
    return {_TABLE: table.flatten(0, 1)[None]}


def sizes(variant: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a config, read off the official shapes, taking patches as 2 x 2.

    Raises:
        ValueError: the weights are of the other network or of something else.
    """
    for name, (mark, _, _) in _VARIANTS.items():
        if name != variant and mark in state:
            raise ValueError(
                f"the weights are of a {name}, which has {mark}: read them by "
                f"{name}.from_official, not {variant}.from_official"
            )
    mark, _, patches = _VARIANTS[variant]
    axes = _AXES | {mark: 2} if variant == "PyramidFlux" else _AXES | {mark: 4, _TABLE: 3}
    if missing := [name for name in axes if name not in state]:
        names = ", ".join(list(state)[:5]) + (", ..." if len(state) > 5 else "")
        raise ValueError(
            f"not the weights of a {variant}: missing {', '.join(missing)}, got {names}"
        )
    for name, count in axes.items():
        if state[name].ndim != count or not state[name].numel():
            shape = tuple(state[name].shape)
            raise ValueError(f"{name} must have {count} axes, none of them empty, got {shape}")
    weight = state[f"{patches}.weight"]
    D, width = len(weight), len(state["transformer_blocks.0.attn.norm_q.weight"])
    if D % width:
        raise ValueError(f"{patches}.weight must be a multiple of {width} wide, got {D}")
    found = {
        "channels": weight.shape[1] // (4 if weight.ndim == 2 else 1),
        "patch": 2 if weight.ndim == 2 else weight.shape[2],
        "heads": D // width,
        "head_width": width,
        "joint_blocks": _count(state, "transformer_blocks"),
        "text_width": state["context_embedder.weight"].shape[1],
        "pooled_width": state["time_text_embed.text_embedder.linear_1.weight"].shape[1],
    }
    if variant == "PyramidFlux":
        found["single_blocks"] = _count(state, "single_transformer_blocks")
        spatial = 3 * width // 8
        axes_of_time = {"time_width": width - 2 * spatial}
        return found | axes_of_time | {"row_width": spatial, "column_width": spatial}
    side = math.isqrt(state[_TABLE].shape[1])
    if side**2 != state[_TABLE].shape[1]:
        raise ValueError(f"{_TABLE} must be of a square grid, got {state[_TABLE].shape[1]} rows")
    step = math.asin(min(1.0, abs(float(state[_TABLE][0, 1, 0])))) if side > 1 else 1.0
    return found | {"positions": side, "trained_positions": max(1, round(side * step))}


def settings(variant: str, source: Any) -> dict[str, Any]:
    """What shapes do not tell, from the `config.json` of a folder, where there is one."""
    if not isinstance(source, str | Path) or not (path := Path(source, "config.json")).is_file():
        return {}
    given = read_json(path)
    if variant == "PyramidMMDiT":
        names = {"frames": "max_num_frames", "interpolate_history": "interp_condition_pos"}
        return {ours: given[name] for ours, name in names.items() if name in given}
    widths = given.get("axes_dims_rope", ())
    if widths and (not isinstance(widths, list) or len(widths) != 3):
        raise ValueError(f"{path} must have three axes_dims_rope, got {widths}")
    return dict(zip(("time_width", "row_width", "column_width"), widths, strict=False))


def _count(state: Mapping[str, Tensor], blocks: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{blocks}.")})
