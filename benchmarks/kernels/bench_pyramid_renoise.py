"""The pyramid's ops against the published scheme, vectorised PyTorch and `torch.compile` of it.

Where noise is drawn, the rivals draw theirs too, and then work on the noise that ours is known to
be, so that results can be compared. "loop" is the published scheme: one sample of a multivariate
normal per block, in a Python loop. It takes a second a call, so it has a row of its own.
"training columns" is all the noise preparation of a training step at 5 s, from clean latents to
what the network is given; the published order reduces and draws all at full resolution first.
"""

import math

import torch
from einops import rearrange
from torch.distributions import MultivariateNormal

from benchmarks.harness import Case, forward_of
from fastvid.diffusion import pyramid
from fastvid.functional import latent_pyramid, noise_pyramid, pyramid_renoise, stage_endpoints
from fastvid.kernels._shared import native, philox
from fastvid.kernels.pyramid_renoise import cpu, reference

ALPHA, BETA, GAMMA = 0.74962519, 0.43366189, 1 / 3  # the jump to the highest of three stages
STAGES = 3

# (B, C, T, H, W) before the jump: one frame, 384p low to mid, 384p mid to high, 768p mid to high.
SHAPES = [(1, 16, 1, 12, 20), (1, 16, 1, 24, 40), (1, 16, 1, 48, 80)]
GPU_SHAPES = [*SHAPES, (32, 16, 16, 48, 80)]
QUICK = [(1, 2, 1, 4, 6)]
# Clips at full resolution, 5 s: 384p at batch 4, and one of 768p.
CLIPS = [(4, 16, 16, 48, 80), (1, 16, 16, 96, 160)]
QUICK_CLIPS = [(1, 2, 2, 8, 12)]
BATCHES = [(4, 16, 16, 48, 80), (4, 16, 16, 96, 160)]  # a video for each of four columns
QUICK_BATCHES = [(4, 2, 4, 8, 12)]


def eager(x, noise):
    """The jump from block noise."""
    return ALPHA * x.repeat_interleave(2, -1).repeat_interleave(2, -2) + BETA * noise


def drawn_blocks(normals):
    """Block noise from independent normals (..., H, W, 4), by its symmetric root."""
    centred = (normals - normals.mean(-1, keepdim=True)) * (2 / math.sqrt(3))
    return rearrange(centred, "... h w (p q) -> ... (h p) (w q)", p=2)


def looped_blocks(x):
    """Block noise as published; in float64, where its covariance passes for positive definite."""
    covariance = (1 + GAMMA) * torch.eye(4, dtype=torch.float64) - GAMMA
    law = MultivariateNormal(torch.zeros(4, dtype=torch.float64), covariance)
    blocks = torch.stack([law.sample() for _ in range(x.numel())]).to(x)
    return rearrange(blocks.view(*x.shape, 4), "... h w (p q) -> ... (h p) (w q)", p=2)


def eager_pyramid(latents):
    """Bilinear halving, as published: the levels, low to high."""
    frames = [latents.transpose(1, 2).flatten(0, 1)]
    for _ in range(STAGES - 1):
        frames.insert(
            0, torch.nn.functional.interpolate(frames[0], scale_factor=0.5, mode="bilinear")
        )
    unfold = {"b": len(latents)}
    return [rearrange(level, "(b t) c h w -> b c t h w", **unfold) for level in frames[:-1]]


