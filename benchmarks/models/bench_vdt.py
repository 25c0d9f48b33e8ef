"""VDT against the official order of operations: `python -m benchmarks models vdt`.

Forward, forward + backward, an AdamW step and DDIM sampling of S/2 and L/2 at 128 pixels and more.
The match is that of the predictions or samples, or of the gradients of the input and of every
parameter, and of what the step changed.
"""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import command
from benchmarks.models.command import Results, thinned
from benchmarks.rivals.vdt_eager import VDTEager
from fastvid.diffusion.sampling import sample_ddim
from fastvid.diffusion.schedule import linear, respace
from fastvid.models.vdt import VDT, VDT_L, VDT_S, VDTConfig
from fastvid.models.vdt_official import layout as official_layout

JOBS = ("forward", "backward", "step", "sample")
SIZES = {"S": VDT_S, "L": VDT_L}


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
    return {name: thinned(value) for name, value in values.items()}


def measure(spec: dict[str, Any], **pace: Any) -> dict[str, Any]:
    """One row; `pace` as `command.measure` takes it."""
    config, wide = config_of(spec), 2 if spec["dtype"] == "bfloat16" else 4
    with torch.device("meta"):
        weights = sum(value.numel() for value in VDT(config).parameters())
    copies = {"forward": 2, "sample": 2, "backward": 2, "step": 4}[spec["job"]]
    need = 1000 + 2 * weights * 4 / 2**20 if copies == 2 else 1000 + weights * copies * 4 / 2**20
    if spec["job"] in ("backward", "step"):  # about 30 streams of the width per block are kept
        tokens = spec["batch"] * config.frames * config.height * config.width // config.patch**2
        need += 30 * tokens * config.dim * config.depth * wide / 2**20
    return command.measure(__spec__.name, label(spec), spec, need, **pace)


def label(spec: dict[str, Any]) -> str:
    """`vdt/step L/2 frames=16 side=128 batch=4 bfloat16 compiled`, ` depth 2` where quick."""
    case = "vdt/{job} {size}/2 frames={frames} side={side} batch={batch}".format(**spec)
    case += f" steps={spec['steps']}" * (spec["job"] == "sample")
    return f"{case} {spec['dtype']}" + " compiled" * spec["compile"] + " depth 2" * spec["quick"]


def within(spec: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The row in so many seconds at most; 0: in as few calls as give a spread."""
    return measure(spec, **command.within(seconds))


def specs(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """What the verbs `gpu` and, quick, `cpu_gate` measure, the most important first."""
    here = {"threads": torch.get_num_threads(), "device": device.type, "quick": quick, "steps": 10}
    if quick:
        small = {"size": "S", "frames": 16, "side": 128, "dtype": "float32", "batch": 1}
        small["compile"] = False
        return [{"job": job, **small, **here} for job in ("forward", "step")]
    large = {"size": "L", "frames": 16, "side": 128, "dtype": "bfloat16", "batch": 4}
    rows = [
        {"job": job, **large, "compile": compiled, **here}
        for compiled in (True, False)
        for job in ("step", "sample")
    ]
    # The batches that are told to fit into 80 and into 48 GB.
    alone = {**large, "dtype": "float32", "compile": False, **here}
    return rows + [{"job": "step", **alone, "batch": batch} for batch in (16, 6)]


def main(argv: list[str]) -> int:
    """0 when every result matches and no time ratio is below the floor."""
    parser = command.options("vdt", __doc__)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["S", "L"])
    parser.add_argument("--frames", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--side", nargs="+", type=int, default=[128], help="pixels, 8 per cell")
    parser.add_argument("--job", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--steps", type=int, default=10, help="of DDIM in a sample")
    asked = parser.parse_args(argv)
    fixed = {name: getattr(asked, name) for name in ("batch", "steps", "compile")}
    names = ("size", "side", "frames", "dtype", "job")
    chosen = itertools.product(*(getattr(asked, name) for name in names))
    specs = ({**dict(zip(names, each, strict=True)), **fixed} for each in chosen)
    return command.run(asked, prepare, specs, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
