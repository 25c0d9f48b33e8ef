"""The autoregressive sampler against a whole run of the official one, noise given.

Runs on every `pyramid_case*.safetensors` of `--parity-dir` that holds initial noise and weights.
"""

import json

import pytest
import torch
from safetensors import safe_open

from fastvid.diffusion.pyramid import MINIFLUX_SCALE, denormalize_latents, pyramid_schedule
from fastvid.diffusion.pyramid_sampling import (
    Text,
    constant_guidance,
    linear_guidance,
    sample_pyramid,
)
from fastvid.models.pyramid_flow import PyramidFlux
from tests.parity.reference import cases, load, under

TOLERANCE = 1e-5  # absolute, of the page that describes the files


def pytest_generate_tests(metafunc):
    files = cases(metafunc.config, "pyramid_case*.safetensors")
    runs = [path for path in files if "in.initial_noise" in load(path)[1]]
    none = pytest.param(None, marks=pytest.mark.skip(reason="give --parity-dir"), id="none")
    metafunc.parametrize("path", [pytest.param(p, id=p.stem) for p in runs] or [none])


def metadata(path, name):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[name])


def text_of(tensors, name):
    own = under(tensors, f"in.{name}.")
    return Text(own["embeds"], own["mask"].sum(1), own["pooled"])


def sample(path, **options):
    """The official call as ours, and the histories that the network was given."""
    tensors, call, runner = load(path)[1], metadata(path, "call"), metadata(path, "runner")
    noise = tensors["in.initial_noise"]
    blocks = under(tensors, "in.block_noise.")
    model = PyramidFlux.from_official(under(tensors, "state.")).eval()
    guidance = constant_guidance(call["guidance_scale"], call["video_guidance_scale"])
    if call["use_linear_guidance"]:
        falls = call["alpha"], call["min_guidance_scale"]
        guidance = linear_guidance(call["guidance_scale"], *falls)
    calls = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["history"]), with_kwargs=True
    )
    out = sample_pyramid(
        model,
        text_of(tensors, "prompt"),
        noise.shape[1:],
        pyramid_schedule(
            len(runner["stages"]),
            bounds=runner["stage_range"],
            shift=runner["shift"],
            gamma=runner["gamma"],
        ),
        negative=text_of(tensors, "negative"),
        guidance=guidance,
        first_steps=call["num_inference_steps"],
        steps=call["video_num_inference_steps"],
        noise=noise,
        block_noise=[blocks[name] for name in sorted(blocks)],
        frames_per_unit=runner["frame_per_unit"],
        **options,
    )
    return out, calls


def test_a_whole_run(path):
    tensors, call = load(path)[1], metadata(path, "call")
    out, calls = sample(path)
    torch.testing.assert_close(out, tensors["out.latents"], rtol=0, atol=TOLERANCE)
    back = denormalize_latents(out, MINIFLUX_SCALE)
    wanted = tensors["out.latents_denormalised"]
    torch.testing.assert_close(back, wanted, rtol=0, atol=4 * TOLERANCE)  # times 1 / scale
    histories = iter(calls)
    for unit in range(out.shape[2]):
        steps = call["video_num_inference_steps" if unit else "num_inference_steps"]
        for stage, count in enumerate(steps):
            own = under(tensors, f"mid.unit{unit}.stage{stage}.history.")
            for history in [next(histories) for _ in range(count)]:
                for j, clip in enumerate(history):
                    expected = own[str(j)].expand_as(clip)
                    torch.testing.assert_close(clip, expected, rtol=0, atol=TOLERANCE)
                assert len(history) == len(own)
    assert next(histories, None) is None


@pytest.mark.parametrize("gigabytes", [float("inf"), 3e-4])
def test_the_same_from_a_cache(path, gigabytes):
    out, _ = sample(path, cache_gb=gigabytes)
    expected = load(path)[1]["out.latents"]
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE)
