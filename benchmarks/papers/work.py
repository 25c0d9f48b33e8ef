"""How much work a paper's row asks for: tokens, FLOPs and bytes, from the sizes alone.

A multiplication with its addition is two FLOPs. Counted are the linear layers and the two products
of attention over what is visible; norms, rotary positions, text encoders and autoencoders are not.
Bytes are those that cannot but move if every block were one kernel: the weights once a call, the
stream of tokens into and out of every block.
"""

from dataclasses import dataclass

from benchmarks.papers import memory
from fastvid.models.mardini import MarDiniConfig
from fastvid.models.vdt import VDT_L, VDT_S, VDTConfig

VDT_SIZES = {"S": VDT_S, "L": VDT_L}


@dataclass(frozen=True)
class Work:
    """Of a whole row: tokens through the large network (all calls together), FLOPs, bytes."""

    tokens: int
    flops: int
    nbytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        tokens, flops = self.tokens + other.tokens, self.flops + other.flops
        return Work(tokens, flops, self.nbytes + other.nbytes)

    def times(self, passes: int) -> "Work":
        """The same tokens so many times."""
        return Work(self.tokens, passes * self.flops, passes * self.nbytes)


def linear(tokens: int, weights: int) -> int:
    """FLOPs of dense layers with `weights` parameters between them."""
    return 2 * tokens * weights


def attention(queries: int, keys: int, width: int) -> int:
    """FLOPs of q k^T and p v, `width` being all heads together."""
    return 4 * queries * keys * width


def moved(weights: int, blocks: int, tokens: int, width: int, itemsize: int = 2) -> int:
    """Bytes of a call: `weights` bytes, and the stream into and out of each block."""
    return weights + 2 * blocks * tokens * width * itemsize


