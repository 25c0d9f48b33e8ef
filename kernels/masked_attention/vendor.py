"""PyTorch's own attention on a GPU, one call per group of query frames that see the same keys.

It serves calls without a gradient only, since its backward may differ from run to run, and only a
Visibility that the host was told: the groups are made there, and nothing is read back.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._shared.visibility import Visibility
from .plan import Plan, places, plans_of, samples_of, size, take


class Rule(NamedTuple):
    """Few and huge groups."""

    rows: int  # query rows of the smallest group, at least
    calls: int  # groups of the whole batch, at most


NOTHING_HIDDEN = Rule(rows=1, calls=1)  # at any size
# The compute capabilities on which groups in 16 bits were measured to beat the kernel, and from
# where on. Not measured yet: the kernel takes them all.
FASTER_ON: dict[tuple[int, int], Rule] = {}


def plans_for(
    q: Tensor, k: Tensor, visibility: Visibility, wants_gradient: bool
) -> tuple[Plan, ...] | None:
    """The groups of a call that PyTorch's attention takes, None where the room's kernel does."""
    if wants_gradient or not q.numel():
        return None
    rule = _rule(q, visibility)
    plans = None if rule is None else grouped(visibility, q.shape[1], k.shape[1])
    return plans if rule and plans and _serves(rule, plans) else None


def _rule(q: Tensor, visibility: Visibility) -> Rule | None:
    if not (visibility.sees_all or FASTER_ON):
        return None  # without a look at the device
    capability = _capability(q)
    if capability is None:
        return None
    if visibility.sees_all:
        return NOTHING_HIDDEN
    return None if q.dtype == torch.float32 else FASTER_ON.get(capability)


def grouped(visibility: Visibility, tokens: int, keys: int) -> tuple[Plan, ...] | None:
    """One rectangle per group of frames that see the same keys; None if the host cannot know."""
    told = visibility.on_host()
    if told is None:
        return None
    return plans_of(told.rows, told.row_spans, tokens, keys, together=0)


def _serves(rule: Rule, plans: tuple[Plan, ...]) -> bool:
    groups = [size(queries) for plan in plans for queries, _ in plan.rectangles]
    return len(groups) <= rule.calls and min(groups, default=0) >= rule.rows


def _capability(q: Tensor) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(q.device) if q.is_cuda else None


def attend(q: Tensor, k: Tensor, v: Tensor, plans: tuple[Plan, ...], scale: float) -> Tensor:
    """(B, N, heads, E), contiguous; `plans` are those of `grouped`. Differentiable."""
    batch = []
    for sample, plan in zip(samples_of(plans), plans, strict=True):
        its_q, its_k, its_v = q[sample], k[sample], v[sample]
        pieces = {start: its_v[:, start:end] for start, end in plan.alone}
        pieces |= {start: torch.zeros_like(its_q[:, start:end]) for start, end in plan.blind}
        for queries, keys in plan.rectangles:
            part = _sdpa(take(its_q, queries), take(its_k, keys), take(its_v, keys), scale)
            for (start, _), (a, b) in zip(queries, places(queries), strict=True):
                pieces[start] = part[:, a:b]
        batch.append(_joined([pieces[start] for start in sorted(pieces)], dim=1))
    return _joined(batch, dim=0).contiguous()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