def eager_endpoints(latents, lower, noise, ratio):
    """Sample and target of the highest stage."""
    up = lower.repeat_interleave(2, -1).repeat_interleave(2, -2)
    start, ratio = 0.50074962 * noise + (1 - 0.50074962) * up, ratio.view(-1, 1, 1, 1, 1)
    ratio = ratio.to(latents.dtype)
    return ratio * start + (1 - ratio) * latents, start - latents


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The jump with drawn and given noise, the latent pyramid, and what a stage trains on."""
    shapes = QUICK if quick else GPU_SHAPES if device.type == "cuda" else SHAPES
    clips = QUICK_CLIPS if quick else CLIPS
    dtypes = [torch.float32, torch.bfloat16]
    found = []
    if device.type == "cpu":
        found.append(_renoise("drawn, looped", shapes[-1], torch.float32, device, quick))
    found += [
        _renoise(name, shape, dtype, device, quick)
        for name in ("drawn", "given")
        for shape in shapes
        for dtype in dtypes
    ]
    found += [
        make(shape, torch.float32, quick) for make in (_pyramid, _endpoints) for shape in clips
    ]
    if device.type == "cpu":  # whose generators draw for every sample
        found += [_columns(shape) for shape in (QUICK_BATCHES if quick else BATCHES)]
    return found


def nbytes(shape, dtype, given: bool) -> int:
    """x in, four times as much out, and as much noise in where it is given."""
    return (9 if given else 5) * torch.Size(shape).numel() * dtype.itemsize


def _renoise(name, shape, dtype, device, quick):
    seeds = torch.arange(shape[0], device=device)

    def normals_of_ours():
        return philox.normal(seeds, 4 * math.prod(shape[1:]), 0).view(*shape, 4)

    def ours(x, noise):
        if name == "given":
            return pyramid_renoise(x, ALPHA, BETA, noise=noise)
        return pyramid_renoise(x, ALPHA, BETA, seed=seeds)

    def plain(x, noise):
        if name != "given":
            drawn_blocks(torch.randn(*shape, 4, dtype=x.dtype, device=x.device))
        return eager(x, noise)

    def loop(x, noise):
        looped_blocks(x)
        return eager(x, noise)

    def without_compiled_part(x, noise):
        """Our CPU path on a machine that had no compiler."""
        pair = (noise, None) if name == "given" else (None, seeds)
        return cpu.pyramid_renoise(x, ALPHA, BETA, GAMMA, *pair, 0)

    def oracle(x, noise):
        if name != "given":  # noise is its rounding
            noise = normals_of_ours().double()
        return reference.pyramid_renoise(x, ALPHA, BETA, GAMMA, noise)

    def make_inputs(device):
        x = torch.randn(shape, device=device).to(dtype)
        noise = reference.block_noise(normals_of_ours().double(), GAMMA).to(dtype)
        return x, noise

    rivals = {"fastvid": ours, "eager": plain}
    if device.type == "cpu" and native.loaded():
        rivals["no C++"] = without_compiled_part
    if name == "drawn, looped":
        rivals["loop"] = loop
    if name == "given" and not quick:  # of a draw that nobody uses it would make nothing
        rivals["compile"] = torch.compile(plain, dynamic=False)
    moved = nbytes(shape, dtype, name == "given")
    sets = 1 if name == "drawn, looped" else 128
    return _case(name, shape, dtype, rivals, oracle, make_inputs, moved, sets)


def _pyramid(shape, dtype, quick):
    def ours(latents):
        return latent_pyramid(latents, STAGES)[:-1]

    def oracle(latents):
        mid = reference.pyramid_halve(latents, 1.0)
        return [reference.pyramid_halve(mid, 1.0), mid]

    def make_inputs(device):
        return (torch.randn(shape, device=device).to(dtype),)

    rivals = {"fastvid": ours, "eager": eager_pyramid}
    if not quick:
        rivals["compile"] = torch.compile(eager_pyramid, dynamic=False)
    moved = torch.Size(shape).numel() * (16 + 4 + 1) // 16 * dtype.itemsize  # all in, two out
    return _case("latent pyramid", shape, dtype, rivals, oracle, make_inputs, moved)


def _endpoints(shape, dtype, quick):
    sigmas = {"start_sigma": 0.50074962, "end_sigma": 0.0}

    def ours(latents, lower, noise, ratio):
        return stage_endpoints(latents, lower, noise, **sigmas, ratio=ratio, endpoints=False)[2:]

    def oracle(latents, lower, noise, ratio):
        return reference.stage_endpoints(latents, lower, noise, *sigmas.values(), ratio)[2:]

    def make_inputs(device):
        latents, noise = torch.randn(2, *shape, device=device).to(dtype)
        lower = reference.pyramid_halve(latents, 1.0)
        return latents, lower, noise, torch.linspace(0.1, 1, shape[0], device=device)

    rivals = {"fastvid": ours, "eager": eager_endpoints}
    if not quick:
        rivals["compile"] = torch.compile(eager_endpoints, dynamic=False)
    moved = 17 * torch.Size(shape).numel() * dtype.itemsize // 4  # two in and a quarter, two out
    return _case("stage endpoints", shape, dtype, rivals, oracle, make_inputs, moved)


def eager_columns(schedule, units, latents, place, corruption, *noises):
    """The published order: every level of every video, then the few frames that are asked for."""
    clean = [*eager_pyramid(latents), latents]
    found = []
    for column, stage in enumerate(pyramid.column_stages()):
        own, frame = slice(column, column + 1), units[stage] - 1
        noise = noises[stage][own, :, frame : frame + 1]
        at, r = schedule.stages[stage], 1 - (1000 * place[column]).long() / 1000
        start = at.start_sigma * noise
        if stage:
            low = clean[stage - 1][own, :, frame : frame + 1]
            up = low.repeat_interleave(2, -1).repeat_interleave(2, -2)
            start = start + (1 - at.start_sigma) * up
        end = at.end_sigma * noise + (1 - at.end_sigma) * clean[stage][own, :, frame : frame + 1]
        for level, first, last in pyramid.history_plan(frame, stage):
            eps, c = noises[level][own, :, first:last], corruption[column].to(noise.dtype)
            found.append(c * eps + (1 - c) * clean[level][own, :, first:last])
        found += [r * start + (1 - r) * end, start - end]
    return found


def _columns(shape):
    """One step on four videos: a low column, two mid, one high, half-way through the clip."""
    schedule, half = pyramid.pyramid_schedule(), shape[2] // 2
    units = (half, half, half + 1)
    stages = pyramid.column_stages()

    def ours(latents, place, corruption, *noises):
        found = []
        for column, stage in enumerate(stages):
            own, options = slice(column, column + 1), {"units": units[stage]}
            generators = [torch.Generator().manual_seed(column)]
            pyramid.draw_column(generators, shape[1:], stage, schedule, **options)
            plan = pyramid.history_plan(units[stage] - 1, stage)
            draws = pyramid.ColumnDraws(
                noises[stage][own, :, units[stage] - 1 : units[stage]],
                place[own],
                corruption[own],
                tuple(noises[clip.stage][own, :, clip.start : clip.stop] for clip in plan),
            )
            made = pyramid.training_column(latents[own], stage, schedule, draws, **options)
            found += [*made.history, made.latents, made.target]
        return found

    def plain(latents, *rest):
        full = torch.randn_like(latents)
        eager_pyramid(2 * full)
        for stage in stages:
            for clip in pyramid.history_plan(units[stage] - 1, stage):
                torch.randn_like(rest[2 + clip.stage][:1, :, clip.start : clip.stop])
        return eager_columns(schedule, units, latents, *rest)

    def oracle(*inputs):
        return eager_columns(schedule, units, *inputs)

    def make_inputs(device):
        latents, noise = torch.randn(2, *shape, device=device)
        place, corruption = torch.linspace(0.1005, 0.9005, 4), torch.linspace(0, 1 / 3, 4)
        return latents, place, corruption, *noise_pyramid(noise, STAGES)

    def numbers(clip_or_frame, stage):
        return clip_or_frame * shape[1] * math.prod(shape[3:]) // 4 ** (STAGES - 1 - stage)

    moved = 0
    for stage in stages:  # noise in, result out; two results of the frame that is trained
        moved += 3 * numbers(1, stage)
        plan = pyramid.history_plan(units[stage] - 1, stage)
        moved += sum(2 * numbers(clip.stop - clip.start, clip.stage) for clip in plan)
    rivals = {"fastvid": ours, "eager": plain}
    return _case("training columns", shape, torch.float32, rivals, oracle, make_inputs, 4 * moved)


def _case(name, shape, dtype, rivals, oracle, make_inputs, moved, sets=128):
    return Case(
        room="pyramid_renoise",
        name=name,
        shape=dict(zip("BCTHW", shape, strict=True)),
        dtype=dtype,
        make_inputs=make_inputs,
        rivals={rival: forward_of(function) for rival, function in rivals.items()},
        oracle=forward_of(oracle),
        nbytes=moved,
        sets=sets,
    )
