"""The pyramid's schedule, jumps and training columns against tensors of the official code.

Generic in file and config: a handler runs on every `pyramid_case*.safetensors` of `--parity-dir`
that holds its keys, at the tolerances that the page of these files states.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor

from fastvid.diffusion.pyramid import (
    ColumnDraws,
    PyramidSchedule,
    column_stages,
    pyramid_schedule,
    stage_steps,
    stage_timesteps,
    training_column,
    unit_counts,
)
from fastvid.diffusion.tables import euler_table
from fastvid.functional import (
    guided_step,
    latent_pyramid,
    noise_pyramid,
    pyramid_renoise,
)
from fastvid.kernels.pyramid_renoise.reference import block_noise, block_root
from tests.parity.reference import cases, under

KEYS = {
    "test_schedules": r"(\w+)\.start_sigmas",
    "test_steps": r"(\w+)\.steps(\d+)\.stage(\d+)\.x0",
    "test_jumps": r"([\w.]+)\.stage(\d+)\.block_noise",
    "test_block_covariance": r"([\w.]+)\.block_cov",
    "test_training_columns": r"(\w+)\.out\.col0\.target",
}


@cache
def load(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def pytest_generate_tests(metafunc):
    pattern = KEYS[metafunc.function.__name__]
    found = [
        pytest.param(path, match, id=f"{path.stem}:{match[0]}")
        for path in cases(metafunc.config, "pyramid_case*.safetensors")
        for match in (re.fullmatch(pattern, key) for key in load(path)[1])
        if match
    ]
    metafunc.parametrize(("path", "match"), found or [pytest.param(None, None, id="none")])


@pytest.fixture
def tensors(path, parity_dir):
    if path is None:
        pytest.skip(f"no such keys in {parity_dir}")
    return load(path)[1]


def schedule_of(config: str) -> PyramidSchedule:
    """The schedule of the official arguments; `stages` may be a count or a list."""
    official = json.loads(config)
    stages = official["stages"]
    return pyramid_schedule(
        stages if isinstance(stages, int) else len(stages),
        bounds=official["stage_range"],
        shift=official["shift"],
        gamma=official["gamma"],
        grid=official.get("num_train_timesteps", 1000),
    )


def near(actual: Tensor, expected: Tensor, atol: float, name: str = "") -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def test_schedules(path, match, tensors):
    name = match[1]
    schedule, own = schedule_of(load(path)[0][f"config_{name}"]), under(tensors, f"{name}.")
    columns = {
        "start_sigmas": [stage.start_sigma for stage in schedule.stages],
        "end_sigmas": [stage.end_sigma for stage in schedule.stages],
        "ori_start_sigmas": [1.0, *(stage.end_sigma for stage in schedule.stages[:-1])],
    }
    for column, found in columns.items():
        near(torch.tensor(found, dtype=torch.float64), own[column], 1e-7, column)
    jumps = [[stage.alpha, stage.beta] for stage in schedule.stages[1:]]
    near(torch.tensor(jumps, dtype=torch.float64), own["jump_alpha_beta"][1:], 1e-7, "jumps")
    for i, expected in enumerate(own["timesteps_per_stage"]):
        near(stage_timesteps(schedule, i), expected, 1e-4, f"timesteps of stage {i}")
    grid = 1 - torch.arange(schedule.grid) / schedule.grid
    near(grid.expand(len(schedule), -1), own["sigmas_per_stage"], 1e-7, "stage times")


def test_steps(path, match, tensors):
    name, count, stage = match[1], int(match[2]), int(match[3])
    schedule = schedule_of(load(path)[0][f"config_{name}"])
    own = under(tensors, match[0].removesuffix("x0"))
    found = stage_steps(schedule, stage, count)
    near(found.timesteps, own["timesteps"], 1e-4, "timesteps")
    near(found.stage_times, own["sigmas"], 1e-7, "stage times")
    x, table = own["x0"], euler_table(found.stage_times)
    for j, (velocity, expected) in enumerate(zip(own["velocity"], own["x_after"], strict=True)):
        near(guided_step(x, velocity, table, torch.tensor(j)), expected, 1e-6, f"step {j}")
        x = expected


def test_jumps(path, match, tensors):
    group, stage = match[1], int(match[2])
    own, shared = under(tensors, f"{group}.stage{stage}."), under(tensors, f"{group}.")
    gamma = -float(shared["block_cov"][0, 1])
    jump = pyramid_schedule(gamma=min(gamma, 1 / 3)).stages[stage]
    near(torch.tensor([jump.alpha, jump.beta]), own["alpha_beta"], 1e-7, "alpha and beta")
    x, blocks = own["prev"], own["block_noise"]
    levels = {"alpha": jump.alpha, "beta": jump.beta, "gamma": gamma}
    near(pyramid_renoise(x, **levels, noise=blocks), own["out"], 1e-6, "block noise given")
    B, C, T, H, W = x.shape
    normals = own["z"].view(B, C, T, H, W, 4)  # the official order of blocks is that of ours
    near(block_noise(normals, gamma), blocks, 1e-6, "block noise")
    near(pyramid_renoise(x, **levels, noise=normals), own["out"], 1e-6, "normals given")


def test_block_covariance(path, match, tensors):
    """A sampler of ours by the rules of the page: covariance, mean, sums, neighbours."""
    expected = tensors[match[0]]
    gamma, n = -float(expected[0, 1]), 2**18
    root = block_root(gamma, expected)
    near(root, tensors[f"{match[1]}.block_cholesky_f64"], 1e-7, "root")
    noise = pyramid_renoise(torch.zeros(1, 1, 1, 512, 512), 1.0, 1.0, gamma=gamma, seed=0)
    blocks = rearrange(noise[0, 0, 0].double(), "(h p) (w q) -> h w (p q)", p=2, q=2)
    flat = blocks.flatten(0, 1)
    near(flat.T @ flat / n, expected, 5 / n**0.5, "covariance")
    near(flat.mean(0), torch.zeros(4), 4 / n**0.5, "mean")
    if abs(gamma - 1 / 3) < 1e-6:
        near(flat.sum(1), torch.zeros(n), 1e-5, "sums")
    for one, other in ((blocks[:, 1:], blocks[:, :-1]), (blocks[1:], blocks[:-1])):
        one, other = one.reshape(-1, 4), other.reshape(-1, 4)
        near(one.T @ other / len(one), torch.zeros(4, 4), 5 / len(one) ** 0.5, "neighbours")
    schedule = pyramid_schedule(gamma=min(gamma, 1 / 3))
    for before, stage in zip(schedule.stages, schedule.stages[1:], strict=False):
        left = stage.alpha**2 * before.end_sigma**2 * torch.ones(4, 4, dtype=torch.float64)
        found = left + stage.beta**2 * expected
        near(found, stage.start_sigma**2 * torch.eye(4), 1e-6, "level after the jump")


def test_training_columns(path, match, tensors):
    run = match[1]
    config = json.loads(load(path)[0]["config"])
    schedule, ratios = schedule_of(load(path)[0]["config"]), config["sample_ratios"]
    latents, own = tensors["latents"], under(tensors, f"{run}.")
    for found, (name, expected) in zip(
        latent_pyramid(latents, len(schedule)),
        sorted(under(tensors, "pyramid.").items()),
        strict=True,
    ):
        near(found, expected, 1e-6, f"pyramid {name}")
    tape = iter([own[key] for key in sorted(key for key in own if key.startswith("rng."))])
    levels = noise_pyramid(next(tape), len(schedule))
    stages = column_stages(ratios)
    units = own.get("num_units_low_mid_high")
    if units is not None:
        options = {"units": config["max_temporal_length"], "sync_group": config["video_sync_group"]}
        step = int(units[-1]) - 1  # one rank: the turn goes through every position
        assert unit_counts(step, config["rank"], **options, stages=len(schedule)) == tuple(units)
    for column, stage in enumerate(stages):
        place, corruption = next(tape), config["corrupt_ratio"] * next(tape)
        out = under(own, f"out.col{column}.")
        samples = [out[key] for key in sorted(key for key in out if key.startswith("sample."))]
        own_units = None if units is None else int(units[stage])
        last = slice(None) if own_units is None else slice(own_units - 1, own_units)
        draws = ColumnDraws(
            levels[stage][column :: len(stages), :, last],
            place,
            corruption,
            tuple(reversed([next(tape) for _ in samples[1:]])),
        )
        found = training_column(
            latents[column :: len(stages)], stage, schedule, draws, units=own_units
        )
        for clip, expected in zip((*found.history, found.latents), samples, strict=True):
            near(clip, expected, 1e-6, f"column {column}")
        near(found.target, out["target"], 1e-6, f"target of column {column}")
        near(found.timestep, out["timesteps"], 1e-4, f"timestep of column {column}")
    assert next(tape, None) is None, "the tape was not read to its end"
