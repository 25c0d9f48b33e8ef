"""How many bytes a row needs at its peak, from the sizes alone."""

from fastvid.models.vdt import VDTConfig


def mardini(size: str, frames: int, side: int, *, asymmetric: bool) -> int:
    """Inference in bfloat16 with weights resident: weights, planning keys and values, one block."""
    planner = {"S": 1_342_000_000, "L": 3_221_000_000}[size]  # +- 3 %: open choices of the paper
    weights = 2 * (planner + 289_000_000)
    low = frames * ((256 if asymmetric else side) // 8) ** 2
    fine = frames * (side // 8) ** 2
    keys_and_values = 2 * 8 * 2 * low * 1024
    # The stream, its norm, then q, k, v and the result, or the hidden layer of the MLP.
    planning = 2 * low * (2 * 4096 + max(4 * 4096, 8192))
    generating = 2 * fine * (2 * 1024 + max(4 * 1024, 4096))
    return weights + max(planning, keys_and_values + generating)


def vdt_forward(config: VDTConfig, batch: int = 1) -> int:
    return 0


def vdt_training(config: VDTConfig, batch: int = 1) -> int:
    return 0
