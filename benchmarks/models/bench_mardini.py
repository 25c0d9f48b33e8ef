"""MarDini against plain PyTorch, and the paper's table: `python -m benchmarks models mardini`.

Whole videos, 1 frame known and the others made: the planner once, then DDIM, with guidance or,
as the paper's seconds fit, without; a denoising step; forward and backward of a training step. Both
sides load the same weights, and the match of their results stands in the row of their times. What a
codec does is not part of it. `--paper` measures the cells of the paper's tables.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import command
from benchmarks.models.command import thinned
from benchmarks.papers import work
from benchmarks.papers.tables import PUBLISHED
from benchmarks.rivals.mardini_eager import MarDiniEager
from fastvid.diffusion.sampling import sample_ddim
from fastvid.diffusion.schedule import rescale_zero_terminal_snr, respace, scaled_linear
from fastvid.models.mardini import (
    MARDINI_L_T,
    MARDINI_S_T,
    MARDINI_TINY,
    Condition,
    MarDini,
    MarDiniConfig,
)

GUIDANCE = 2.5  # of image-to-video
JOBS = ("sample", "forward", "backward")
SIZES = {"tiny": MARDINI_TINY, "S": MARDINI_S_T, "L": MARDINI_L_T}


def config_of(spec: dict[str, Any]) -> MarDiniConfig:
    config = SIZES[spec["size"]]
    cells = spec["side"] // 8
    side = min(config.planner.side, cells) if spec["asymmetric"] else cells
    planner = replace(config.planner, side=side)
    attention = "time" if spec["temporal"] else "clip"
    generator = replace(config.generator, attention=attention)
    if spec["quick"]:
        planner, generator = replace(planner, depth=2), replace(generator, depth=2)
    frames = max(config.frames, spec["frames"])
    return replace(config, frames=frames, planner=planner, generator=generator)


def make(config: MarDiniConfig) -> MarDini:
    """A model in which no layer is zero, which would hide what is before it."""
    torch.manual_seed(0)
    model = MarDini(config)
    layers = [m.fc2 for m in model.modules() if isinstance(m, Condition)]
    for layer in [*layers, model.generator.final_condition, model.generator.final]:
        torch.nn.init.normal_(layer.weight, std=0.02)
    return model


def prepare(spec: dict[str, Any]) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    """A contender's model and inputs, as its call and what saves the results of the first one."""
    torch.set_num_threads(spec["threads"])
    device, dtype = torch.device(spec["device"]), getattr(torch, spec["dtype"])
    config, ours = config_of(spec), spec["rival"] == "fastvid"
    with device:
        model: Any = make(config)
    if not ours:
        weights = model.state_dict()
        with torch.device("meta"):
            model = MarDiniEager(config)
        model.load_state_dict(weights, assign=True)
    inference = spec["job"] != "backward"
    model = model.to(dtype).train(not inference).requires_grad_(not inference)
    run = torch.compile(model) if spec["compile"] else model

    generator = torch.Generator().manual_seed(1)
    cells, T, B = spec["side"] // 8, spec["frames"], spec["batch"]
    sizes = (cells, cells), (config.planner.side, config.planner.side)
    latents, low = (
        torch.randn(B, config.channels, T, *size, generator=generator).to(device, dtype)
        for size in sizes
    )
    timestep = torch.full((B,), 500, device=device)
    known = torch.zeros(B, T, dtype=torch.bool)
    known[:, 0] = True
    if not ours:
        known = known.to(device)

    def plan(without: bool = False) -> dict[str, Any]:
        """What a call reads of the plan, or, `without` one, in its place."""
        if not ours:
            tokens = 1 if not without else config.planner.side**2
            return {"signal": None if without else model.plan(low, known), "tokens": tokens}
        return {"planning": model.project(None if without else model.plan(low, known))}

    whole = rescale_zero_terminal_snr(scaled_linear(1000))
    schedule = respace(whole, spec["steps"], spacing="trailing")
    seen = known.to(device)

    def sample() -> Tensor:
        with torch.inference_mode():
            condition, none = plan(), plan(without=True)

            def predict(x: Tensor, t: Tensor, known: Tensor | None = None) -> Tensor:
                found = call(x, t, **condition)
                if not spec["guided"]:
                    return found
                base = call(x, t, **none)
                return base + GUIDANCE * (found - base)

            return sample_ddim(
                predict, latents, schedule, known=seen, clean=latents, prediction="v"
            )

    def call(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return run(x, t, known=known, **condition)

    with torch.inference_mode():
        ready = plan() if spec["job"] == "forward" else {}

    def forward() -> Tensor:
        with torch.inference_mode():
            return call(latents, timestep, **ready)

    def backward() -> Tensor:
        model.zero_grad()
        condition = {"low": low} if ours else plan()
        found = call(latents, timestep, **condition)
        (found.float() - latents.float()).square().mean().backward()
        return found

    def save(result: Tensor) -> None:
        results = {"result": result.detach().float().cpu()}
        if not inference:
            grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
            results |= {f"gradient of {name}": thinned(grad) for name, grad in grads.items()}
        torch.save(results, spec["save"])

    return {"sample": sample, "forward": forward, "backward": backward}[spec["job"]], save


def measure(spec: dict[str, Any], **pace: Any) -> dict[str, Any]:
    """One row; `pace` as `command.measure` takes it."""
    config = config_of(spec)
    with torch.device("meta"):
        weights = sum(value.numel() for value in MarDini(config).parameters())
    tokens = spec["frames"] * (spec["side"] // 8) ** 2
    pairs = (spec["frames"] * config.planner.side**2) ** 2
    pairs = pairs if spec["temporal"] else max(pairs, tokens**2)
    need = 1000 + (8 * weights + 8 * spec["batch"] * pairs) / 2**20  # the rival's bias, twice
    if spec["job"] == "backward":  # about 40 streams of the width per block are kept
        need += 160 * spec["batch"] * tokens * config.generator.dim * config.generator.depth / 2**20
    return command.measure(__spec__.name, label(spec), spec, need, **pace) | counts(spec)


def counts(spec: dict[str, Any]) -> dict[str, Any]:
    """What stands beside the seconds: the paper's cell, tokens, FLOPs, and what is part of it."""
    known = {"patch": config_of(spec).generator.patch, "decoded": False, "weights": spec["dtype"]}
    if spec["job"] == "backward" or spec["batch"] > 1 or spec["guided"]:
        return known
    options = {name: spec[name] for name in ("temporal", "asymmetric")}
    config, cells = config_of(spec), spec["side"] // 8
    if spec["job"] == "sample":
        done = work.mardini_of(config, spec["frames"], cells, steps=spec["steps"])
    else:
        done = work.mardini_step(config, spec["frames"], cells)
    known |= {"tokens": done.tokens, "flops": done.flops}
    published = (spec["job"], spec["dtype"], spec["steps"], spec["quick"])
    if published == ("sample", "bfloat16", 25, False) and spec["size"] != "tiny":
        known |= {"paper": key(spec["size"], spec["frames"], spec["side"], **options)}
    return known


def key(size: str, frames: int, side: int, *, temporal: bool, asymmetric: bool) -> str:
    """The name of a cell of the paper's tables."""
    kind, resolution = ("T" if temporal else "ST"), ("a" if asymmetric else "") + "symmetric"
    return f"mardini/{size}/{kind} {resolution} {frames} frames {side}x{side}"


def label(spec: dict[str, Any]) -> str:
    """`mardini/sample L/T asymmetric frames=13 side=512 batch=1 bfloat16 25 steps`."""
    kind = "T" if spec["temporal"] else "ST"
    case = f"mardini/{spec['job']} {spec['size']}/{kind} {'a' * spec['asymmetric']}symmetric"
    case += " frames={frames} side={side} batch={batch} {dtype}".format(**spec)
    case += f" {spec['steps']} steps" if spec["job"] == "sample" else ""
    case += " guided" * spec["guided"]
    return case + " compiled" * spec["compile"] + " depth 2" * spec["quick"]


def within(spec: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The row in so many seconds at most; 0: in as few calls as give a spread."""
    return measure(spec, **command.within(seconds))


def specs(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """What the verbs `gpu` and, quick, `cpu_gate` measure, the most important first."""
    here = {"threads": torch.get_num_threads(), "device": device.type, "quick": quick}
    here |= {
        "batch": 1,
        "compile": False,
        "guided": False,
        "temporal": True,
        "asymmetric": True,
        "frames": 13,
    }
    if quick:
        small = {"size": "tiny", "side": 128, "dtype": "float32", "steps": 4, **here}
        return [{"job": "sample", **small, "guided": True}, {"job": "backward", **small}]
    large = {"size": "L", "side": 512, "dtype": "bfloat16", "steps": 25, **here}
    return [
        {"job": "sample", **large},
        {"job": "sample", **large, "side": 256},
        {"job": "sample", **large, "side": 256, "temporal": False, "frames": 9},
        {"job": "backward", **large, "size": "S", "side": 256},
    ]


def main(argv: list[str]) -> int:
    """0 when every result matches and no time ratio is below the floor."""
    parser = command.options("mardini", __doc__)
    parser.add_argument("--paper", action="store_true", help="the published cells, bfloat16")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["tiny"])
    parser.add_argument("--attention", nargs="+", choices=["T", "ST"], default=["T", "ST"])
    parser.add_argument(
        "--resolution", nargs="+", choices=["asymmetric", "symmetric"], default=["asymmetric"]
    )
    parser.add_argument("--frames", nargs="+", type=int, default=[13])
    parser.add_argument("--side", nargs="+", type=int, default=[128], help="pixels, 8 per cell")
    parser.add_argument("--job", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--guided", action="store_true", help="two calls a step, samples only")
    parser.add_argument("--steps", type=int, default=25, help="of DDIM in a sample")
    arguments = parser.parse_args(argv)
    return command.run(arguments, prepare, _asked(arguments), measure)


def _asked(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    fixed = ("batch", "steps", "compile")
    common = {name: getattr(arguments, name) for name in fixed}
    if arguments.paper:
        names = ("size", "temporal", "asymmetric", "frames", "side")
        for cell in PUBLISHED["mardini"]:
            published = {name: cell[name] for name in names}
            fixed_here = {"job": "sample", "dtype": "bfloat16", "steps": 25, "guided": False}
            yield common | published | fixed_here
        return
    for size, side, frames, dtype, kind, resolution, job in itertools.product(
        arguments.size,
        arguments.side,
        arguments.frames,
        arguments.dtype,
        arguments.attention,
        arguments.resolution,
        arguments.job,
    ):
        spec = {"job": job, "size": size, "frames": frames, "side": side, "dtype": dtype}
        spec |= {"temporal": kind == "T", "asymmetric": resolution == "asymmetric"}
        yield common | spec | {"guided": arguments.guided and job == "sample"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
