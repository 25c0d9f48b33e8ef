"""What the numbers on one H200 must be, the most important first.

The order is that of `python -m benchmarks gpu`: a run that is cut off has measured what stands
above. Shares are of the ceilings measured in the same run; an H200 copies about 4.3 TB/s (read and
written) and multiplies bfloat16 matrices at about 790 TFLOP/s, so 0.61 of matmul is 480 TFLOP/s.
"""

import fnmatch
from typing import Any, NamedTuple


class Goal(NamedTuple):
    """One number that a case has to reach.

    `column` is one of a row ("of_copy", "of_matmul", "wall_ratio_p50", "peak_ratio"), or "us" for
    microseconds, or "over RIVAL": the time of a rival that computed the same over ours, or "rate of
    CASE": our TFLOP/s over ours there.
    """

    case: str  # pattern of `Case.label`, or of a model's
    column: str
    goal: float
    stretch: float
    at_most: bool = False


# Hidden frames may cost a little beside what is visible: time <= factor x visible share x dense
# time, which is rate >= dense rate / factor.
GOALS = [
    Goal("masked_attention/dense 64 forward *", "of_matmul", 0.49, 0.56),
    Goal("masked_attention/dense 72 forward *", "of_matmul", 0.43, 0.49),
    Goal("masked_attention/dense 128 forward *", "of_matmul", 0.61, 0.71),
    Goal("masked_attention/dense 64 backward *", "of_matmul", 0.35, 0.42),
    Goal("masked_attention/dense 128 backward *", "of_matmul", 0.44, 0.54),
    Goal(
        "masked_attention/causal 16 forward *",
        "rate of masked_attention/dense 64 forward *",
        1 / 1.15,
        1 / 1.08,
    ),
    Goal("masked_attention/causal 16 forward *", "over flex", 1.1, 1.3),
    Goal("masked_attention/causal 16 forward *", "over eager", 5.0, 10.0),
    Goal("masked_attention/MarDini G joint forward *", "over sliced", 1.0, 1.1),
    Goal("masked_attention/VDT causal forward *", "over sliced", 1.5, 2.0),
    Goal("masked_attention/tables B=1 F=16 bool", "us", 30.0, 10.0, at_most=True),
    Goal(
        "asymmetric_attention/frame * forward * Nk=1024 * E=64 *",
        "rate of masked_attention/dense 64 forward *",
        0.75,
        0.85,
    ),
    Goal(
        "asymmetric_attention/frame 72 forward *",
        "rate of masked_attention/dense 72 forward *",
        0.75,
        0.85,
    ),
    Goal(
        "asymmetric_attention/clip * forward *",
        "rate of masked_attention/dense 64 forward *",
        0.85,
        0.95,
    ),
    Goal("asymmetric_attention/* pooled forward *", "of_copy", 0.75, 0.85),
    Goal("modulate/forward * N=53248 *", "of_copy", 0.87, 0.92),
    Goal("modulate/backward * N=53248 *", "of_copy", 0.75, 0.85),
    Goal("temporal_attention/forward* N=4096 *", "of_copy", 0.75, 0.85),
    Goal("qk_norm_rope/*forward*", "of_copy", 0.82, 0.88),
    Goal("qk_norm_rope/*backward*", "of_copy", 0.75, 0.82),
    Goal("guided_step/ddim B=1 C=16 T=13 H=64 W=64 float32", "us", 6.0, 5.0, at_most=True),
    Goal("guided_step/ddim B=32 * float32", "of_copy", 0.90, 0.94),
    Goal("pyramid_renoise/drawn B=1 C=16 T=1 H=48 W=80 *", "us", 5.0, 4.0, at_most=True),
    Goal("pyramid_renoise/given B=32 *", "of_copy", 0.87, 0.92),
    Goal("pyramid_renoise/drawn B=32 * float32", "of_copy", 0.65, 0.73),
    Goal("pyramid_renoise/drawn B=32 * bfloat16", "of_copy", 0.32, 0.36),
    Goal("noising/given B=64 *", "of_copy", 0.87, 0.92),
    Goal("noising/drawn B=64 *", "of_copy", 0.75, 0.85),  # bound by the draw, 6 bytes a normal
    Goal("noising/mse* B=64 *", "of_copy", 0.87, 0.92),
    Goal("vdt/step L/2 * bfloat16 compiled", "wall_ratio_p50", 1.3, 1.5),
    Goal("vdt/step L/2 * bfloat16 compiled", "peak_ratio", 0.7, 0.6, at_most=True),
    Goal("vdt/sample L/2 * bfloat16 compiled", "wall_ratio_p50", 1.3, 1.5),
    Goal("vdt/sample L/2 * bfloat16 compiled", "peak_ratio", 0.7, 0.6, at_most=True),
    Goal("mardini/sample L/T asymmetric frames=13 side=512 *", "of_matmul", 0.60, 0.70),
    Goal(
        "mardini/sample L/T asymmetric frames=13 side=512 *",
        "peak_mib",
        11_444,  # 12 GB
        9_500,
        at_most=True,
    ),
    Goal("vdt/step L/2 * bfloat16", "wall_ratio_p50", 2.0, 2.5),
    Goal("vdt/sample L/2 * bfloat16", "wall_ratio_p50", 2.0, 2.5),
    Goal("pyramid_flow/backward bfloat16", "wall_ratio_p50", 2.0, 2.5),
    Goal("pyramid_flow/call 2 bfloat16", "wall_ratio_p50", 2.0, 2.5),
    Goal(
        "masked_attention/known 4 of 16 forward *",
        "rate of masked_attention/dense 64 forward *",
        1 / 1.10,
        1 / 1.05,
    ),
    Goal(
        "masked_attention/known 12 of 16 forward *",
        "rate of masked_attention/dense 64 forward *",
        1 / 1.25,
        1 / 1.15,
    ),
]


