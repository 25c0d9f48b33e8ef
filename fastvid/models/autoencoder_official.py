"""The weights of CausalVideoVAE under the official names: renamed, read for sizes."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# (ours, official), each a whole part of a name; `.` marks the ends. In official names the weights
# of every causal convolution lie one level deeper.
_PARTS = (
    ("encoder.first", "encoder.conv_in"),
    ("decoder.first", "decoder.conv_in"),
    ("encoder.last", "encoder.conv_out"),
    ("decoder.last", "decoder.conv_out"),
    ("encoder.norm", "encoder.conv_norm_out"),
    ("decoder.norm", "decoder.conv_norm_out"),
    ("middle.block1", "mid_block.resnets.0"),
    ("middle.block2", "mid_block.resnets.1"),
    ("middle.attention.norm", "mid_block.attentions.0.group_norm"),
    ("middle.attention.q", "mid_block.attentions.0.to_q"),
    ("middle.attention.k", "mid_block.attentions.0.to_k"),
    ("middle.attention.v", "mid_block.attentions.0.to_v"),
    ("middle.attention.proj", "mid_block.attentions.0.to_out.0"),
    ("blocks", "resnets"),
    ("shortcut", "conv_shortcut"),
    ("encoder.levels", "encoder.down_blocks"),
    ("decoder.levels", "decoder.up_blocks"),
    ("moments", "quant_conv"),
    ("latents", "post_quant_conv"),
)
_STEPS = {"encoder": "down", "decoder": "up"}
_CONVOLUTION = re.compile(r"(first|last|conv1|conv2|shortcut|space|time|moments|latents)\.\w+$")


def official_name(name: str) -> str:
    """The official name of a tensor of ours."""
    found = name
    if _CONVOLUTION.search(name):
        module, _, kind = name.rpartition(".")
        found = f"{module}.conv.{kind}"
    for ours, theirs in _PARTS:
        found = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{theirs}", found)
    side = _STEPS.get(name.partition(".")[0], "")
    found = found.replace(".space.conv.", f".{side}samplers.0.conv.conv.")
    return found.replace(".time.conv.", f".temporal_{side}samplers.0.conv.conv.")


def own_name(name: str) -> str:
    """Our name of a tensor with an official one; of others, that name itself."""
    found = re.sub(r"\.temporal_(down|up)samplers\.0\.conv\.conv\.", ".time.conv.", name)
    found = re.sub(r"\.(down|up)samplers\.0\.conv\.conv\.", ".space.conv.", found)
    for ours, theirs in _PARTS:
        found = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.)", rf"\g<1>{ours}", found)
    found = re.sub(r"\.conv\.(\w+)$", r".\1", found)
    return found if official_name(found) == name else name


def sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a config, read off the official shapes, with 32 groups a norm.

    Raises:
        ValueError: the weights are of something else.
    """
    widths, layers = [], {"down": [0] * 4, "up": [0] * 4}
    for step, counts in layers.items():
        side = "encoder" if step == "down" else "decoder"
        for level in range(4):
            stem = f"{side}.{step}_blocks.{level}.resnets."
            counts[level] = len({k[len(stem) :].split(".")[0] for k in state if k.startswith(stem)})
    for level in range(4):
        found = state.get(f"encoder.down_blocks.{level}.resnets.0.conv2.conv.weight")
        if found is None or found.ndim != 5:
            names = ", ".join(list(state)[:5])
            raise ValueError(
                f"not the weights of a CausalVideoVAE: no 5-axis conv2 in level {level} of the "
                f"encoder, got {names}"
            )
        widths.append(found.shape[0])
    channels = state.get("post_quant_conv.conv.weight")
    if channels is None or not all(layers["up"]):
        raise ValueError("not the weights of a CausalVideoVAE: no post_quant_conv or no decoder")
    return {
        "channels": channels.shape[0],
        "widths": tuple(widths),
        "encoder_layers": tuple(layers["down"]),
        "decoder_layers": tuple(layers["up"]),
    }
