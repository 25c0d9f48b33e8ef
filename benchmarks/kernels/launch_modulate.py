"""What `tune` and `compile --all` may try of `modulate`."""

import functools
import itertools

from benchmarks.tune import Search
from fastvid.kernels._shared.variants import Variant
from fastvid.kernels.modulate import kernel, residual

UNSEARCHED = {"PER_TOKEN": "no case of the benchmark has a modulation per token"}
WIDTHS = {512: 384, 1024: 1024, 2048: 1152}  # by BLOCK_D, one that a GPU case has
CANDIDATES = list(itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16)))  # BLOCK_N, warps


def searches() -> list[Search]:
    """Rows and warps of a program, forward and backward, without and with a residual."""
    return [
        Search(
            table,
            (block_d,),
            CANDIDATES,
            functools.partial(_variant, file, f"_{table.lower()}", block_d, D),
            f"modulate/{case}{table.lower()} * D={D} *",
            file=file.__name__.rpartition(".")[2],
        )
        for file, case in ((kernel, ""), (residual, "residual_norm_"))
        for table in ("FORWARD", "BACKWARD")
        for block_d, D in WIDTHS.items()
    ]


def _variant(file, run: str, block_d: int, D: int, candidate: tuple[int, int]) -> Variant:
    return file._variant("tried", getattr(file, run), {block_d: candidate}, D)


def all_variants() -> list[Variant]:
    """Every width that is a multiple of 64, up to 8192 by doubling past 2048."""
    widths = [*range(64, 2048, 64), 2048, 4096, 8192]
    directions = (
        ("forward", kernel._forward, kernel.FORWARD),
        (
            "backward",
            kernel._backward,
            kernel.BACKWARD,
        ),
    )
    return kernel.VARIANTS + [
        kernel._variant(f"{name}_{x}_{D}_all", run, table, D, x=x)
        for name, run, table in directions
        for D in widths
        for x in ("bf16", "fp32")
    ]