def vdt(config: VDTConfig, batch: int = 1) -> Work:
    """One forward pass in float32, in the official order (temporal_fc behind the projection)."""
    frames, patch, d = config.frames, config.patch, config.dim
    per_frame = (config.height // patch) * (config.width // patch)
    tokens = frames * per_frame
    pixels = patch * patch * config.channels
    block = linear(tokens, int((9 + 2 * config.mlp_ratio) * d * d))  # 4 + 4 + temporal_fc, MLP
    block += attention(tokens, per_frame, d) + attention(tokens, frames, d)
    block += linear(1, 6 * d * d)
    ends = linear(tokens, pixels * d + d * patch * patch * config.out_channels)
    ends += linear(1, (256 + d) * d + 2 * d * d)  # the timestep's MLP, the last layer's modulation
    nbytes = moved(memory.vdt_weights(config), config.depth, batch * tokens, d, itemsize=4)
    return Work(batch * tokens, batch * (config.depth * block + ends), nbytes)


def mardini(
    size: str,
    frames: int,
    side: int,
    *,
    temporal: bool,
    asymmetric: bool,
    steps: int = 25,
) -> Work:
    """One video, DDIM without guidance: the planner once, the generator `steps` times.

    Args:
        size: "S" or "L", of the planner.
        side: of the video in pixels; the planner sees 256 if `asymmetric`.
        temporal: the generator attends over time only, instead of over all tokens.
    Latents have an eighth of the side and patches of one cell. Rows that the identity attention
    need not compute are counted.
    """
    depth, hidden = {"S": (8, 4096), "L": (16, 8192)}[size]
    d = 4096
    low = (256 if asymmetric else side) // 8
    cells = low * low
    tokens = frames * cells
    planner = linear(tokens, 8 * d * d + 2 * d * hidden)
    planner += attention(tokens, cells, d) + attention(tokens, tokens, d)
    context = linear(tokens, 8 * 2 * d * 1024)  # keys and values of 8 blocks, once
    planned = moved(2 * memory.PLANNERS[size], depth, tokens, d)
    weights = 2 * memory.GENERATOR + 2 * 8 * 2 * tokens * 1024  # and those keys and values

    d, hidden = 1024, 4096
    fine = (side // 8) ** 2
    tokens = frames * fine
    generator = linear(tokens, 10 * d * d + 2 * d * hidden)  # the queries and outputs of three
    generator += attention(tokens, fine, d) + attention(tokens, cells, d)
    generator += attention(tokens, frames if temporal else tokens, d)
    nbytes = planned + steps * moved(weights, 8, tokens, d)
    return Work(tokens * steps, depth * planner + context + steps * 8 * generator, nbytes)


def mardini_plan(config: MarDiniConfig, frames: int) -> Work:
    """The planner once, on a square clip, with everything that `mardini` leaves out."""
    planner, side = config.planner, config.planner.side // config.planner.patch
    d, cells = planner.dim, side * (side + planner.next_token)
    tokens = frames * cells
    block = linear(tokens, 8 * d * d + 2 * d * planner.mlp)
    block += attention(tokens, cells, d) + attention(tokens, tokens, d)
    ends = linear(frames * side * side, config.channels * planner.patch**2 * d)
    return Work(0, planner.depth * block + ends)


def mardini_context(config: MarDiniConfig, frames: int) -> Work:
    """What the generator makes of a plan: keys and values, and what modulates the MLPs."""
    planner, generator = config.planner, config.generator
    side, d = planner.side // planner.patch, generator.dim
    tokens = frames * side * (side + (planner.next_token and planner.signal_next))
    keys_and_values = linear(tokens, 2 * planner.dim * d)
    return Work(0, generator.depth * keys_and_values + linear(frames, planner.dim * d))


def mardini_step(config: MarDiniConfig, frames: int, cells: int) -> Work:
    """One denoising step of a clip of `cells` x `cells`, its context at hand, without guidance."""
    planner, generator = config.planner, config.generator
    d, side = generator.dim, cells // generator.patch
    fine = side * (side + generator.next_token)
    low = planner.side // planner.patch
    context = low * (low + (planner.next_token and planner.signal_next))
    tokens = frames * fine
    block = linear(tokens, 10 * d * d + 2 * d * generator.mlp)
    block += attention(tokens, fine, d)
    block += attention(tokens, context * (frames if generator.cross_scope == "clip" else 1), d)
    block += attention(tokens, frames if generator.attention == "time" else tokens, d)
    block += linear(frames + 1, 4 * d * d)  # the modulation of a frame's MLP, of the attention
    pixels = config.channels * generator.patch**2
    ends = linear(frames * side * side, pixels * d) + linear(tokens, pixels * d)
    ends += linear(1, (256 + d) * d + 2 * d * d)  # the timestep's MLP, the last modulation
    return Work(tokens, generator.depth * block + ends)


def mardini_of(config: MarDiniConfig, frames: int, cells: int, *, steps: int = 25) -> Work:
    """One video of a config, counted as `mardini` does but with nothing left out."""
    made = mardini_plan(config, frames) + mardini_context(config, frames)
    step = mardini_step(config, frames, cells)
    return made + Work(steps * step.tokens, steps * step.flops)


# Both have 24 blocks of 12 D^2 weights a token.
PYRAMID_WIDTHS, TEXT = memory.PYRAMID_WIDTHS, memory.PYRAMID_TEXT


def pyramid_flow(
    model: str,
    height: int,
    width: int,
    frames: int,
    *,
    steps: tuple[int, int] = (20, 10),
    guided: bool = True,
    causal: bool = True,
) -> Work:
    """One video: every unit, stage and step of it.

    Args:
        height, width: of the video in pixels; frames: latent ones, 16 for 5 s and 31 for 10 s.
        steps: per stage, for the first frame and for the later ones.
        causal: attention counts what is visible: no later frame, and of the frames only the first
            and the text for the text.
    """
    d, calls = PYRAMID_WIDTHS[model], 2 if guided else 1
    total = Work(0, 0)
    for unit in range(frames):
        for stage in range(3):
            lengths = [TEXT, *history(height, width, unit, stage)]
            tokens = sum(lengths)
            if causal:
                seen = [sum(lengths[: position + 1]) for position in range(len(lengths))]
                seen[0] += lengths[1]
                pairs = sum(queries * keys for queries, keys in zip(lengths, seen, strict=True))
            else:
                pairs = tokens * tokens
            flops = 24 * (linear(tokens, 12 * d * d) + attention(1, pairs, d))
            count = steps[min(unit, 1)]
            nbytes = moved(2 * memory.PYRAMID_FLOW[model], 24, calls * tokens, d)
            total += Work(count * calls * tokens, count * calls * flops, count * nbytes)
    return total


def pyramid_flow_tokens(height: int, width: int, frames: int) -> tuple[int, int, int, int]:
    """Image tokens of the video in full, and of the last unit's calls from low to high."""
    full = frames * (height // 16) * (width // 16)
    low, middle, high = (sum(history(height, width, frames - 1, stage)) for stage in range(3))
    return full, low, middle, high


def history(height: int, width: int, unit: int, stage: int) -> list[int]:
    """Tokens of each frame in the call that makes `unit` at `stage` (0: lowest), oldest first.

    A frame that is older by one more unit stands one stage lower, down to the lowest.
    """
    finest = (height // 16) * (width // 16)
    stages = [stage] + [max(stage - age, 0) for age in range(unit)]
    return [finest // 4 ** (2 - each) for each in reversed(stages)]
