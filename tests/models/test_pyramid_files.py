"""Weights of Pyramid Flow in files: official folders, shards and checkpoints, and our own."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from fastvid.models.pyramid_flow import PyramidFlux, PyramidMMDiT
from tests.models.test_pyramid_flow import FLUX, MMDIT
from tests.models.tiny import redraw


@pytest.fixture(params=[FLUX, MMDIT], ids=["flux", "mmdit"])
def model(request):
    return redraw((PyramidFlux if request.param is FLUX else PyramidMMDiT)(request.param)).eval()


@pytest.fixture
def state(model):
    return model.to_official_state_dict()


def same(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def shard(folder, state, count=3):
    """The state as an index and so many shards; their names."""
    names = list(state)
    places = {name: f"model-{i % count}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({n: state[n] for n in names if places[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("kind", ["pt", "safetensors", "folder", "folder of pt", "shards", "index"])
def test_from_files(model, state, tmp_path, kind):
    path = tmp_path
    if kind in ("pt", "folder of pt"):
        torch.save(state, tmp_path / "weights.pt")
        path = tmp_path / "weights.pt" if kind == "pt" else tmp_path
    elif kind in ("safetensors", "folder"):
        save_file(state, tmp_path / "weights.safetensors")
        path = tmp_path / "weights.safetensors" if kind == "safetensors" else tmp_path
    else:
        index = shard(tmp_path, state)
        path = index if kind == "index" else tmp_path
    found = type(model).from_official(path)
    assert same(found, model)
    assert replace(found.config, **({"frames": 20} if type(model) is PyramidMMDiT else {})) == (
        model.config
    )


def test_what_shapes_do_not_tell_is_in_the_config_of_a_folder(model, state, tmp_path):
    save_file(state, tmp_path / "weights.safetensors")
    official = {"axes_dims_rope": [16, 8, 8], "max_num_frames": 33, "interp_condition_pos": False}
    (tmp_path / "config.json").write_text(json.dumps(official))
    config = type(model).from_official(tmp_path).config
    if type(model) is PyramidFlux:
        assert config.rotary_dims == (16, 8, 8)
    else:
        assert (config.frames, config.interpolate_history) == (33, False)


def test_a_missing_shard_is_named(model, state, tmp_path):
    shard(tmp_path, state)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1\.safetensors, a shard of .*, is missing"):
        type(model).from_official(tmp_path)


def test_a_truncated_shard_is_named(model, state, tmp_path):
    shard(tmp_path, state)
    file = tmp_path / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model-1\.safetensors is not a whole safetensors file"):
        type(model).from_official(tmp_path)


def test_a_shard_that_lacks_what_the_index_says_is_named(model, state, tmp_path):
    shard(tmp_path, state)
    save_file({"other": torch.ones(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ValueError, match=r"model-1\.safetensors lacks .*, which .* says it holds"):
        type(model).from_official(tmp_path)


@pytest.mark.parametrize("place", ["../weights.safetensors", "/etc/passwd", 3])
def test_an_index_reaches_no_other_folder(model, state, tmp_path, place):
    index = shard(tmp_path, state)
    places = json.loads(index.read_text())["weight_map"]
    places[next(iter(places))] = place
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match="weight_map from tensors to files beside it"):
        type(model).from_official(tmp_path)


def test_a_folder_without_weights_or_with_several(model, state, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        type(model).from_official(tmp_path)
    for name in "ab":
        save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="several weights, name one file: a"):
        type(model).from_official(tmp_path)


def test_weights_of_the_other_network(model, state):
    other = PyramidMMDiT if type(model) is PyramidFlux else PyramidFlux
    wanted = f"of a {type(model).__name__}, .* read them by {type(model).__name__}.from_official"
    with pytest.raises(ValueError, match=wanted):
        other.from_official(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("transformer_blocks.1.attn.to_k.bias"),
            r"missing transformer_blocks\.1\.",
        ),
        (lambda s: s.update({"ema.x": torch.ones(1)}), r"left over ema\.x"),
        (
            lambda s: s.update({"proj_out.weight": torch.ones(16, 63)}),
            r"proj_out\.weight is \(16, 63\) instead of \(16, 64\)",
        ),
        (
            lambda s: s["transformer_blocks.0.ff.net.2.weight"].fill_(torch.nan),
            r"transformer_blocks\.0\.ff\.net\.2\.weight has NaN",
        ),
        (lambda s: s.pop("context_embedder.weight"), "missing context_embedder.weight, got"),
        (
            lambda s: s.update({"context_embedder.weight": torch.ones(3)}),
            r"context_embedder\.weight must have 2 axes, none of them empty, got \(3,\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(model, state, change, message):
    change(state)
    with pytest.raises(ValueError, match=message):
        type(model).from_official(state)


def test_a_table_that_is_not_the_sinusoids_is_refused():
    state = redraw(PyramidMMDiT(MMDIT)).to_official_state_dict()
    state["pos_embed.pos_embed"][0, 7, 3] += 0.1
    with pytest.raises(ValueError, match=r"pos_embed\.pos_embed is not the sinusoidal table"):
        PyramidMMDiT.from_official(state)


def test_half_precision_stays(model, state):
    half = {name: value.bfloat16() for name, value in state.items()}
    found = type(model).from_official(half)
    assert {value.dtype for value in found.state_dict().values()} == {torch.bfloat16}


def test_our_own_folders(model, tmp_path):
    model.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path)
    assert found.config == model.config
    assert same(found, model)
    other = PyramidMMDiT if type(model) is PyramidFlux else PyramidFlux
    with pytest.raises(ValueError, match="keys unknown to"):
        other.from_pretrained(tmp_path)
