"""Diffusion against tensors made with the official VDT code: schedules, steps, loops, losses.

Generic in file and config, like `test_vdt.py`: a handler runs on every `vdt_case*.safetensors` of
`--parity-dir` that holds its keys. Official masks are 1 = generate; here `known` is 1 = given.
"""

import copy
import re

import pytest
import torch
from torch import Tensor

from fastvid.diffusion import sampling
from fastvid.diffusion.losses import diffusion_loss
from fastvid.diffusion.process import (
    add_noise,
    learned_log_variance,
    mix_known,
    posterior,
    predict_x0,
    split_variance,
)
from fastvid.diffusion.sampling import sample_ddim, sample_ddpm
from fastvid.diffusion.schedule import Schedule, linear, respace, squared_cosine
from fastvid.diffusion.steps import ddim_inverse_step, ddim_step, ddpm_step
from fastvid.diffusion.tasks import OFFICIAL_IDS, block_cells, task_known
from tests.parity.reference import cases, close, load, load_vdt, swap, under

CLAIMED = (
    r"mask/.*|schedule/.*|q/.*|train/.*|concat\d+/.*|loop\d+/.*|ddim\d+/.*|ddpm\d+/.*|in/raw_x"
)

# Official names in the order of the official ids.
NAMES = "predict backward interpolation unconditional one_frame arbitrary_interpolation"
MASKS = dict(zip([*NAMES.split(), "spatial_temporal"], OFFICIAL_IDS, strict=True))


def holds(pattern: str):
    """Run a test on the files that have keys of this pattern; it gets them as `found`."""

    def mark(test):
        test.pattern = pattern
        return test

    return mark


def pytest_generate_tests(metafunc):
    pattern = metafunc.function.pattern
    paths = cases(metafunc.config, "vdt_case*.safetensors")
    paths = [path for path in paths if matches(load(path)[1], pattern)]
    metafunc.parametrize("path", paths or [None], ids=lambda path: path.stem if path else "none")


@pytest.fixture
def tensors(path, parity_dir):
    if path is None:
        pytest.skip(f"no such keys in {parity_dir}")
    return load(path)[1]


@pytest.fixture
def found(request, tensors):
    return matches(tensors, request.function.pattern)


@pytest.fixture
def model(path, tensors):
    return load_vdt(path)[0]


def matches(tensors: dict[str, Tensor], pattern: str) -> list[re.Match]:
    return [match for key in tensors if (match := re.fullmatch(pattern, key))]


