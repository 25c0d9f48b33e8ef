"""A MarDini small enough for every test, its plain peer, and clips for both."""

from dataclasses import replace

import torch

from benchmarks.rivals.mardini_eager import MarDiniEager
from fastvid.models.mardini import GeneratorConfig, MarDini, MarDiniConfig, PlannerConfig
from tests.models.tiny import redraw

TINY = MarDiniConfig(
    channels=4,
    frames=6,
    planner=PlannerConfig(dim=64, depth=2, mlp=96, heads=2, side=4),
    generator=GeneratorConfig(dim=32, depth=2, mlp=64, heads=2),
)


def config_of(planner=None, **generator):
    """TINY with other fields of the generator, and of the planner."""
    return replace(
        TINY,
        planner=replace(TINY.planner, **(planner or {})),
        generator=replace(TINY.generator, **generator),
    )


def models(config, dtype=torch.float32):
    """Ours and the plain peer on the same weights."""
    model = redraw(MarDini(config), std=0.2).to(dtype).eval()
    peer = MarDiniEager(config).to(dtype)
    peer.load_state_dict(model.state_dict())
    return model, peer


def clip(rand, model, known, height=6, width=4, dtype=torch.float32):
    """Latents, timesteps, `known` as bool and the low resolution."""
    known = torch.tensor(known, dtype=torch.bool)
    B, T = known.shape
    C = model.config.channels
    low = rand(B, C, T, *model.planning_size(height, width), dtype=dtype)
    timestep = torch.arange(B) * 400 + 7
    return rand(B, C, T, height, width, dtype=dtype), timestep, known, low
