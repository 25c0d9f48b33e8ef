"""How many bytes a row needs at its peak, from the sizes alone: what our allocator hands out.

Decoders, the CUDA context and what a matrix product needs besides are not counted.
"""

import torch

from fastvid.models.mardini import MarDini, MarDiniConfig
from fastvid.models.vdt import VDTConfig

PLANNERS = {"S": 1_342_000_000, "L": 3_221_000_000}  # parameters; the paper's text leaves 3 % open
GENERATOR = 289_000_000
PYRAMID_FLOW = {"miniFLUX": 1_972_059_200, "MMDiT": 2_028_334_144}  # parameters
PYRAMID_WIDTHS, PYRAMID_TEXT = {"miniFLUX": 1920, "MMDiT": 1536}, 128


def mardini(config: MarDiniConfig, frames: int, cells: int, width: int = 2) -> int:
    """Sampling a clip of `cells` x `cells`, weights resident, `width` bytes a number.

    The larger of planning and of one block of the generator beside all keys and values.
    """
    with torch.device("meta"):
        weights = sum(value.numel() for value in MarDini(config).parameters())
    planner, generator = config.planner, config.generator
    low = frames * (planner.side // planner.patch) * (planner.side // planner.patch + 1)
    fine = frames * (cells // generator.patch) ** 2
    # Of a block: the stream before and behind it and its norm, then q, k and v before and behind
    # their norms and turns, or the MLP's hidden layer and result.
    planning = low * (2 * planner.dim + max(6 * planner.dim, planner.mlp + planner.dim))
    generating = fine * (3 * generator.dim + max(5 * generator.dim, generator.mlp + generator.dim))
    keys_and_values = 2 * generator.depth * low * generator.dim
    return width * (weights + max(planning, keys_and_values + generating))


def pyramid_flow(model: str, longest: int) -> int:
    """Sampling in bfloat16 with guidance, weights resident, in the call of most image tokens.

    Of a block: the stream, its norm, then q, k, v and the result, or the MLP's hidden layer;
    miniFLUX's single blocks hold both of these at once.
    """
    rows = {"miniFLUX": 2 + 4 + 4, "MMDiT": 2 + 4}[model]
    tokens = 2 * (PYRAMID_TEXT + longest)
    return 2 * (PYRAMID_FLOW[model] + tokens * rows * PYRAMID_WIDTHS[model])


def vdt_weights(config: VDTConfig) -> int:
    """Parameters of VDT in float32."""
    d, mlp, pixels = config.dim, config.mlp_ratio, config.patch**2 * config.channels
    block = (9 + 2 * mlp) * d * d + (6 * d * d)  # attention twice, temporal_fc, MLP; modulation
    biases = (4 + 1 + 4 + mlp + 1 + 6 + 2) * d  # the temporal norm has a weight as well
    ends = pixels * d + (256 + d) * d + 2 * d * d + d * config.patch**2 * config.out_channels
    return int(4 * (config.depth * (block + biases) + ends))


def vdt_forward(config: VDTConfig, batch: int = 1) -> int:
    """One call without gradients: the weights and, in the MLP, stream, norm and hidden rows."""
    per_token = (2 + config.mlp_ratio + 1.2) * config.dim
    return int(vdt_weights(config) + 4 * batch * _tokens(config) * per_token)


def vdt_training(config: VDTConfig, batch: int = 1) -> int:
    """A step with AdamW after the first: weights, two moments, and the larger of two peaks.

    Either everything that the blocks save and the first gradients of the last MLP, or, when the
    first block is done, every gradient.
    """
    d = config.dim
    # The stream three times, q, k, v and the result of two attentions, both branches, the hidden
    # layer; per token besides the log-sum-exp of every head and the statistics of three norms.
    saved = (13 + config.mlp_ratio) * d + config.heads + 6
    last = (2 * config.mlp_ratio + 2) * d
    ends = 4 * d
    activations = 4 * batch * _tokens(config) * (config.depth * saved + last + ends)
    weights = vdt_weights(config)
    return int(3 * weights + max(activations, weights))


def _tokens(config: VDTConfig) -> int:
    return config.frames * (config.height // config.patch) * (config.width // config.patch)
