"""The CPU path: PyTorch's flash kernel, called once per rectangle of a plan (`plan.py`).

Nothing hidden is computed, forward or backward.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .._shared.views import rows_together
from .plan import Plan, Range, Ranges, intersect, merge, places, samples_of, size, take

# Below so many query rows the kernel takes smaller blocks and loses a third of its rate; sums over
# fewer rows are merged on the keys that they share.
FULL_RATE_ROWS = 768
# At most so many tokens of either side go into one call, and of these so many numbers for each
# thread, or one head: what a call returns, before it is put where it belongs, stays small beside
# the tensors themselves and beside the kernel's own scratch.
MOST_TOKENS = 1024
MOST_NUMBERS = 2**16


def forward(
    q: Tensor, k: Tensor, v: Tensor, plans: tuple[Plan, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of `q` (B, N, heads, E) on `k`, `v` (B, M, heads, E).

    `plans` holds one plan for the whole batch, or one a sample. Returns out (B, N, heads, E) and
    lse (B, heads, N), float32 or, for float64 input, float64.
    """
    q, k, v = (rows_together(tensor) for tensor in (q, k, v))
    if q.numel() and len(plans) == 1 and len(plans[0].rectangles) == 1:
        (whole,) = plans[0].rectangles
        if size(whole.queries) == q.shape[1] and len(whole.keys) == 1:
            out, lse = _flash(q, take(k, whole.keys), take(v, whole.keys), scale)
            return out.contiguous(), lse.contiguous()
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide, device=q.device)
    if not out.numel():  # the kernels divide by the batch and by the heads
        return out, lse
    for sample, its_plan in zip(samples_of(plans), plans, strict=True):
        _forward_one(out[sample], lse[sample], q[sample], k[sample], v[sample], its_plan, scale)
    return out, lse


def _forward_one(out, lse, q, k, v, its_plan, scale):
    done: Ranges = ()
    for whole, keys in its_plan.rectangles:
        its_k, its_v = take(k, keys), take(v, keys)
        joins = bool(intersect(done, whole))
        for queries in _blocks(whole):
            for samples, heads in _lots(q, size(queries)):
                lot = samples, slice(None), heads
                parts = _flash(take(q[lot], queries), its_k[lot], its_v[lot], scale)
                _put(out[lot], lse[samples, heads], queries, *parts, joins)
                del parts  # before the next call makes its own
        done = merge([*done, *whole])
    # Last, since the system gives the memory of these rows only when they are written.
    for block in _blocks(its_plan.alone):
        for (start, end), (samples, heads) in itertools.product(block, _lots(q, size(block))):
            here = samples, slice(start, end), heads
            out[here] = v[here]
            own = (q[here].to(lse.dtype) * k[here]).sum(-1)
            lse[samples, heads, start:end] = own.mT * scale
    for start, end in its_plan.blind:
        out[:, start:end] = 0
        lse[:, :, start:end] = -torch.inf


def _lots(q: Tensor, rows: int) -> Iterator[tuple[slice, slice]]:
    """Samples and heads in groups, of which `rows` rows make MOST_NUMBERS a thread."""
    _, _, heads, E = q.shape
    together = torch.get_num_threads() * max(1, MOST_NUMBERS // (rows * E))
    step_b, step_h = -(-together // heads), min(heads, together)
    for b in range(0, len(q), step_b):
        for h in range(0, heads, step_h):
            yield slice(b, b + step_b), slice(h, h + step_h)


def _put(out, lse, queries, part, part_lse, joins):
    """Write what a call returned to the rows that it is of, or join it to what they hold."""
    for (start, end), (a, b) in zip(queries, places(queries), strict=True):
        here, here_lse = out[:, start:end], lse[:, :, start:end]
        if joins:
            _join(here, here_lse, part[:, a:b], part_lse[:, :, a:b])
        else:
            here.copy_(part[:, a:b])
            here_lse.copy_(part_lse[:, :, a:b])


def _join(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add the keys of `part` to the rows of `out`, in place."""
    total = torch.logaddexp(lse, part_lse)
    old, new = ((side - total).exp().transpose(1, 2)[..., None] for side in (lse, part_lse))
    if out.dtype == lse.dtype:
        out.mul_(old).add_(part.mul_(new))
    else:  # half precision would round each product
        out.copy_(out * old + part * new)
    lse.copy_(total)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    plans: tuple[Plan, ...], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `q`, `k` and `v`; `out` and `lse` are those of `forward`."""
    dout, q, k, v = (rows_together(tensor) for tensor in (dout, q, k, v))
    if q.numel() and len(plans) == 1 and len(plans[0].rectangles) == 1:
        (whole,) = plans[0].rectangles
        if size(whole.queries) == q.shape[1] and whole.keys == ((0, k.shape[1]),):
            return _flash_backward(dout, q, k, v, out, lse, scale)
    # Sums over calls are float32 whatever the inputs.
    dq, dk, dv = (torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (q, k, v))
    if not dq.numel():
        plans = ()  # the kernels divide by the batch and by the heads
    tensors = dout, q, k, v, out, lse, dq, dk, dv
    for sample, its_plan in zip(samples_of(plans), plans, strict=True):
        its_tensors = [t[sample] for t in tensors]
        for rectangle in its_plan.rectangles:
            _backward_one(rectangle, scale, *its_tensors)
        for start, end in its_plan.alone:
            dv[sample, start:end] += dout[sample, start:end]
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _backward_one(rectangle, scale, dout, q, k, v, out, lse, dq, dk, dv):
    for queries in _blocks(rectangle.queries):
        for samples, heads in _lots(q, size(queries)):
            lot = samples, slice(None), heads
            its_dout, its_q, its_out = (take(t[lot], queries) for t in (dout, q, out))
            its_lse = take(lse[samples, heads], queries, dim=2)
            for keys in _blocks(rectangle.keys):
                its_k, its_v = take(k[lot], keys), take(v[lot], keys)
                parts = _flash_backward(its_dout, its_q, its_k, its_v, its_out, its_lse, scale)
                _add(dq[lot], queries, parts[0])
                _add(dk[lot], keys, parts[1])
                _add(dv[lot], keys, parts[2])
                del parts  # before the next call makes its own


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(B, N, heads, E) attention and its lse (B, heads, N), by PyTorch's kernel of the device."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return out.transpose(1, 2), lse


def _flash_backward(dout, q, k, v, out, lse, scale):
    dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, q, k, v, out))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, False, scale=scale
    )
    return tuple(grad.transpose(1, 2) for grad in grads)


def _add(tensor: Tensor, ranges: Ranges, part: Tensor) -> None:
    for (start, end), (a, b) in zip(ranges, places(ranges), strict=True):
        tensor[:, start:end] += part[:, a:b]


def _blocks(ranges: Ranges) -> Iterator[Ranges]:
    """The ranges, in order, in groups of MOST_TOKENS tokens; the last group may be smaller."""
    block: list[Range] = []
    room = MOST_TOKENS
    for start, end in ranges:
        while start < end:
            stop = min(end, start + room)
            block.append((start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield tuple(block)
                block, room = [], MOST_TOKENS
    if block:
        yield tuple(block)
