"""`temporal_attention` against what users write: SDPA behind permutes, SDPA on views, einsum."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, backward_of, forward_of
from benchmarks.rivals import packages
from fastvid.functional import temporal_attention
from fastvid.kernels.temporal_attention import reference

# VDT-L/2 at 64, 256 and 1024 tokens a frame; MarDini's generator at 512 px.
SHAPES = [(1, 16, 64, 16, 72), (1, 16, 256, 16, 72), (1, 16, 1024, 16, 72), (1, 13, 4096, 16, 64)]
GPU_SHAPES = [(16, 16, 64, 16, 72), (16, 16, 256, 16, 72), (1, 13, 4096, 16, 64)]
QUICK = [(1, 5, 8, 2, 24)]


def eager(q, k, v):
    """The two products of the definition, in the dtype of the inputs."""
    scores = torch.einsum("btnhe,bsnhe->bnhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bnhts,bsnhe->btnhe", scores.softmax(-1), v)


def permuted_sdpa(q, k, v):
    """Positions into the batch by a copy, as most models do it."""
    B, T, N, heads, E = q.shape
    q, k, v = (x.permute(0, 2, 3, 1, 4).reshape(B * N, heads, T, E) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.view(B, N, heads, T, E).permute(0, 3, 1, 2, 4).contiguous()


def strided_sdpa(q, k, v):
    """Every position and head a head of its own: views, as far as the strides allow."""
    q_, k_, v_ = (x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q_, k_, v_).transpose(1, 2).reshape(q.shape)


PACKAGES = {
    "flash-attn": lambda: packages.over_frames(packages.flash_attn()),
    "xformers": lambda: packages.over_frames(packages.xformers()),
    "natten": lambda: packages.over_frames(packages.natten_over_all()),
}


def bytes_moved(forward: bool, B: int, T: int, N: int, heads: int, E: int, itemsize: int) -> int:
    """q, k, v and out; backward q, k, v, dout, dq, dk and dv."""
    return (4 if forward else 7) * B * T * N * heads * E * itemsize


def flops(forward: bool, B: int, T: int, N: int, heads: int, E: int) -> int:
    """Two products of T x T per position and head; backward has five, with the scores made anew."""
    return (4 if forward else 10) * B * N * heads * T * T * E


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Forward and backward, on tensors of their own and on views of a packed projection."""
    shapes = QUICK if quick else GPU_SHAPES if device.type == "cuda" else SHAPES
    dtypes = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    return [
        _case(name, packed, *shape, dtype, device, quick)
        for name in ("forward", "backward")
        for packed in (False, True)
        for shape in shapes
        for dtype in dtypes
    ]


def _case(name, packed, B, T, N, heads, E, dtype, device, quick):
    forward = name == "forward"
    bind = forward_of if forward else backward_of
    rivals = {
        "fastvid": temporal_attention,
        "eager": eager,
        "permute": permuted_sdpa,
        "strided": strided_sdpa,
    }
    if not quick:
        rivals["compile"] = torch.compile(eager, dynamic=False)
    here, missing = packages.split_by_presence(device, PACKAGES)
    rivals |= here

    def make_inputs(device):
        inputs = torch.randn(B, T, N, 3, heads, E, device=device).to(dtype).unbind(3)
        if not packed:
            inputs = tuple(x.contiguous() for x in inputs)
        dout = torch.randn(B, T, N, heads, E, device=device).to(dtype)
        return inputs if forward else (*inputs, dout)

    return Case(
        room="temporal_attention",
        name=f"{name}{' of packed qkv' if packed else ''}",
        shape={"B": B, "T": T, "N": N, "heads": heads, "E": E},
        dtype=dtype,
        make_inputs=make_inputs,
        rivals={rival: bind(function) for rival, function in rivals.items()},
        oracle=bind(reference.temporal_attention),
        nbytes=bytes_moved(forward, B, T, N, heads, E, dtype.itemsize),
        flops=flops(forward, B, T, N, heads, E),
        missing=missing,
    )
