"""What `compile --all` may try of `temporal_attention`; its launches have no table to tune."""

from fastvid.kernels._shared.variants import Variant
from fastvid.kernels.temporal_attention import kernel


def all_variants() -> list[Variant]:
    """Every head width that is served, in 16 and in 32 bits, with and without a rotary table."""
    return kernel.VARIANTS + [
        kernel._variant(
            f"{name}_{dtype}_{E}{'_rotary' * rotary}_all",
            name == "backward",
            E,
            dtype,
            False,
            rotary,
        )
        for name in ("forward", "backward")
        for E in range(8, 257, 8)
        for dtype in ("bf16", "fp32")
        for rotary in (False, True)
    ]
