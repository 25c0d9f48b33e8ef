"""MarDini does what PyTorch expects of a module, comes back from files, and refuses nonsense."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils import _pytree

from fastvid.models.mardini import (
    MARDINI_TINY,
    GeneratorConfig,
    MarDini,
    MarDiniConfig,
    PlannerConfig,
)
from tests.models.mardini_cases import TINY, clip, config_of
from tests.models.tiny import close, redraw

KNOWN = [[1, 0, 0, 1, 0], [0, 1, 1, 0, 0]]


def drawn(config=TINY):
    return redraw(MarDini(config), std=0.2).eval()


@pytest.fixture
def model():
    return drawn()


@pytest.fixture
def inputs(rand, model):
    latents, timestep, known, low = clip(rand, model, KNOWN)
    return {"latents": latents, "timestep": timestep, "known": known, "low": low}


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("attention", "recorded"), [("time", True), ("clip", False)])
def test_one_dynamic_graph_serves_all_sizes(rand, attention, recorded):
    config = config_of(attention=attention, ref_t="zero", planner={"depth": 1})
    model = drawn(replace(config, channels=7))  # a number that no size of the first clip is
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    sizes = [(KNOWN, 10, 14), ([[1, 0, 0]] * 3, 10, 4), ([[0, 1, 1, 0]] * 2, 8, 8)]
    with torch.set_grad_enabled(recorded):
        for known, height, width in sizes:
            latents, timestep, known, low = clip(rand, model, known, height, width)
            expected = model(latents, timestep, known=known, low=low)
            close(compiled(latents, timestep, known=known, low=low), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("attention", ["time", "clip"])
def test_compiles_for_sampling(rand, attention):
    model = drawn(config_of(attention=attention, ref_t="zero", planner={"depth": 1}))
    latents, timestep, known, low = clip(rand, model, KNOWN)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        planning = model.project(model.plan(low, known))
        references = model.references(latents, known, planning)
        expected = model(latents, timestep, known=known, planning=planning)
        close(compiled(latents, timestep, known=known, planning=planning), expected)
        close(compiled(latents, timestep, known=known, references=references), expected)


def test_frames_that_only_a_device_knows_are_computed_and_left_out(model, inputs, monkeypatch):
    expected, wanted = model(**inputs), gradients(model, inputs)
    monkeypatch.setattr("fastvid.models.mardini_networks.places", lambda chosen: None)
    close(model(**inputs), expected)
    for name, gradient in gradients(model, inputs).items():
        close(gradient, wanted[name])


@pytest.mark.parametrize("attention", ["time", "clip"])
@pytest.mark.parametrize("recorded", [True, False])
def test_meta(rand, attention, recorded):
    model = drawn(config_of(attention=attention)).to("meta")
    latents, timestep, known, low = clip(rand, model, KNOWN)
    with torch.set_grad_enabled(recorded):
        places = (latents.to("meta"), timestep.to("meta"))
        out = model(*places, known=known.to("meta"), low=low.to("meta"))
    assert out.shape == latents.shape
    assert out.device.type == "meta"


@pytest.mark.parametrize("attention", ["time", "clip"])
def test_recomputed_blocks_give_the_same_gradients(rand, attention):
    model = drawn(config_of(attention=attention))
    latents, timestep, known, low = clip(rand, model, KNOWN)
    inputs = {"latents": latents, "timestep": timestep, "known": known, "low": low}
    exact, runs = gradients(model, inputs), []
    for block in model.blocks:
        block.spatial.register_forward_pre_hook(lambda *_: runs.append(1))
    model.checkpoint_blocks = 1
    again = gradients(model, inputs)
    assert len(runs) == 4 + 2  # the first block of either network runs twice
    for name, gradient in exact.items():
        assert torch.equal(again[name], gradient)


def test_autocast_to_bfloat16_is_near_float32(model, inputs):
    exact, out = gradients(model, inputs), model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(**inputs)
        rounded = gradients(model, inputs)
    assert narrow.dtype == torch.float32
    assert (narrow - out).norm() < 0.05 * out.norm()
    assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
    error = sum((rounded[name] - exact[name]).square().sum() for name in exact)
    assert error < 0.1**2 * sum(gradient.square().sum() for gradient in exact.values())


def test_pure_bfloat16_is_near_float32(model, inputs):
    exact = model(**inputs)
    narrow = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    out = model.bfloat16()(**narrow)
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() < 0.1 * exact.norm()


def test_planning_and_references_are_pytrees(inputs):
    model = drawn(config_of(ref_t="zero"))
    planning = model.project(model.plan(inputs["low"], inputs["known"]))
    references = model.references(inputs["latents"], inputs["known"], planning)
    detached = _pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (planning, references))
    call = [inputs[name] for name in ("latents", "timestep")], {"known": inputs["known"]}
    close(
        model(*call[0], **call[1], references=detached[1]),
        model(*call[0], **call[1], planning=detached[0]),
    )


@pytest.fixture
def alone_in_the_world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_per_block_with_recomputation(model, inputs, alone_in_the_world):
    exact = gradients(model, inputs)
    model.zero_grad()
    model.checkpoint_blocks = 1
    for block in model.blocks:
        fully_shard(block, mesh=alone_in_the_world)
    fully_shard(model, mesh=alone_in_the_world)
    model(**inputs).square().mean().backward()
    for name, p in model.named_parameters():
        if name in exact:
            close(p.grad.full_tensor(), exact[name])


def test_comes_back_from_a_folder(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MarDini.from_pretrained(tmp_path)
    assert loaded.config == model.config
    close(loaded(**inputs), model(**inputs), 0)
    values = json.loads((tmp_path / "config.json").read_text())
    values["planner"]["depht"] = 3
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(TypeError, match="depht"):
        MarDini.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"known": torch.zeros(2, 5).bool()},
            ValueError,
            r"known must have 1 to 4 .* got \[0, 0\]",
        ),
        ({"known": torch.ones(2, 5).bool()}, ValueError, r"known must have 1 to 4 .* got \[5, 5\]"),
        ({"known": torch.ones(2, 5)}, TypeError, "known must be bool"),
        ({"known": torch.ones(2, 4).bool()}, ValueError, r"known must be \(2, 5\)"),
        ({"latents": torch.zeros(2, 3, 5, 6, 4)}, ValueError, r"latents must be \(B, 4, T, H, W\)"),
        ({"latents": torch.zeros(2, 4, 5, 6, 4).long()}, TypeError, "latents must be a floating"),
        ({"latents": torch.zeros(2, 4, 7, 6, 4)}, ValueError, "at most 6 frames.*longer=True"),
        ({"latents": torch.zeros(2, 4, 5, 6, 0)}, ValueError, "H and W of latents"),
        ({"low": torch.zeros(2, 4, 5, 4, 4)}, ValueError, r"low must be \(2, 4, 5, 4, 3\)"),
        ({"low": torch.zeros(2, 4, 4, 4, 3)}, ValueError, r"low must be \(2, 4, 5, 4, 3\)"),
        ({"low": torch.zeros(2, 1, 5, 4, 3)}, ValueError, r"low must be \(B, 4, T, H, W\)"),
        ({"timestep": torch.zeros(2)}, TypeError, "timestep must be integers"),
        ({"timestep": torch.zeros(3).long()}, ValueError, r"timestep must be \(2,\)"),
        ({"dropped": torch.zeros(2)}, TypeError, "dropped must be bool"),
        ({"dropped": torch.zeros(3).bool()}, ValueError, r"dropped must be \(2,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_by_name(model, inputs, change, error, message):
    with pytest.raises(error, match=message):
        model(**(inputs | change))


def test_a_plan_of_other_sizes_is_refused(model, inputs):
    known, low = inputs["known"], inputs["low"]
    with pytest.raises(ValueError, match="low must have 4 cells on its longer side"):
        model.plan(torch.zeros(2, 4, 5, 8, 4), known)
    short = model.project(model.plan(low[:, :, :4], known[:, :4]))
    call = {name: inputs[name] for name in ("latents", "timestep", "known")}
    with pytest.raises(ValueError, match="planning must be of 2 samples and 5 frames"):
        model(**call, planning=short)
    with pytest.raises(ValueError, match="dropped"):
        model(**call, planning=short, dropped=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="height must divide"):
        model.reconstruct(model.plan(low, known), height=5)


def test_references_are_refused_where_they_would_not_be_exact(rand, inputs):
    latents, known = inputs["latents"], inputs["known"]
    with pytest.raises(ValueError, match='ref_t must be "zero"'):
        (shared := drawn()).references(latents, known, shared.project(None))
    for choices, message in (
        ({"identity": "none"}, "identity must not be"),
        ({}, "as many frames in each sample, got"),
    ):
        model = drawn(config_of(ref_t="zero", **choices))
        ragged = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
        with pytest.raises(ValueError, match=message):
            model.references(latents, ragged, model.project(None))
    references = model.references(latents, known, model.project(None))
    with pytest.raises(ValueError, match="references must be of 4 frames"):
        model(latents[:, :, :4], torch.tensor([1]), known=known[:, :4], references=references)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PlannerConfig(heads=30), ValueError, "dim must be heads = 30"),
        (lambda: PlannerConfig(depth=0), ValueError, "depth must be 1"),
        (lambda: PlannerConfig(side=33, patch=2), ValueError, "side must be"),
        (lambda: PlannerConfig(hidden="relu"), ValueError, "hidden must be one of"),
        (lambda: PlannerConfig(identity="full"), ValueError, "identity must be one of"),
        (lambda: GeneratorConfig(attention="space"), ValueError, "attention must be one of"),
        (lambda: GeneratorConfig(ref_t=0), ValueError, "ref_t must be one of"),
        (lambda: GeneratorConfig(cross_scope="all"), ValueError, "cross_scope must be one of"),
        (lambda: GeneratorConfig(frame_channels=65), ValueError, "frame_channels must be even"),
        (lambda: GeneratorConfig(qk_norm="batch"), ValueError, "qk_norm must be one of"),
        (lambda: GeneratorConfig(theta=1.0), ValueError, "theta must be above 1"),
        (lambda: GeneratorConfig(dim=1024.0), TypeError, "dim must be int"),
        (lambda: MarDiniConfig(frames=0), ValueError, "frames must be 1"),
        (lambda: MarDiniConfig(frames=65), ValueError, "frames must be at most 64"),
        (lambda: MarDiniConfig(planner=MARDINI_TINY), TypeError, "planner must be a PlannerConfig"),
        (lambda: replace(TINY, longer=1), TypeError, "longer must be bool"),
    ],
)
def test_a_config_refuses_nonsense(make, error, message):
    with pytest.raises(error, match=message):
        make()
