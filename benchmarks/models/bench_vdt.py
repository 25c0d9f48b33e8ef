"""VDT against the official order of operations: `python -m benchmarks.models.bench_vdt`.

Forward, forward + backward, an AdamW step and DDIM sampling of S/2 and L/2 at 128 pixels and more.
Both sides load the same weights; the match of their results stands in the row of their times:
the predictions or samples, or the gradients of the input and of every parameter, and what the step
changed. float32 is held to the rival's float32, bfloat16 to at most twice the rival's error.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, machine, rows
from benchmarks.models.duel import Contender, duel, serve
from benchmarks.rivals.vdt_eager import VDTEager
from fastvid.diffusion.sampling import sample_ddim
from fastvid.diffusion.schedule import linear, respace
from fastvid.models.vdt import VDT, VDT_L, VDT_S, VDTConfig
from fastvid.models.vdt_official import layout as official_layout

JOBS = ("forward", "backward", "step", "sample")
SIZES = {"S": VDT_S, "L": VDT_L}
TOLERANCE = 1e-4  # of float32, which the sampler carries along and gradients add up
VALUES = 4096  # compared per tensor, evenly spaced
Results = dict[str, Tensor]


def config_of(spec: dict[str, Any]) -> VDTConfig:
    cells = spec["side"] // 8
    config = replace(SIZES[spec["size"]], frames=spec["frames"], height=cells, width=cells)
    config = replace(config, drop_labels=False)
    return replace(config, depth=2) if spec["quick"] else config


def prepare(spec: dict[str, Any]) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    """A contender's model and inputs, as its call and what saves the results of the first one."""
    torch.set_num_threads(spec["threads"])
    device, dtype = torch.device(spec["device"]), getattr(torch, spec["dtype"])
    config = config_of(spec)
    torch.manual_seed(0)
    with device:
        model: torch.nn.Module = VDT(config)
    for weight in (model.modulation.weight, model.final.weight):  # zeros would hide the blocks
        torch.nn.init.normal_(weight, std=0.02)
    inference = spec["job"] in ("forward", "sample")
    weights = model.to_official_state_dict()  # by both: it loads modules that weigh 150 MiB
    if spec["rival"] == "eager":
        with torch.device("meta"):
            model = VDTEager(config)
        model.load_state_dict(weights, assign=True)
    elif inference:
        model.fold()
    model = model.to(dtype).train(not inference)
    if inference:
        model.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    run = torch.compile(model) if spec["compile"] else model

    generator = torch.Generator().manual_seed(1)
    shape = (spec["batch"], config.channels, config.frames, config.height, config.width)
    latents, target = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    timestep = torch.randint(1000, (spec["batch"],), generator=generator).to(device)

    def predict(x: Tensor, t: Tensor, known: Tensor | None = None) -> Tensor:
        if spec["rival"] == "fastvid":
            return run(x, t)
        return run(x.transpose(1, 2), t.expand(len(x))).transpose(1, 2)

    # The large eps keeps the step a smooth function of the gradients, which can be compared.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3, fused=True)
    schedule = respace(linear(1000), f"ddim{spec['steps']}")

    def forward() -> Tensor:
        with torch.inference_mode():
            return predict(latents, timestep)

    def sample() -> Tensor:
        with torch.inference_mode():
            return sample_ddim(predict, latents, schedule)

    def backward() -> Tensor:
        model.zero_grad()
        x = latents.detach().requires_grad_()
        noise = predict(x, timestep)[:, : config.channels]
        (noise.float() - target.float()).square().mean().backward()
        return x.grad

    def step() -> Tensor:
        gradient = backward()
        optimizer.step()
        return gradient

    thunk = {"forward": forward, "backward": backward, "step": step, "sample": sample}[spec["job"]]
    before = {} if inference else _official(model, config, trained)  # a folded model has none

    def save(result: Tensor) -> None:
        results = {"result": result.float().cpu()}
        if not inference:
            found = _official(model, config, {name: p.grad for name, p in trained.items()})
            results |= {f"gradient of {name}": value for name, value in found.items()}
        if spec["job"] == "step":
            after = _official(model, config, trained)
            results |= {f"change of {name}": after[name] - before[name] for name in after}
        torch.save(results, spec["save"])

    return thunk, save


