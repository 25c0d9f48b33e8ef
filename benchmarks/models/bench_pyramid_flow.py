"""miniFLUX against the official order of operations: `python -m benchmarks models pyramid_flow`.

Four columns of packed training, forward and with the backward, and one call of a sampler at each
stage of unit 7, its history before it and guidance in the batch: 8 frames at 192 x 320 pixels, on
a network of 20.5 M parameters. The match is that of the velocities, or of the gradients
of every parameter.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import command
from benchmarks.models.command import thinned
from benchmarks.rivals.pyramid_eager import PyramidFluxEager
from fastvid.models.pyramid_columns import Column
from fastvid.models.pyramid_flow import PyramidFlux, PyramidFluxConfig

CONFIG = PyramidFluxConfig(
    heads=6, joint_blocks=2, single_blocks=4, text_width=512, pooled_width=256
)
HIGH, MIDDLE, LOW = (24, 40), (12, 20), (6, 10)  # latent cells of the three stages
TRAINING = {  # the clips of each column, (frames, size), the noisy one last, and its text
    "low": ([(2, LOW), (1, LOW)], (128,)),
    "middle": ([(1, LOW), (1, MIDDLE), (1, MIDDLE)], (60,)),
    "middle again": ([(1, LOW), (1, MIDDLE), (1, MIDDLE)], (90,)),
    "high": ([(3, LOW), (1, MIDDLE), (1, HIGH), (1, HIGH)], (20,)),
}
PROMPTS = (128, 60)  # of the branches of guidance
CALLS = {  # of unit 7
    "call 0": ([(7, LOW), (1, LOW)], PROMPTS),
    "call 1": ([(6, LOW), (1, MIDDLE), (1, MIDDLE)], PROMPTS),
    "call 2": ([(5, LOW), (1, MIDDLE), (1, HIGH), (1, HIGH)], PROMPTS),
}
JOBS = ("forward", "backward", *CALLS)
# The official code's CPU seconds at these sizes, one thread, on another machine: quoted beside
# ours, not compared.
OFFICIAL = {"forward": 0.515, "backward": 1.527, "call 0": 0.176, "call 1": 0.248, "call 2": 0.610}
TEXT = 128


def config_of(spec: dict[str, Any]) -> PyramidFluxConfig:
    return replace(CONFIG, joint_blocks=1, single_blocks=1) if spec["quick"] else CONFIG


def columns_of(spec: dict[str, Any], dtype: torch.dtype) -> list[Column]:
    """The inputs of a job, the same in every process."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(spec["device"], dtype)

    job = spec["job"]
    plans = [CALLS[job]] if job in CALLS else list(TRAINING.values())
    columns = []
    for clips, lengths in plans:
        B = len(lengths)
        *history, noisy = (draw(B, CONFIG.channels, frames, *size) for frames, size in clips)
        timestep = torch.rand(1, generator=generator).expand(B) * 1000
        text, pooled = draw(B, TEXT, CONFIG.text_width), draw(B, CONFIG.pooled_width)
        timestep = timestep.to(spec["device"])
        columns.append(Column(noisy, timestep, text, torch.tensor(lengths), pooled, history))
    return columns


def prepare(spec: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """A contender's model and inputs, as its call and what saves the results of the first one."""
    torch.set_num_threads(spec["threads"])
    dtype, training = getattr(torch, spec["dtype"]), spec["job"] == "backward"
    config = config_of(spec)
    torch.manual_seed(0)
    model: torch.nn.Module = PyramidFlux(config)
    for name, weight in model.named_parameters():  # zeros would hide the blocks
        if "modulation" in name or name == "final.weight":
            torch.nn.init.normal_(weight, std=0.02)
    if spec["rival"] == "eager":
        weights = model.to_official_state_dict()
        with torch.device("meta"):
            model = PyramidFluxEager(config)
        model.load_state_dict(weights, assign=True)
    model = model.to(spec["device"], dtype).requires_grad_(training)
    columns = columns_of(spec, dtype)
    predict = official(model, columns) if spec["rival"] == "eager" else ours(model, columns)
    targets = [torch.randn_like(column.latents.float()) for column in columns]

    def forward() -> list[Tensor]:
        with torch.inference_mode():
            return predict()

    def backward() -> list[Tensor]:
        model.zero_grad()
        outputs = predict()
        pairs = zip(outputs, targets, strict=True)
        sum((out.float() - target).square().mean() for out, target in pairs).backward()
        return outputs

    def save(outputs: list[Tensor]) -> None:
        results = {f"result {i}": out.detach().float().cpu() for i, out in enumerate(outputs)}
        if training:
            found = {name: p.grad for name, p in model.named_parameters()}
            if isinstance(model, PyramidFlux):
                found = model.official_names(found)
            results |= {f"gradient of {name}": thinned(value) for name, value in found.items()}
        torch.save(results, spec["save"])

    return backward if training else forward, save


def ours(model: torch.nn.Module, columns: list[Column]) -> Callable[[], list[Tensor]]:
    if len(columns) > 1:
        return lambda: model.packed(columns)
    arguments = columns[0]._asdict()
    latents, timestep = arguments.pop("latents"), arguments.pop("timestep")
    return lambda: [model(latents, timestep, **arguments)]


def official(model: torch.nn.Module, columns: list[Column]) -> Callable[[], list[Tensor]]:
    """The rival's call: rows of all columns in turn."""

    def in_turn(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts, 1).flatten(0, 1)

    samples = [[*column.history, column.latents] for column in columns]
    text, pooled, timestep, lengths = (
        in_turn([getattr(column, name) for column in columns])
        for name in ("text", "pooled", "timestep", "text_lengths")
    )
    valid = (torch.arange(TEXT) < lengths[:, None]).to(text.device)
    return lambda: model(samples, timestep, text, valid, pooled)


def measure(spec: dict[str, Any], **pace: Any) -> dict[str, Any]:
    """One row; `pace` as `command.measure` takes it."""
    row = command.measure(__spec__.name, label(spec), spec, 1500, **pace)
    return row | {"official_elsewhere_cpu_s": OFFICIAL[spec["job"]]}


def label(spec: dict[str, Any]) -> str:
    """`pyramid_flow/call 2 float32`, ` two blocks` where quick."""
    return "pyramid_flow/{job} {dtype}".format(**spec) + " two blocks" * spec["quick"]


def within(spec: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The row in so many seconds at most; 0: in as few calls as give a spread."""
    return measure(spec, **command.within(seconds))


def specs(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """What the verbs `gpu` and, quick, `cpu_gate` measure, the most important first."""
    here = {"threads": torch.get_num_threads(), "device": device.type, "quick": quick}
    if quick:
        jobs = ("backward", "call 2")
        return [{"job": job, "dtype": "float32", **here} for job in jobs]
    return [{"job": job, "dtype": "bfloat16", **here} for job in ("backward", "call 2")]


def main(argv: list[str]) -> int:
    """0 when every result matches and no time ratio is below the floor."""
    parser = command.options("pyramid_flow", __doc__)
    parser.add_argument("--job", nargs="+", choices=JOBS, default=JOBS)
    asked = parser.parse_args(argv)
    chosen = itertools.product(asked.dtype, asked.job)
    specs = ({"job": job, "dtype": dtype} for dtype, job in chosen)
    return command.run(asked, prepare, specs, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
