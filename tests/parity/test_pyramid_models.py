"""The networks of Pyramid Flow against tensors made with the official code.

Every `pyramid_case*.safetensors` of `--parity-dir` that holds weights of a network is read,
and a handler runs on the files that hold its keys, whatever their config.
"""

import re
from functools import cache

import pytest
import torch

from benchmarks.rivals.pyramid_eager import PyramidFluxEager
from fastvid.models.pyramid_columns import Column, arrange, clip_sizes, trimmed
from fastvid.models.pyramid_flow import PyramidFlux, PyramidMMDiT
from tests.parity.reference import cases, load, under

TOLERANCE = 2e-6  # absolute, of the page that describes the files
PATTERN = "pyramid_case*.safetensors"


def pytest_generate_tests(metafunc):
    files = cases(metafunc.config, PATTERN)
    none = pytest.param(None, marks=pytest.mark.skip(reason="give --parity-dir"), id="none")
    if "path" in metafunc.fixturenames:
        packed = [file for file in files if "in.timestep_ratio" in load(file)[1]]
        packed = [file for file in packed if under(load(file)[1], "state.")]
        metafunc.parametrize("path", [pytest.param(f, id=f.stem) for f in packed] or [none])
    if "gradients" in metafunc.fixturenames:
        pairs = [(f, g) for f in files for g in files if belongs(load(f)[1], load(g)[1])]
        metafunc.parametrize(
            ("path_of_weights", "gradients"),
            [pytest.param(*pair, id=pair[1].stem) for pair in pairs]
            or [pytest.param(None, None, marks=none.marks, id="none")],
        )


def belongs(weights, gradients):
    """Whether one file holds gradients of the parameters that the other holds."""
    names = under(gradients, "grad.").keys()
    return bool(names) and names == under(weights, "state.").keys() and "out.loss" in weights


@cache
def network(path):
    state = under(load(path)[1], "state.")
    kind = PyramidFlux if "x_embedder.weight" in state else PyramidMMDiT
    return kind.from_official(state).eval()


def columns_of(tensors):
    """Row `b * columns + c` of text and timesteps belongs to column c."""
    samples = [re.fullmatch(r"in\.sample\.(\d+)\.(\d+)", name) for name in tensors]
    places = sorted((int(m[1]), int(m[2])) for m in samples if m)
    count = places[-1][0] + 1
    columns = []
    for c in range(count):
        rows = slice(c, None, count)
        *history, noisy = (tensors[f"in.sample.{c}.{j}"] for k, j in places if k == c)
        columns.append(
            Column(
                noisy,
                tensors["in.timestep_ratio"][rows],
                tensors["in.encoder_hidden_states"][rows],
                tensors["in.encoder_attention_mask"][rows].sum(1),
                tensors["in.pooled_projections"][rows],
                history,
            )
        )
    return columns


def close(actual, reference, name, tolerance=TOLERANCE):
    assert actual.shape == reference.shape, name
    error = (actual - reference).abs().max().item()
    assert error <= tolerance, f"{name}: off by {error:.2e}, allowed {tolerance:.0e}"


@pytest.mark.parametrize("grad", [True, False], ids=["training path", "inference path"])
def test_packed_forward(path, grad):
    tensors = load(path)[1]
    columns = columns_of(tensors)
    with torch.set_grad_enabled(grad):
        outputs = network(path).packed(columns)
    for c, out in enumerate(outputs):
        close(out, tensors[f"out.{c}"], f"out.{c}")


def test_every_column_alone_is_what_it_is_in_the_pack(path):
    tensors = load(path)[1]
    for c, column in enumerate(columns_of(tensors)):
        arguments = column._asdict()
        latents, timestep = arguments.pop("latents"), arguments.pop("timestep")
        with torch.no_grad():
            close(network(path)(latents, timestep, **arguments), tensors[f"out.{c}"], f"out.{c}")


def test_the_loss(path):
    tensors = load(path)[1]
    if "out.loss" not in tensors:
        pytest.skip("the file has no out.loss")
    close(loss(network(path), tensors).detach(), tensors["out.loss"], "out.loss")


def loss(model, tensors):
    """The mean square of each sample, then the mean over all samples."""
    outputs = model.packed(columns_of(tensors))
    squares = [
        (out - tensors[f"in.target.{c}"]).square().flatten(1).mean(1)
        for c, out in enumerate(outputs)
    ]
    return torch.cat(squares).mean()


