"""VDT against tensors made with the official code: forward, intermediates, gradients.

Every `vdt_case*.safetensors` of `--parity-dir` is read, and a handler runs on the files that hold
its keys, whatever their config. `test_vdt_diffusion.py` owns the keys that are not claimed here.
"""

import re
from dataclasses import replace

import pytest
import torch

from benchmarks.rivals.vdt_eager import VDTEager
from fastvid.models.vdt import VDT
from fastvid.modules.embeddings import resize_grid
from tests.parity import test_vdt_diffusion
from tests.parity.reference import cases, close, load, load_vdt, swap, under, vdt_config

CLAIMED = (
    r"weights/.*|in/(x|t|grad_out|raw_x|x_t)|out/.*|mid/.*|grad/.*|mask/.*|label/.*|image/.*"
    r"|pos_interp/(in|out)_\d+x\d+"
)


def pytest_generate_tests(metafunc):
    if "path" in metafunc.fixturenames:
        files = cases(metafunc.config, "vdt_case*.safetensors")
        none = pytest.param(None, marks=pytest.mark.skip(reason="give --parity-dir"), id="none")
        metafunc.parametrize("path", [pytest.param(f, id=f.stem) for f in files] or [none])


def needs(path, key):
    if key not in load(path)[1]:
        pytest.skip(f"the file has no {key}")


def test_every_tensor_is_compared(path):
    claimed = f"{CLAIMED}|{test_vdt_diffusion.CLAIMED}"
    assert not [name for name in load(path)[1] if not re.fullmatch(claimed, name)]


@pytest.mark.parametrize("grad", [True, False], ids=["training path", "inference path"])
@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
def test_forward(path, grad, folded):
    needs(path, "out/y")
    model, tensors = load_vdt(path)
    model = model.fold() if folded else model
    with torch.set_grad_enabled(grad):
        close(swap(model(swap(tensors["in/x"]), tensors["in/t"])), tensors["out/y"], "out/y")


def test_the_rival_of_the_benchmark_is_the_official_model(path):
    needs(path, "out/y")
    config, tensors = load(path)
    rival = VDTEager(vdt_config(config))
    rival.load_state_dict(under(tensors, "weights/"))
    with torch.no_grad():
        close(rival(tensors["in/x"], tensors["in/t"]), tensors["out/y"], "out/y")


def test_intermediates_and_gradients(path):
    needs(path, "mid/c")
    model, tensors = load_vdt(path)
    found = {}

    def keep(name, pick=lambda inputs, output: output):
        return lambda module, inputs, output: found.__setitem__(name, pick(inputs, output))

    model.patch.register_forward_hook(keep("patch_embed"))
    model.timestep.register_forward_hook(keep("t_emb"))
    model.label.register_forward_hook(keep("y_emb"))
    first = model.blocks[0]
    first.register_forward_hook(keep("block0_in", lambda inputs, output: inputs[0]))
    first.temporal.register_forward_hook(keep("block0_temporal_residual"))
    first.spatial.register_forward_hook(keep("block0_spatial_attn_out"))
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(keep(f"block{i}_out"))

    x = swap(tensors["in/x"]).clone().requires_grad_()
    out = model(x, tensors["in/t"])
    B, C_out, T, H, W = out.shape
    p = model.config.patch
    patches = out.unflatten(3, (H // p, p)).unflatten(5, (W // p, p))
    found["final_tokens"] = patches.permute(0, 2, 3, 5, 4, 6, 1).reshape(B * T, -1, p * p * C_out)
    found["y_emb"] = found["y_emb"].expand(B, -1)
    found["c"] = found["t_emb"] + found["y_emb"]
    for name, reference in under(tensors, "mid/").items():
        value = found[name]
        close(value.flatten(0, 1) if value.ndim == 4 else value, reference, f"mid/{name}")

    out.backward(swap(tensors["in/grad_out"]))
    gradients = official_gradients(model) | {"in_x": swap(x.grad)}
    for name, reference in under(tensors, "grad/").items():
        close(gradients[name], reference, f"grad/{name}")


def official_gradients(model):
    """The gradients under the official names: those of our tensors, cut and shaped alike."""
    shadow = VDT(model.config)
    shadow.load_state_dict(
        model.state_dict() | {name: value.grad for name, value in model.named_parameters()}
    )
    return shadow.to_official_state_dict()


def test_masked_inputs(path):
    needs(path, "in/raw_x")
    model, tensors = load_vdt(path)
    outputs = under(tensors, "out/")
    assert outputs
    for task, reference in outputs.items():
        generated = tensors[f"mask/{task}"].bool()
        mixed = torch.where(generated[:, :, None], tensors["in/x_t"], tensors["in/raw_x"])
        with torch.no_grad():
            out = model(swap(mixed), tensors["in/t"], known=~generated)
        close(swap(out), reference, f"out/{task}")


def test_kept_and_dropped_labels(path):
    needs(path, "label/in_x")
    model, tensors = load_vdt(path)
    null = torch.tensor([model.config.num_classes])
    with torch.no_grad():
        for name, labels in (("out_kept", None), ("out_dropped", null)):
            out = model(swap(tensors["label/in_x"]), tensors["label/in_t"], labels=labels)
            close(swap(out), tensors[f"label/{name}"], f"label/{name}")


def test_position_resize(path):
    names = [name for name in load(path)[1] if name.startswith("pos_interp/")]
    if not names:
        pytest.skip("the file has no pos_interp/")
    grids = {name: [int(side) for side in name.split("_")[-1].split("x")] for name in names}
    (source,) = (name for name in names if "/in_" in name)
    for name in set(names) - {source}:
        tensors = load(path)[1]
        table = tensors[source].reshape(*grids[source], -1)
        close(resize_grid(table, *grids[name]).reshape(1, -1, table.shape[-1]), tensors[name], name)


def test_image_mode(path):
    needs(path, "image/out")
    official, tensors = load(path)
    weights = under(tensors, "image/weights/")
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    config = vdt_config(official, mode="image", frames=1, depth=depth)
    inferred = VDT.from_official(weights, heads=config.heads).config
    assert inferred == replace(config, class_dropout=inferred.class_dropout)
    model = VDT.from_official(weights, config=config).eval()
    with torch.no_grad():
        out = model(swap(tensors["image/in_x"]), tensors["image/in_t"])
    close(swap(out), tensors["image/out"], "image/out")


def test_official_weights_come_back_bit_for_bit(path):
    model, tensors = load_vdt(path)
    weights, back = under(tensors, "weights/"), model.to_official_state_dict()
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