def _official(model: torch.nn.Module, config: VDTConfig, values: Results) -> Results:
    """Some of the values of each tensor, in float32, under the official names."""
    if isinstance(model, VDT):
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        layout = official_layout(config, shapes)
        values = {
            official: piece
            for name, value in values.items()
            for official, piece in zip(
                layout[name],
                value.detach().flatten().split([math.prod(s) for s in layout[name].values()]),
                strict=True,
            )
        }
    flat = {name: value.detach().flatten() for name, value in values.items()}
    return {k: v[:: -(-len(v) // VALUES)].float().cpu().clone() for k, v in flat.items()}


def errors(results: Results, exact: Results) -> dict[str, float]:
    """The relative error (root mean square) of each tensor.

    Where a tensor is below a hundredth of its kind (results, gradients, changes), of that: some
    gradients, as those of the keys' biases, are nothing but rounding.
    """
    if results.keys() != exact.keys():
        raise RuntimeError(f"only one side has {sorted(results.keys() ^ exact.keys())}")
    sizes = {name: value.square().mean().sqrt().item() for name, value in exact.items()}
    floors: dict[str, float] = {}
    for name, size in sizes.items():
        kind = name.split()[0]
        floors[kind] = max(floors.get(kind, 0.0), size / 100)
    return {
        name: (results[name] - value).square().mean().sqrt().item()
        / max(sizes[name], floors[name.split()[0]])
        for name, value in exact.items()
    }


def agree(ours: dict[str, float], theirs: dict[str, float]) -> bool:
    """No error of ours is above twice theirs and the tolerance."""
    return all(error <= max(2 * theirs[name], TOLERANCE) for name, error in ours.items())


def measure(spec: dict[str, Any], *, limit: float = math.inf, **pace: Any) -> dict[str, Any]:
    """One row: times, memory and the match; `pace` is the turns, rounds and seconds of the duel.

    Raises:
        RuntimeError: it cannot be measured in `limit` seconds.
    """
    end = time.monotonic() + limit
    config, wide = config_of(spec), 2 if spec["dtype"] == "bfloat16" else 4
    with torch.device("meta"):
        weights = sum(value.numel() for value in VDT(config).parameters())
    copies = {"forward": 2, "sample": 2, "backward": 2, "step": 4}[spec["job"]]
    need = 1000 + 2 * weights * 4 / 2**20 if copies == 2 else 1000 + weights * copies * 4 / 2**20
    if spec["job"] in ("backward", "step"):  # about 30 streams of the width per block are kept
        tokens = spec["batch"] * config.frames * config.height * config.width // config.patch**2
        need += 30 * tokens * config.dim * config.depth * wide / 2**20
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder, name)) for name in ("fastvid", "eager", "exact")}
        specs = {name: {**spec, "rival": name, "save": file} for name, file in files.items()}
        exact = specs.pop("exact") | {"rival": "eager", "dtype": "float32", "compile": False}
        if spec["dtype"] == "float32":
            files["exact"] = files["eager"]
        else:
            with Contender(__spec__.name, exact, end) as contender:
                contender.finish()
        row = duel(__spec__.name, specs, **pace, need_mib=need, end=end)
        found = {name: torch.load(file, weights_only=True) for name, file in files.items()}
    ours, theirs = (errors(found[name], found["exact"]) for name in ("fastvid", "eager"))
    row |= {"error": max(ours.values()), "eager_error": max(theirs.values())}
    row["match"] = agree(ours, theirs)
    return {"case": label(spec), **spec, **row}


