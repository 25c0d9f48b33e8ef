"""The public ops, one import away: `from fastvid.functional import norm_modulate`.

Every op works under autograd, `torch.compile`, `torch.export` and on meta tensors, and runs on
whatever device its tensors are on.
"""

from fastvid.kernels._shared.visibility import FrameLayout, Visibility
from fastvid.kernels.asymmetric_attention.op import asymmetric_attention
from fastvid.kernels.guided_step.op import guided_step
from fastvid.kernels.masked_attention.op import masked_attention
from fastvid.kernels.modulate.op import (
    gated_residual,
    gated_residual_norm_modulate,
    norm_modulate,
)
from fastvid.kernels.noising.op import masked_mse, noising
from fastvid.kernels.pyramid_renoise.op import (
    StageEndpoints,
    latent_pyramid,
    noise_pyramid,
    pyramid_renoise,
    stage_endpoints,
)
from fastvid.kernels.qk_norm_rope.op import qk_norm_rope
from fastvid.kernels.qk_norm_rope.rotary import Rotary, rotary_table
from fastvid.kernels.temporal_attention.op import temporal_attention

__all__ = [
    "FrameLayout",
    "Rotary",
    "StageEndpoints",
    "Visibility",
    "asymmetric_attention",
    "gated_residual",
    "gated_residual_norm_modulate",
    "guided_step",
    "latent_pyramid",
    "masked_attention",
    "masked_mse",
    "noise_pyramid",
    "noising",
    "norm_modulate",
    "pyramid_renoise",
    "qk_norm_rope",
    "rotary_table",
    "stage_endpoints",
    "temporal_attention",
]
