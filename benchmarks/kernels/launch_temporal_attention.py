"""What `compile --all` may try of `temporal_attention`; its launches have no table to tune."""

from fastvid.kernels._shared.variants import Variant
from fastvid.kernels.temporal_attention import kernel


def all_variants() -> list[Variant]:
    """Every head width that is served, in 16 and in 32 bits."""
    return kernel.VARIANTS + [
        kernel._variant(f"{name}_{dtype}_{E}_all", run, E, dtype)
        for name, run in (("forward", kernel._forward), ("backward", kernel._backward))
        for E in range(16, 257, 8)
        for dtype in ("bf16", "fp32")
    ]