def label(spec: dict[str, Any]) -> str:
    """`vdt/step L/2 frames=16 side=128 batch=4 bfloat16 compiled`, ` depth 2` where quick."""
    case = "vdt/{job} {size}/2 frames={frames} side={side} batch={batch} {dtype}".format(**spec)
    return case + " compiled" * spec["compile"] + " depth 2" * spec["quick"]


def within(spec: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The row in so many seconds at most; 0: in as few calls as give a spread."""
    return measure(spec, turns=1, rounds=5, seconds=seconds / 4, limit=seconds or math.inf)


def specs(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """What the verbs `gpu` and, quick, `cpu_gate` measure, the most important first."""
    here = {"threads": torch.get_num_threads(), "device": device.type, "quick": quick, "steps": 10}
    if quick:
        small = {"size": "S", "frames": 16, "side": 128, "dtype": "float32", "batch": 1}
        small["compile"] = False
        return [{"job": job, **small, **here} for job in ("forward", "step")]
    large = {"size": "L", "frames": 16, "side": 128, "dtype": "bfloat16", "batch": 4}
    return [
        {"job": job, **large, "compile": compiled, **here}
        for compiled in (True, False)
        for job in ("step", "sample")
    ]


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['case']:<53} {row['fastvid_p50_ms']:9.0f} ms against {row['eager_p50_ms']:9.0f}"
        f"   {row['wall_ratio_p50']:5.2f}x ({row['wall_ratio_p20']:.2f} to"
        f" {row['wall_ratio_p80']:.2f}; cpu time {row['cpu_ratio_p50']:.2f}x)"
        f"   peak {row['fastvid_peak_mib']:6.0f} MiB, {row['peak_ratio']:.2f} of theirs,"
        f" beyond the weights {row['extra_ratio']:.2f}"
        f"   {'match' if row['match'] else 'NO MATCH'} ({row['error']:.0e})"
        f"{' one after the other' if row['apart'] else ''}"
    )


def main(argv: list[str]) -> int:
    """0 when every result matches and no time ratio is below the floor."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.bench_vdt", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="two blocks, few rounds")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["S", "L"])
    parser.add_argument("--frames", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--side", nargs="+", type=int, default=[128], help="pixels, 8 per cell")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--job", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--steps", type=int, default=10, help="of DDIM in a sample")
    parser.add_argument("--turns", type=int, default=3, help="pairs of fresh processes per row")
    parser.add_argument("--rounds", type=int, default=3, help="per turn, at least")
    parser.add_argument("--seconds", type=float, default=5, help="per turn, at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--floor", type=float, default=0, help="fail below this time ratio")
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file")
    parser.add_argument("--save", action="store_true", help="renew them in benchmarks/results")
    arguments = parser.parse_args(argv)
    if arguments.contender:
        spec = json.loads(arguments.contender)
        serve(lambda: prepare(spec), torch.device(spec["device"]))
        return 0
    with machine.pinned(arguments.threads):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device)
    here = machine.environment(device) | machine.measure_ceilings(device, arguments.quick)
    print(f"{here['machine']}, torch {here['torch']}, {arguments.threads} threads")
    good = True
    for size, side, frames, dtype, job in itertools.product(
        arguments.size, arguments.side, arguments.frames, arguments.dtype, arguments.job
    ):
        fixed = ("batch", "steps", "compile", "threads", "device", "quick")
        spec = {"job": job, "size": size, "frames": frames, "side": side}
        spec |= {"dtype": dtype}
        spec |= {name: getattr(arguments, name) for name in fixed}
        turns, rounds, seconds = arguments.turns, arguments.rounds, arguments.seconds
        if arguments.quick:
            turns, rounds, seconds = 1, 2, 0
        row = {**here, **measure(spec, turns=turns, rounds=rounds, seconds=seconds)}
        print(line(row), flush=True)
        harness.append(arguments.out, [row])
        if arguments.save:
            rows.save(rows.RESULTS / machine.folder(device) / "vdt.jsonl", [row])
        good = good and row["match"] and row["wall_ratio_p50"] >= arguments.floor
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
