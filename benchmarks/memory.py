"""Peak memory of one rival of one case, alone in a fresh process: `kernels --memory`."""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import run
from benchmarks.models.duel import Contender, serve

CPU = torch.device("cpu")


def peaks(row: dict[str, Any], quick: bool) -> dict[str, float]:
    """`peak_mib` and, beyond what was there before the call, `extra_mib`; {} of no measured row."""
    if "p50_ms" not in row:
        return {}
    names = "room", "case", "rival", "threads"
    with Contender(__spec__.name, {**{n: row[n] for n in names}, "quick": quick}) as contender:
        found = contender.finish()
    peak = found["peak_mib"]
    return {"peak_mib": peak, "extra_mib": peak - found["baseline_mib"]}


def prepare(spec: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """The call, and nothing to keep of its result."""
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    found = run.cases(spec["room"], CPU, spec["quick"])
    (case,) = (case for case in found if case.label == spec["case"])
    return case.rivals[spec["rival"]](*case.make_inputs(CPU)), lambda result: None


if __name__ == "__main__":
    asked = json.loads(sys.argv[-1])  # --contender SPEC
    serve(lambda: prepare(asked), CPU)
