"""What the tests of `masked_attention` share: masks, the float64 oracle, what users write."""

import torch
import torch.nn.functional as F

from fastvid.functional import FrameLayout, Visibility, masked_attention
from fastvid.kernels.masked_attention import reference

OP = torch.ops.fastvid.masked_attention.default
BACKWARD = torch.ops.fastvid.masked_attention_backward.default


def tables(visibility):
    v = visibility
    return v.rows, v.row_spans, v.columns, v.column_spans


def random_visibility(seed, batch=2, frames=4, longest=4, device="cpu"):
    """Ragged and empty frames, several runs a row, rows that see nothing, lonely ones, padding."""
    generator = torch.Generator().manual_seed(seed)

    def chance(share, *shape):
        return torch.rand(shape, generator=generator) < share

    lengths = torch.randint(0, longest + 1, (frames,), generator=generator)
    layout = FrameLayout([1 + seed % 3, *lengths.tolist()])
    size = layout.frames
    alone = chance(0.3, batch, size) if seed % 2 else None
    valid = torch.randint(0, longest + 1, (1, size), generator=generator) if seed % 5 == 0 else None
    visibility = Visibility(
        chance(0.5, 1 + seed % batch, size, size), layout, self_only=alone, key_lengths=valid
    )
    return visibility.to(device)


def visibility_of(name, tokens=4, device="cpu"):
    """The masks of the models, over four frames."""
    layout = FrameLayout([tokens] * 4)
    known = [[True, False, True, False], [False] * 4]
    made = {
        "full": lambda: Visibility.full(layout),
        "causal": lambda: Visibility.causal(layout),
        "identity": lambda: Visibility.identity(layout, known),
        "own frame": lambda: Visibility.identity(layout, known, rows="self_frame"),
        "text": lambda: Visibility.text_and_frames(FrameLayout([5, 2, 4, tokens * 4 - 11]), [3, 5]),
        "nothing": lambda: Visibility(torch.zeros(4, 4, dtype=torch.bool), layout),
        "ragged": lambda: Visibility.causal(FrameLayout([tokens * 2, 0, 1, tokens * 2 - 1])),
        "tail": lambda: Visibility.causal(FrameLayout([[tokens, 1], [tokens, tokens * 3]])),
    }
    return made[name]().to(device)


MASKS = ["full", "causal", "identity", "own frame", "text", "nothing", "ragged", "tail"]


def oracle(q, k, v, visibility, dout, scale):
    """out, lse, dq, dk, dv in float64."""
    q, k, v, dout = (tensor.double() for tensor in (q, k, v, dout))
    pairs = visibility.dense(q.shape[1], k.shape[1])
    forward = reference.forward(q, k, v, pairs, scale)
    return *forward, *reference.backward(dout, q, k, v, pairs, scale)


def eager(q, k, v, visibility, dout, scale):
    """What users write today, in the dtype of `q`: SDPA with a dense mask; blind rows set to 0."""
    pairs = visibility.dense(q.shape[1], k.shape[1])[:, None]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
    heads_first = (tensor.transpose(1, 2) for tensor in leaves)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=pairs, scale=scale)
    out = torch.where(pairs.any(-1, keepdim=True), out, 0.0).transpose(1, 2)
    return out, *torch.autograd.grad(out, leaves, dout)


def ours(q, k, v, visibility, dout, scale=None):
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out, lse = masked_attention(*leaves, visibility, scale=scale, return_lse=True)
    return out, lse, *torch.autograd.grad(out, leaves, dout)


def launched(q, k, v, visibility, dout, scale):
    from fastvid.kernels.masked_attention.kernel import launch_backward, launch_forward

    out, lse = launch_forward(q, k, v, *tables(visibility)[:2], scale)
    return out, lse, *launch_backward(dout, q, k, v, out, lse, *tables(visibility), scale)


def check_budget(within_budget, found, q, k, v, visibility, dout, scale):
    out, lse, *grads = found
    exact, exact_lse, *exact_grads = oracle(q, k, v, visibility, dout, scale)
    plain = eager(q, k, v, visibility, dout, scale)
    triples = zip((out, *grads), plain, (exact, *exact_grads), strict=True)
    for name, (actual, same, wanted) in zip(("out", "dq", "dk", "dv"), triples, strict=True):
        if q.dtype == torch.float32:
            error = (actual.double() - wanted).abs().max()
            assert error <= 1e-5 * wanted.abs().max(), f"{name}: {error:.3g}"
        else:
            within_budget(actual, same, wanted, name)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-3, atol=2e-3)
