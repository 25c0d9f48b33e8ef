"""Other people's kernels under our signatures, and how to install what is not here.

Each package is imported when its rival is made, so nothing here needs any of them. All of them
need a GPU. Signatures: flash-attn 2.8, xformers 0.0.35, liger-kernel 0.8, natten 0.21.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, N, heads, E), (B, M, heads, E) twice
PACKAGES = {  # by the name of the rival: the module, and what installs it
    "flash-attn": ("flash_attn", "pip install flash-attn --no-build-isolation"),
    "xformers": ("xformers", "pip install xformers"),
    "liger": ("liger_kernel", "pip install liger-kernel"),
    "natten": ("natten", "pip install natten (a build, or a wheel from its own index)"),
}


def split_by_presence(
    device: torch.device, rivals: dict[str, Callable[[], Callable]]
) -> tuple[dict[str, Callable], dict[str, str]]:
    """The rivals whose package is here, made; and for the others what they lack.

    Args:
        rivals: by a name of `PACKAGES`, what makes the rival.
    """
    here, missing = {}, {}
    for name, make in rivals.items():
        module, install = PACKAGES[name]
        if device.type != "cuda":
            missing[name] = f"needs a GPU, and {install}"
        elif importlib.util.find_spec(module) is None:
            missing[name] = install
        else:
            here[name] = make()
    return here, missing


def flash_attn(window: tuple[int, int] | None = None) -> Attention:
    """`flash_attn_func` in 16 bits; its backward in the deterministic form, as ours is.

    Args:
        window: tokens before and after its own that a query sees; None: all.
    """
    from flash_attn import flash_attn_func

    around = (-1, -1) if window is None else window
    return lambda q, k, v: flash_attn_func(q, k, v, window_size=around, deterministic=True)


def flash_attn_by_segment(lengths: list[int]) -> Attention:
    """`flash_attn_varlen_func`: segments of these lengths, one after the other, see themselves."""
    from flash_attn import flash_attn_varlen_func

    def attend(q, k, v):
        B = q.shape[0]
        ends = torch.tensor([0, *lengths * B], device=q.device).cumsum(0, dtype=torch.int32)
        most = max(lengths)
        packed = (x.flatten(0, 1) for x in (q, k, v))
        out = flash_attn_varlen_func(*packed, ends, ends, most, most, deterministic=True)
        return out.unflatten(0, (B, -1))

    return attend


def xformers() -> Attention:
    """`memory_efficient_attention`, by the kernel that it chooses."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


def xformers_by_segment(lengths: list[int]) -> Attention:
    """The same under a `BlockDiagonalMask`: segments of these lengths see themselves."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    def attend(q, k, v):
        B = q.shape[0]
        bias = BlockDiagonalMask.from_seqlens(lengths * B, device=q.device)
        packed = (x.flatten(0, 1)[None] for x in (q, k, v))
        return memory_efficient_attention(*packed, attn_bias=bias)[0].unflatten(0, (B, -1))

    return attend


def natten_over_all() -> Attention:
    """`na1d` with a neighbourhood as long as the sequence, which is plain attention."""
    from natten import na1d

    return lambda q, k, v: na1d(q, k, v, kernel_size=q.shape[1])


def over_frames(attend: Attention) -> Attention:
    """Attention along T of (B, T, N, heads, E): positions go into the batch by a copy."""

    def attend_over_frames(q, k, v):
        B, _, N, _, _ = q.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
        return attend(q, k, v).unflatten(0, (B, N)).transpose(1, 2)

    return attend_over_frames


def liger_norm_modulate() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Liger's LayerNorm without an affine part, then shift and scale (B, D) by PyTorch."""
    from liger_kernel.transformers.functional import liger_layer_norm

    def modulate(x, shift, scale):
        D = x.shape[-1]
        normed = liger_layer_norm(x, x.new_ones(D), x.new_zeros(D), 1e-6)
        return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    return modulate


def liger_norm() -> Callable[[str, Tensor, Tensor], Tensor]:
    """Liger's RMSNorm ("rms") or LayerNorm ("layer") over the last axis, with a weight."""
    from liger_kernel.transformers.functional import liger_layer_norm, liger_rms_norm

    def norm(kind, x, weight):
        if kind == "layer":
            return liger_layer_norm(x, weight, torch.zeros_like(weight), 1e-6)
        return liger_rms_norm(x, weight, 1e-6, in_place=False)  # else backward takes its input

    return norm
