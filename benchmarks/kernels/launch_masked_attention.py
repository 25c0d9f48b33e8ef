"""What `tune` and `compile --all` may try of `masked_attention`."""

import functools
import itertools

from benchmarks.tune import Search
from fastvid.kernels._shared.variants import Variant
from fastvid.kernels.masked_attention import descriptors, kernel

WIDTHS = {64: 64, 80: 72, 128: 128}  # by the padded head width, that of a GPU case
CANDIDATES = [
    kernel.Blocks(*each) for each in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
]
KERNELS = {
    "FORWARD": ("forward", kernel._forward),
    "BACKWARD_Q": ("backward", kernel._backward_q),
    "BACKWARD_KV": ("backward", kernel._backward_kv),
}


def searches() -> list[Search]:
    """The tiles of 16-bit inputs at the head widths of our models."""
    return [
        Search(
            table,
            (16, width),
            CANDIDATES,
            functools.partial(_variant, run, width, E),
            f"masked_attention/dense {E} {direction} *",
        )
        for table, (direction, run) in KERNELS.items()
        for width, E in WIDTHS.items()
    ] + [
        Search(
            "BLOCKS",
            (width,),
            CANDIDATES,
            functools.partial(_variant, descriptors.forward, width, E),
            f"masked_attention/dense {E} forward *",
            file="descriptors",
            rival="fastvid, tensor descriptors",
        )
        for width, E in WIDTHS.items()
    ]


def _variant(run, width: int, E: int, candidate: kernel.Blocks) -> Variant:
    return kernel._variant("tried", run, {width: candidate}, E)


def all_variants() -> list[Variant]:
    """Every head width that is served, in 16 and in 32 bits."""
    return kernel.VARIANTS + [
        kernel._variant(
            f"{table.lower()}_{dtype}_{E}_all", run, getattr(kernel, table)[bits], E, dtype
        )
        for table, (_, run) in KERNELS.items()
        for E in range(16, 257, 8)
        for dtype, bits in (("bf16", 16), ("fp32", 32))
    ]
