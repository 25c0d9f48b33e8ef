"""What `tune` and `compile --all` may try of `asymmetric_attention`."""

import functools
import itertools

from benchmarks.tune import Search
from fastvid.kernels._shared.variants import Variant
from fastvid.kernels.asymmetric_attention import kernel

CASES = {64: (64, "512"), 80: (72, "72")}  # by the padded head width: E and a case that has it
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
            f"asymmetric_attention/frame {case} {direction} *",
            rival="kernel" if direction == "forward" else "fastvid",
        )
        for table, (direction, run) in KERNELS.items()
        for width, (E, case) in CASES.items()
    ]


def _variant(run, width: int, E: int, candidate: kernel.Blocks) -> Variant:
    return kernel._variant("tried", run, {16: {width: candidate}}, E)


def all_variants() -> list[Variant]:
    """Every head width that is served, in 16 and in 32 bits."""
    return kernel.VARIANTS + [
        kernel._variant(f"{table.lower()}_{dtype}_{E}_all", run, getattr(kernel, table), E, dtype)
        for table, (_, run) in KERNELS.items()
        for E in range(16, 257, 8)
        for dtype in ("bf16", "fp32")
    ]