def known_of(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors[f"mask/{name}"] == 0


def chain(tensors: dict[str, Tensor], name: str) -> Schedule:
    """The shortened chain of a key group such as "ddpm10", compared with the file's tables."""
    steps = name if name.startswith("ddim") else re.sub(r"\D", "", name)
    schedule = respace(linear(), steps)
    compare_chain(schedule, under(tensors, f"{name}/"), name)
    return schedule


def compare_chain(schedule: Schedule, tables: dict[str, Tensor], name: str) -> None:
    if "timestep_map" in tables:
        assert torch.equal(schedule.timestep_map, tables["timestep_map"]), name
    for table in set(tables) & {"betas", "alphas_cumprod"}:
        torch.testing.assert_close(
            getattr(schedule, table), tables[table], rtol=1e-12, atol=0, msg=f"{name} {table}"
        )


def predicted(model, x: Tensor, schedule: Schedule, index: int, **condition) -> Tensor:
    with torch.no_grad():
        return model(x, schedule.timestep_map[index : index + 1], **condition)


@holds(r"schedule/linear(\d+)/(\w+)")
def test_schedule_tables(tensors, found):
    for match in found:
        schedule = linear(int(match[1]))
        torch.testing.assert_close(
            getattr(schedule, match[2]), tensors[match[0]], rtol=1e-12, atol=0, msg=match[0]
        )


@holds(r"schedule/squaredcos_cap_v2_(\d+)/betas")
def test_cosine_schedules(tensors, found):
    for match in found:
        expected = tensors[match[0]]
        torch.testing.assert_close(
            squared_cosine(int(match[1])).betas, expected, rtol=1e-12, atol=0
        )


@holds(r"schedule/respaced_([\w-]+)/betas")
def test_respaced_schedules(tensors, found):
    for match in found:
        tables = under(tensors, f"schedule/respaced_{match[1]}/")
        compare_chain(respace(linear(), match[1].replace("-", ",")), tables, match[1])


@holds(r"mask/(\w+)")
def test_masks(tensors, found):
    for match in found:
        known, task = known_of(tensors, match[1]), MASKS[match[1]]
        batch, frames, height, width = known.shape
        whole = known.flatten(2)
        if task in ("predict", "backward", "interpolate", "unconditional"):
            ours = task_known(task, frames, height, width, batch=batch)
            assert torch.equal(ours[..., None, None].expand_as(known), known), match[0]
        elif task == "complete":
            # One pattern in a run of frames, as many cells as ours; every frame around it given.
            inside = (~whole).any(2)[0].nonzero().flatten()
            assert inside.diff().eq(1).all(), match[0]
            assert inside[0] <= 3, match[0]
            assert inside[-1] >= frames - 4, match[0]
            pattern = ~known[0, inside[0]]
            assert torch.equal(~known[0, inside], pattern.expand(len(inside), -1, -1)), match[0]
            assert pattern.sum() == block_cells(height, width).sum(), match[0]
        else:
            # Frames are wholly given or wholly to be generated; image-to-video gives one.
            assert torch.equal(whole.all(2), whole.any(2)), match[0]
            if task == "image-to-video":
                assert whole.all(2).sum(1).eq(1).all(), match[0]


@holds(r"q/q_sample")
def test_forward_process(tensors):
    clean, noise = swap(tensors["train/in_x_start"]), tensors["train/in_noise"]
    schedule, index = linear(), tensors["train/in_t"]
    x = add_noise(clean, noise, index, schedule)
    mean, variance, log_variance = posterior(clean, x, index, schedule)
    close(x, tensors["q/q_sample"], "q_sample")
    close(mean, tensors["q/posterior_mean"], "posterior_mean")
    close(variance.flatten(), tensors["q/posterior_variance"], "posterior_variance")
    expected = tensors["q/posterior_log_variance_clipped"]
    close(log_variance.flatten(), expected, "posterior_log_variance_clipped")


def official_loss(model, tensors: dict[str, Tensor], chain: str, mask: str) -> dict[str, Tensor]:
    if match := re.fullmatch(r"respaced(\d+)_rescaled", chain):
        steps = int(match[1])
        schedule, factor = respace(linear(), steps), steps / 1000
        index = tensors[f"train/in_t_{steps}"]
    else:
        schedule, factor = linear(int(chain.removeprefix("linear"))), 1.0
        index = tensors["train/in_t"]
    return diffusion_loss(
        model,
        swap(tensors["train/in_x_start"]),
        index,
        tensors["train/in_noise"],
        schedule,
        known=known_of(tensors, mask),
        average="all",
        variational=factor,
    )


@holds(r"train/(\w+)/(\w+)/loss")
def test_losses(tensors, model, found):
    for match in found:
        with torch.no_grad():
            ours = official_loss(model, tensors, match[1], match[2])
        for term, expected in under(tensors, f"train/{match[1]}/{match[2]}/").items():
            if not term.startswith("grad/"):
                close(ours[term], expected, f"{match[0]}: {term}")


@holds(r"train/(\w+)/(\w+)/grad/.*")
def test_loss_gradients(tensors, model, found):
    for group, mask in {match.groups() for match in found}:
        model.zero_grad()
        official_loss(model, tensors, group, mask)["loss"].mean().backward()
        gradients = copy.deepcopy(model)  # holds them as parameters, to be renamed like those
        with torch.no_grad():
            for holder, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
                holder.copy_(parameter.grad)
        ours = gradients.to_official_state_dict()
        for name, expected in under(tensors, f"train/{group}/{mask}/grad/").items():
            close(ours[name], expected, f"{group}/{mask}: {name}", relative=1e-4)


@holds(r"(ddpm\d+)/(\w+)/(?:p_sample|p_mean_variance)/.*")
def test_ancestral_steps(tensors, model, found):
    raw = swap(tensors["in/raw_x"])
    for group, mask in {match.groups() for match in found}:
        schedule, x = chain(tensors, group), tensors[f"{group}/in_x"]
        index = int(tensors[f"{group}/{mask}/t_index"])
        known = known_of(tensors, mask)
        output = predicted(model, mix_known(x, raw, known), schedule, index, known=known)
        for key, clip in (("p_mean_variance", None), ("p_mean_variance_clip", 1.0)):
            moments = moments_of(output, x, index, schedule, clip)
            compare_moments(moments, under(tensors, f"{group}/{mask}/{key}/"), key)
        sample = ddpm_step(output, x, index, schedule, noise=tensors[f"{group}/in_noise"])
        close(sample, tensors[f"{group}/{mask}/p_sample/sample"], "p_sample")


def moments_of(
    output: Tensor, x: Tensor, index: int, schedule: Schedule, clip: float | None = None
) -> dict[str, Tensor]:
    """One reverse step under the official names."""
    prediction, fraction = split_variance(output, x.shape[1])
    x0 = predict_x0(prediction, x, index, schedule, "eps")
    log_variance = learned_log_variance(fraction, index, schedule)
    return {
        "mean": ddpm_step(output, x, index, schedule, noise=None, clip=clip),
        "variance": log_variance.exp(),
        "log_variance": log_variance,
        "pred_xstart": x0 if clip is None else x0.clamp(-clip, clip),
    }


def compare_moments(ours: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> None:
    for key, tensor in expected.items():
        close(ours[key], tensor, f"{name}: {key}")


@holds(r"(loop\d+)/sample")
def test_ancestral_loops(tensors, model, monkeypatch, found):
    raw, known = swap(tensors["in/raw_x"]), known_of(tensors, "interpolation")
    for match in found:
        group = match[1]
        schedule, noises = chain(tensors, group), tensors[f"{group}/in_noises"]
        (start,) = (key for key in tensors if re.fullmatch(r"ddpm\d+/in_x", key))

        x = tensors[start]
        for noise, index in zip(noises, reversed(range(len(schedule))), strict=True):
            output = predicted(model, mix_known(x, raw, known), schedule, index)
            x = ddpm_step(output, x, index, schedule, noise=noise)
        close(x, tensors[f"{group}/sample"], f"{group}/sample")

        drawn = iter(noises)
        monkeypatch.setattr(sampling, "draw_noise", lambda *_, drawn=drawn, **__: next(drawn))
        ours = sample_ddpm(model, tensors[start], schedule, known=known, clean=raw)
        close(swap(ours), tensors[f"{group}/composite"], f"{group}/composite")


@holds(r"(ddim\d+)/t_index")
def test_ddim_steps(tensors, model, found):
    (start,) = (key for key in tensors if re.fullmatch(r"ddpm\d+/in_x", key))
    x, noise = tensors[start], tensors[start.replace("in_x", "in_noise")]
    for group in {match[1] for match in found}:
        schedule, index = chain(tensors, group), int(tensors[f"{group}/t_index"])
        output = predicted(model, x, schedule, index)
        for match in matches(tensors, rf"{group}/eta([\d.]+)/sample"):
            ours = ddim_step(output, x, index, schedule, eta=float(match[1]), noise=noise)
            close(ours, tensors[match[0]], match[0])
        prediction, _ = split_variance(output, x.shape[1])
        x0 = predict_x0(prediction, x, index, schedule, "eps")
        close(x0, tensors[f"{group}/eta0/pred_xstart"], "pred_xstart")
        reverse = ddim_inverse_step(output, x, index, schedule)
        close(reverse, tensors[f"{group}/reverse/sample"], "reverse")
        mixed = mix_known(x, swap(tensors["in/raw_x"]), known_of(tensors, "predict"))
        masked = ddim_step(predicted(model, mixed, schedule, index), x, index, schedule)
        close(masked, tensors[f"{group}/masked_predict_eta0/sample"], "masked_predict_eta0")


@holds(r"(ddim\d+)/loop_eta0/sample")
def test_ddim_loops(tensors, model, found):
    (start,) = (key for key in tensors if re.fullmatch(r"ddpm\d+/in_x", key))
    for match in found:
        ours = sample_ddim(model, tensors[start], chain(tensors, match[1]))
        close(ours, tensors[match[0]], match[0])


@holds(r"(concat\d+)/p_mean_variance/.*")
def test_frame_concatenation(tensors, model, found):
    (group,) = {match[1] for match in matches(tensors, r"(ddpm\d+)/betas")}
    schedule = chain(tensors, group)
    for name in {match[1] for match in found}:
        x, index = tensors[f"{name}/in_x"], int(tensors[f"{name}/t_index"])
        given = swap(tensors[f"{name}/in_condition"])
        output = predicted(model, x, schedule, index, condition_frames=given)
        moments = moments_of(output, x, index, schedule)
        compare_moments(moments, under(tensors, f"{name}/p_mean_variance/"), name)
