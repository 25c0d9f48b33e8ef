"""NaN and infinity: found before they reach a weight, on every rank at once, and named."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvid.training.config import RunConfig
from fastvid.training.distributed import local, total, whole
from fastvid.training.log import Log
from fastvid.training.state import TrainState

_log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Training met NaN or infinity and its policy ended the run; checkpoints are from before."""


@dataclass(frozen=True)
class Verdict:
    """What all ranks agree on after a backward pass."""

    loss: float  # mean over the whole batch
    norm: float  # of the gradient, before clipping
    finite: bool
    stop: bool  # a rank was asked to stop


def judge(state: TrainState, loss: Tensor, *, clip: float, stop: bool) -> Verdict:
    """Clip the gradient, and agree whether this step may update the weights."""
    grads = [p.grad for p in state.trainable.values() if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(grads))
    numbers = torch.stack([loss.float(), norm.float()]).cpu()
    bad = not numbers.isfinite().all()
    if clip and not bad:  # a gradient scaled by NaN no longer tells where the NaN came from
        torch.nn.utils.clip_grads_with_norm_(list(state.trainable.values()), clip, norm)
    size = state.world.size
    shared, bads, stops = total([numbers[0].item() / size, bad, stop], state.world).tolist()
    return Verdict(shared, numbers[1].item(), finite=not bads, stop=stops > 0)


def leave_out(
    state: TrainState,
    verdict: Verdict,
    loss: Tensor,
    paths: Sequence[str],
    run: RunConfig,
    log: Log,
) -> None:
    """Report a step whose update must not happen, and end the run where its policy says so.

    Raises:
        NonFiniteError: the policy is "stop", or `skip_limit` steps in a row were left out before.
    """
    state.left_out += 1
    state.left_out_in_row += 1
    step = state.step + 1
    bad = _first_bad(state, loss)
    if bad:
        _log.warning("rank %d, step %d: %s of %s", state.world.rank, step, bad, ", ".join(paths))
    names = ["", "the loss", *(f"the gradient of {name}" for name in state.trainable)]
    seen = torch.zeros(state.world.size, dtype=torch.float64)
    seen[state.world.rank] = names.index(bad)
    found = {rank: names[int(n)] for rank, n in enumerate(total(seen, state.world)) if n}
    found = found or {0: "the norm of the gradient"}
    log.line("nonfinite", step, ranks=found, left_out=state.left_out)
    what = f"NaN or infinity at step {step}: " + ", ".join(
        f"rank {rank} in {name}" for rank, name in found.items()
    )
    if run.on_nonfinite == "stop":
        raise NonFiniteError(
            f"{what}. No weight was updated and earlier checkpoints are sound. Look at the clips "
            "named above, lower optim.lr, or set run.on_nonfinite to 'skip'"
        )
    if state.left_out_in_row > run.skip_limit:
        raise NonFiniteError(f"{what}, and in the {run.skip_limit} steps before: giving up")
    log.say(f"{what}; update left out, {state.left_out} so far")


def _first_bad(state: TrainState, loss: Tensor) -> str:
    """What is not finite on this rank, in order of cause; empty if nothing is."""
    if not loss.isfinite():
        return "the loss"
    for name, p in state.trainable.items():
        if p.grad is not None and not local(p.grad).isfinite().all():
            return f"the gradient of {name}"
    return ""