def test_gradients(path_of_weights, gradients):
    model, tensors = network(path_of_weights), load(path_of_weights)[1]
    model.zero_grad()
    loss(model, tensors).backward()
    found = model.official_names({name: value.grad for name, value in model.named_parameters()})
    for name, reference in under(load(gradients)[1], "grad.").items():
        torch.testing.assert_close(found[name], reference, rtol=1e-4, atol=1e-7, msg=name)


def test_who_sees_whom_and_stands_where(path):
    model, tensors = network(path), load(path)[1]
    for c, column in enumerate(columns_of(tensors)):
        sizes = clip_sizes(column, model.config.patch)
        scene, last = arrange(trimmed(column), sizes, model.config.rotary_dims, None, 0)
        N, L = scene.asking, column.text.shape[1]
        cut = L - trimmed(column).text.shape[1]
        seen = scene.visibility.dense(N, N).expand(len(column.latents), -1, -1)
        official = tensors[f"mid.attn_mask.{c}"][:, 0].bool()
        for b, length in enumerate(column.text_lengths.tolist()):
            real = torch.cat([torch.arange(length), torch.arange(L, N + cut)])
            ours = torch.where(real < L, real, real - cut)
            assert torch.equal(seen[b][ours][:, ours], official[b][real][:, real])
        noisy = last.visibility.dense(last.asking, N).expand(len(seen), -1, -1)
        assert torch.equal(noisy, seen[:, -last.asking :])
        ids = tensors.get(f"mid.image_ids.{c}")
        if ids is not None:
            rows, cos = scene.rotary.rows[0, L - cut :], scene.rotary.cos
            first = [sum(scene.rotary.dims[:axis]) // 2 for axis in range(rows.shape[1])]
            found = torch.stack([cos[rows[:, a].long(), at] for a, at in enumerate(first)], 1)
            close(found, ids[0].cos(), f"mid.image_ids.{c}")  # the first pair turns by 1 per cell


def test_intermediates(path):
    model, tensors = network(path), load(path)[1]
    columns, found, hooks = columns_of(tensors), {}, []

    def keep(name, module):
        hook = module.register_forward_hook(lambda *call: found.__setitem__(name, call[2]))
        hooks.append(hook)

    keep("timestep", model.timestep)
    keep("pooled", model.pooled)
    keep("patch", model.patch)
    keep("double0", model.blocks[0])
    keep("last", model.blocks[-1])
    with torch.no_grad():
        model.packed(columns)
    for hook in hooks:
        hook.remove()
    batch, count = len(columns[0].latents), len(columns)
    temb = found["timestep"] + found["pooled"]
    close(temb.unflatten(0, (count, batch)).transpose(0, 1).flatten(0, 1), tensors["mid.temb"], "t")
    text, video, _ = (samples[::batch] for samples in map(by_sample, found["double0"]))
    close(torch.cat(video, 1), tensors["mid.double0.image"], "double0.image")
    real = columns[0].text_lengths[0]
    close(text[0][:, :real], tensors["mid.double0.text"][:, :real], "double0.text")
    last = f"mid.single{getattr(model.config, 'single_blocks', 0) - 1}"
    if (reference := tensors.get(last)) is None:
        return
    end = 0
    firsts = by_sample(found["last"][0])[::batch]
    for c, (column, x) in enumerate(zip(columns, firsts, strict=True)):
        end += column.text.shape[1] + int(tensors["mid.hidden_length"][c])
        close(x, reference[:, end - x.shape[1] : end], last)  # only these go on


def by_sample(streams):
    """Columns of samples, or of several each, as one tensor per sample."""
    return [sample for x in streams if x is not None for sample in x.split(1)]


def test_official_weights_come_back_bit_for_bit(path):
    weights = under(load(path)[1], "state.")
    back = network(path).to_official_state_dict()
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_the_rival_of_the_benchmark_is_the_official_model(path):
    tensors = load(path)[1]
    if not isinstance(network(path), PyramidFlux):
        pytest.skip("the rival is miniFLUX")
    rival = PyramidFluxEager(network(path).config)
    rival.load_state_dict(under(tensors, "state."))
    columns = columns_of(tensors)
    inputs = ("timestep_ratio", "encoder_hidden_states", "encoder_attention_mask")
    timestep, text, valid = (tensors[f"in.{name}"] for name in inputs)
    with torch.no_grad():
        outputs = rival(
            [[*column.history, column.latents] for column in columns],
            timestep,
            text,
            valid.bool(),
            tensors["in.pooled_projections"],
        )
    for c, out in enumerate(outputs):
        close(out, tensors[f"out.{c}"], f"out.{c}")
