"""`asymmetric_attention` against what users write: batched SDPA, a loop over frames, repeated keys.

"eager" is batched SDPA on views, "compile" is `torch.compile` of the two products of "einsum".
FlexAttention and packages see the same views as "eager".
"shared" cases are the two halves of classifier-free guidance on one set of keys.
"""

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, backward_of, forward_of
from benchmarks.rivals import packages
from benchmarks.rivals.sdpa import by_backend, heads_first, sdpa
from fastvid.functional import asymmetric_attention
from fastvid.kernels.asymmetric_attention import reference

# B, T, Nq, Nk, heads, E: MarDini's generator (16 heads of 64) at 512, 768 and 1024 px on a planner
# at 256 px; a context pooled to 64 tokens; heads of 72. On a CPU an eighth of the width and a
# quarter of the tokens.
GPU = {
    "frame 512": ("frame", 1, 1, 13, 4096, 1024, 16, 64),
    "frame 768": ("frame", 1, 1, 17, 9216, 1024, 16, 64),
    "frame 1024": ("frame", 1, 1, 17, 16384, 1024, 16, 64),
    "frame 512 shared": ("frame", 2, 1, 13, 4096, 1024, 16, 64),
    "frame 512 pooled": ("frame", 1, 1, 13, 4096, 64, 16, 64),
    "frame 72": ("frame", 1, 1, 16, 1024, 256, 16, 72),
    "clip 512": ("clip", 1, 1, 13, 4096, 1024, 16, 64),
}
CPU = {
    "frame 512": ("frame", 1, 1, 13, 1024, 256, 2, 64),
    "frame 1024": ("frame", 1, 1, 9, 4096, 256, 2, 64),
    "frame small": ("frame", 1, 1, 16, 256, 64, 4, 64),
    "frame 512 pooled": ("frame", 1, 1, 13, 1024, 16, 4, 64),
    "frame 512 shared": ("frame", 2, 1, 13, 1024, 256, 2, 64),
    "frame pooled shared": ("frame", 2, 1, 13, 1024, 16, 4, 64),
    "clip 256": ("clip", 1, 1, 13, 256, 64, 2, 64),
}
QUICK = {"frame": ("frame", 2, 1, 3, 8, 4, 2, 16), "clip": ("clip", 2, 2, 3, 8, 4, 2, 16)}


def batched(scope, attend=sdpa):
    """One call on views, frames in the batch or in a row; what two halves share is repeated."""

    def f(q, k, v):
        axes = (0, 1) if scope == "frame" else (1, 2)
        k, v = (x.expand(len(q), *x.shape[1:]) for x in (k, v))
        return attend(*(x.flatten(*axes) for x in (q, k, v))).reshape(q.shape)

    return f


def permuted_sdpa(scope):
    """As `batched`, on copies with the heads in front."""

    def f(q, k, v):
        axes = (0, 1) if scope == "frame" else (1, 2)
        k, v = (x.repeat(len(q) // len(x), 1, 1, 1, 1) for x in (k, v))
        rows = [x.contiguous() for x in heads_first(*(x.flatten(*axes) for x in (q, k, v)))]
        out = F.scaled_dot_product_attention(*rows).transpose(1, 2)
        return out.reshape(q.shape).contiguous()

    return f


def frame_loop(scope):
    """One call for every frame of queries."""

    def f(q, k, v):
        k, v = (x.expand(len(q), *x.shape[1:]) for x in (k, v))
        seen = zip(k.unbind(1), v.unbind(1), strict=True)
        if scope == "clip":
            seen = [(k.flatten(1, 2), v.flatten(1, 2))] * q.shape[1]
        frames = zip(q.unbind(1), seen, strict=True)
        return torch.stack([sdpa(one, *keys) for one, keys in frames], 1)

    return f


def flex():
    """FlexAttention, compiled, with nothing to hide."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*heads_first(q, k, v)).transpose(1, 2)


PACKAGES = {"flash-attn": packages.flash_attn, "xformers": packages.xformers}


def kernel_only(scope):
    """Ours where the public function would leave the call to PyTorch."""
    return lambda q, k, v: torch.ops.fastvid.asymmetric_attention(
        q, k, v, None, q.shape[-1] ** -0.5, scope == "clip"
    )[0]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Forward and backward; queries of their own, keys out of one projection."""
    on_gpu = device.type == "cuda"
    found = QUICK if quick else GPU if on_gpu else CPU
    return [
        _case(f"{name} {direction}", direction, *case, dtype, device, quick)
        for name, case in found.items()
        for direction in ("forward", "backward")
        for dtype in ([torch.bfloat16] if on_gpu else [torch.float32, torch.bfloat16])
    ]


def _case(name, direction, scope, B, Bk, T, Nq, Nk, heads, E, dtype, device, quick):
    forward, on_gpu = direction == "forward", device.type == "cuda"
    bind = forward_of if forward else backward_of

    def einsum(q, k, v):
        return reference.asymmetric_attention(q, k, v, scope=scope)

    rivals = {
        "fastvid": lambda q, k, v: asymmetric_attention(q, k, v, scope=scope),
        "eager": batched(scope),
        "permuted": permuted_sdpa(scope),
        "loop": frame_loop(scope),
        "einsum": einsum,
    }
    if on_gpu:
        rivals["kernel"] = kernel_only(scope)
        rivals |= by_backend("eager", rivals["eager"])
    if not quick:
        rivals["compile"] = torch.compile(einsum, dynamic=False)
        if forward or on_gpu:  # FlexAttention has no backward on a CPU
            rivals["flex"] = batched(scope, flex())
    here, missing = packages.split_by_presence(device, PACKAGES)
    rivals |= {name: batched(scope, attend) for name, attend in here.items()}

    def make_inputs(device):
        q = torch.randn(B, T, Nq, heads, E, device=device).to(dtype)
        k, v = torch.randn(Bk, T, Nk, 2, heads, E, device=device).to(dtype).unbind(3)
        return (q, k, v) if forward else (q, k, v, torch.randn_like(q))

    pairs = B * T * Nq * Nk * (T if scope == "clip" else 1)
    moved = (2 if forward else 4) * B * T * Nq + (2 if forward else 4) * Bk * T * Nk
    return Case(
        room="asymmetric_attention",
        name=name,
        shape={"B": B, "Bk": Bk, "T": T, "Nq": Nq, "Nk": Nk, "heads": heads, "E": E},
        dtype=dtype,
        make_inputs=make_inputs,
        rivals={rival: bind(function) for rival, function in rivals.items()},
        oracle=bind(einsum),
        nbytes=moved * heads * E * dtype.itemsize,
        flops=(4 if forward else 10) * pairs * heads * E,
        missing=missing,
    )