def value_of(label: str) -> int:
    """How far up the list a case stands: 0 is first, and those without a goal are last."""
    places = (i for i, goal in enumerate(GOALS) if fnmatch.fnmatch(label, goal.case))
    return next(places, len(GOALS))


def measured(goal: Goal, rows: list[dict[str, Any]]) -> tuple[float, str] | None:
    """What was found in the case that comes off worst, and its best rival; None if not measured."""
    found = []
    for case in dict.fromkeys(
        row["case"] for row in rows if fnmatch.fnmatch(row["case"], goal.case)
    ):
        line_up = {row.get("rival", "fastvid"): row for row in rows if row["case"] == case}
        value = _value(goal, line_up, rows)
        if value is not None:
            found.append((value, best_rival(line_up)))
    worst = max if goal.at_most else min
    return worst(found, key=lambda each: each[0]) if found else None


def _value(goal: Goal, line_up: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    ours = line_up.get("fastvid", {})
    if not ours.get("match"):
        return None
    kind, _, what = goal.column.partition(" ")
    if kind == "us":
        return 1e3 * ours["p50_ms"] if "p50_ms" in ours else None
    if kind == "over":
        rival = line_up.get(what, {})
        return rival.get("ratio_p50") if rival.get("match") else None
    if kind == "rate":
        there = [r for r in rows if fnmatch.fnmatch(r["case"], what.removeprefix("of "))]
        rates = [r["tflop_per_s"] for r in there if r.get("rival") == "fastvid" and r.get("match")]
        return ours["tflop_per_s"] / rates[0] if rates else None
    return ours.get(goal.column)


def best_rival(line_up: dict[str, Any]) -> str:
    """The fastest one that computed the same: `flex 1.23x`, its time over ours."""
    others = [row for name, row in line_up.items() if name != "fastvid" and row.get("match")]
    best = min(
        (row for row in others if "ratio_p50" in row), key=lambda r: r["ratio_p50"], default=None
    )
    return f"{best['rival']} {best['ratio_p50']:.2f}x" if best else ""


def table(rows: list[dict[str, Any]]) -> str:
    """Goal, stretch, measured, and the best rival, for every goal."""
    wide = max(len(goal.case) for goal in GOALS)
    lines = [
        f"{'case':<{wide}} {'what':<14} {'goal':>7} {'stretch':>7} {'measured':>13}  best rival"
    ]
    for goal in GOALS:
        found = measured(goal, rows)
        says, rival = "not measured", ""
        if found:
            value, rival = found
            says = f"{value:.2f} {_verdict(goal, value)}"
        what = "rate of dense" if goal.column.startswith("rate") else goal.column
        sign = "<=" if goal.at_most else ">="
        wanted = f"{sign}{goal.goal:5.2f} {sign}{goal.stretch:5.2f}"
        lines.append(f"{goal.case:<{wide}} {what:<14} {wanted} {says:>13}  {rival}")
    return "\n".join(lines)


def _verdict(goal: Goal, value: float) -> str:
    def reached(bound: float) -> bool:
        return value <= bound if goal.at_most else value >= bound

    return "stretch" if reached(goal.stretch) else "yes" if reached(goal.goal) else "NO"
