"""The weights of a VDT under the official names: read for sizes, laid out."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from fastvid.models.vdt import VDTConfig

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published widths; shapes do not tell
_AXES = {  # of the tensors that tell the sizes
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
}
_MODULES = {  # ours: official, where only the name differs
    "timestep.fc1": "t_embedder.mlp.0",
    "timestep.fc2": "t_embedder.mlp.2",
    "final": "final_layer.linear",
}
_BLOCK_MODULES = {
    "spatial.qkv": "attn.qkv",
    "spatial.proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "temporal_norm": "temporal_norm1",
    "temporal.qkv": "temporal_attn.qkv",
    "temporal.proj": "temporal_attn.proj",
    "temporal.fc": "temporal_fc",
}


def layout(
    config: "VDTConfig", own: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """For each tensor of ours the official tensors that make it up, with their shapes.

    Ours, with shapes `own`, is their values one after the other: only the modulation has more than
    one part.
    """
    D, p = config.dim, config.patch
    modules = dict(_MODULES)
    for i in range(config.depth):
        modules |= {f"blocks.{i}.{k}": f"blocks.{i}.{v}" for k, v in _BLOCK_MODULES.items()}
    parts: dict[str, dict[str, tuple[int, ...]]] = {
        "patch.weight": {"x_embedder.proj.weight": (D, config.channels, p, p)},
        "patch.bias": {"x_embedder.proj.bias": (D,)},
        "label.weight": {"y_embedder.embedding_table.weight": own["label.weight"]},
        "position": {"pos_embed": (1, math.prod(own["position"][:2]), D)},
        "time": {"time_embed": (1, config.frames, D)},
    }
    adaln = [(f"blocks.{i}", 6 * D) for i in range(config.depth)] + [("final_layer", 2 * D)]
    for kind, tail in (("weight", (D,)), ("bias", ())):
        parts[f"modulation.{kind}"] = {
            f"{owner}.adaLN_modulation.1.{kind}": (rows, *tail) for owner, rows in adaln
        }
        parts |= {
            f"{name}.{kind}": {f"{official}.{kind}": own[f"{name}.{kind}"]}
            for name, official in modules.items()
            if f"{name}.{kind}" in own
        }
    return {name: parts[name] for name in own}


def sizes(state: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    """The fields of a VDTConfig, read off the official shapes, all but the number of heads.

    Raises:
        ValueError: a tensor is missing or of another rank, or the shapes leave something open.
    """
    if missing := [name for name in _AXES if name not in state]:
        found = ", ".join(list(state)[:5]) + (", ..." if len(state) > 5 else "")
        raise ValueError(f"not the weights of a VDT: missing {', '.join(missing)}, got {found}")
    video = "time_embed" in state
    for name, axes in (_AXES | ({"time_embed": 3} if video else {})).items():
        if state[name].ndim != axes or not state[name].numel():
            shape = tuple(state[name].shape)
            raise ValueError(f"{name} must have {axes} axes, none of them empty, got {shape}")
    D, channels, p, _ = state["x_embedder.proj.weight"].shape
    if heads is None and D not in _HEADS:
        raise ValueError(f"heads must be given: width {D} is none of {sorted(_HEADS)}")
    tokens = state["pos_embed"].shape[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"config must be given: pos_embed of {tokens} tokens is not square")
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    return {
        "channels": channels,
        "height": side * p,
        "width": side * p,
        "frames": state["time_embed"].shape[1] if video else 1,
        "patch": p,
        "dim": D,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "heads": _HEADS[D] if heads is None else heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / D,
        "num_classes": max(rows - 1, 1),
        "class_dropout": 0.1 if rows > 1 else 0.0,
        "learned_variance": state["final_layer.linear.weight"].shape[0] == 2 * channels * p * p,
        "mode": "video" if video else "image",
    }
