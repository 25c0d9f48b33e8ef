"""MarDini against a plain model on the same weights, and what its parts promise of each other."""

from dataclasses import replace

import pytest
import torch

from fastvid.models.mardini import (
    MARDINI_L_ST,
    MARDINI_L_T,
    MARDINI_S_ST,
    MARDINI_S_T,
    MARDINI_TINY,
    MarDini,
)
from tests.models.mardini_cases import TINY, clip, config_of, models
from tests.models.tiny import close, redraw

KNOWN = {
    "two frames": [[1, 0]],
    "the first": [[1, 0, 0, 0, 0]],
    "both ends": [[1, 0, 0, 1], [1, 0, 0, 1]],
    "as many, elsewhere": [[1, 0, 0, 1, 0], [0, 1, 1, 0, 0]],
    "one and four": [[0, 0, 1, 0, 0], [1, 1, 0, 1, 1]],
    "shared": [[0, 1, 0]],
}
CHOICES = [
    {},
    {"attention": "clip"},
    {"ref_t": "zero"},
    {"attention": "clip", "ref_t": "zero", "cross_scope": "clip"},
    {"next_token": True, "patch": 2, "frame_channels": 4, "theta": 100.0},
    {"identity": "self_frame", "attention": "clip"},
    {"identity": "bypass"},
    {"identity": "bypass", "attention": "clip", "planner": {"identity": "bypass"}},
    {"identity": "none", "attention": "clip", "planner": {"identity": "none"}},
    {"qk_norm": "rms", "planner": {"qk_norm": "rms", "next_token": False, "patch": 2}},
    {"planner": {"identity": "self_frame", "frame_channels": 6}},
]


@pytest.mark.parametrize(
    ("config", "planner", "generator"),
    [
        (MARDINI_S_ST, (1.30e9, 1.36e9), (283e6, 295e6)),
        (MARDINI_L_ST, (3.05e9, 3.26e9), (283e6, 295e6)),
        (MARDINI_S_T, (1.30e9, 1.36e9), (283e6, 295e6)),
        (MARDINI_L_T, (3.05e9, 3.26e9), (283e6, 295e6)),
    ],
)
def test_as_many_parameters_as_published(config, planner, generator):
    with torch.device("meta"):
        model = MarDini(config)
    for network, (low, high) in ((model.planner, planner), (model.generator, generator)):
        assert low <= sum(p.numel() for p in network.parameters()) <= high


def test_the_gated_mlp_has_as_many_parameters_too():
    planner = replace(MARDINI_L_T.planner, hidden="swiglu")
    with torch.device("meta"):
        model = MarDini(replace(MARDINI_L_T, planner=planner)).planner
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(3.255e9, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_is_the_plain_model(rand, choices, dtype):
    model, peer = models(config_of(**choices), dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    latents, timestep, known, low = clip(rand, model, KNOWN["as many, elsewhere"], dtype=dtype)
    with torch.no_grad():
        signal = model.plan(low, known)
        close(signal, peer.plan(low, known), tolerance)
        found = model(latents, timestep, known=known, planning=model.project(signal))
        close(found, peer(latents, timestep, known, signal), tolerance)


@pytest.mark.parametrize("attention", ["time", "clip"])
@pytest.mark.parametrize("known", KNOWN.values(), ids=list(KNOWN))
def test_any_frames_may_be_known(rand, known, attention):
    model, peer = models(config_of(attention=attention))
    latents, timestep, known, low = clip(rand, model, known, height=4, width=10)
    with torch.no_grad():
        found = model(latents, timestep, known=known, low=low)
        close(found, peer(latents, timestep, known, peer.plan(low, known)))
    assert not found.movedim(2, 1)[known].any()


def test_one_row_of_known_serves_all_samples(rand):
    model, _ = models(TINY)
    latents, _, known, low = clip(rand, model, KNOWN["both ends"])
    timestep = torch.tensor([20])
    with torch.no_grad():
        each = model(latents, timestep.expand(2), known=known, low=low)
        close(model(latents, timestep, known=known[:1], low=low), each)


@pytest.mark.parametrize("hidden", ["silu", "swiglu"])
def test_other_mlps_run(rand, hidden):
    model = redraw(MarDini(config_of(hidden=hidden, planner={"hidden": hidden})))
    latents, timestep, known, low = clip(rand, model, KNOWN["the first"])
    model(latents, timestep, known=known, low=low).square().mean().backward()
    assert model.planner.blocks[0].mlp.fc1.weight.grad.any()


@pytest.mark.parametrize("identity", ["self_token", "self_frame", "bypass"])
def test_what_is_planned_for_a_known_frame_follows_from_it_alone(rand, identity):
    model, _ = models(config_of(planner={"identity": identity}))
    _, _, known, low = clip(rand, model, [[0, 1, 0, 1, 0]])
    changed = low.clone()
    changed[:, :, 3] += 1
    with torch.no_grad():
        before, after = model.plan(low, known), model.plan(changed, known)
    assert torch.equal(before[:, 1], after[:, 1])
    for frame in (0, 2, 3, 4):
        assert not torch.allclose(before[:, frame], after[:, frame])


def test_unknown_frames_are_never_read_by_the_planner(rand):
    model, _ = models(TINY)
    latents, timestep, known, low = clip(rand, model, KNOWN["as many, elsewhere"])
    poisoned = low.where(known[:, None, :, None, None], torch.nan)
    found = model(latents, timestep, known=known, low=poisoned)
    close(found, model(latents, timestep, known=known, low=low), 0)
    found.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_plan_is_made_once_and_read_in_every_step(rand):
    model, peer = models(TINY)
    latents, _, known, low = clip(rand, model, KNOWN["both ends"])
    calls = []
    model.planner.register_forward_hook(lambda *_: calls.append("planner"))
    for block in model.generator.blocks:
        block.cross.kv.register_forward_hook(lambda *_: calls.append("keys and values"))
    with torch.no_grad():
        planning = model.project(model.plan(low, known))
        signal = peer.plan(low, known)
        for step in (900, 500, 1):
            t = torch.tensor([step])
            found = model(latents, t, known=known, planning=planning)
            close(found, peer(latents, t, known, signal))
    assert calls == ["planner"] + ["keys and values"] * 2


@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_without_a_plan_is_cross_attention_on_the_learned_token(rand, scope):
    model, peer = models(config_of(cross_scope=scope))
    latents, timestep, known, low = clip(rand, model, KNOWN["both ends"])
    queries = []
    for block in model.generator.blocks:
        block.cross.q.register_forward_hook(lambda *_: queries.append("q"))
    with torch.no_grad():
        none = model(latents, timestep, known=known, planning=model.project(None))
        assert scope == "clip" or not queries  # one row is added, nothing attends
        close(none, peer(latents, timestep, known, None, tokens=5))
        close(none, model(latents, timestep, known=known))
        dropped = torch.ones(2, dtype=torch.bool)
        close(none, model(latents, timestep, known=known, low=low, dropped=dropped))


def test_dropped_samples_do_without_their_plan(rand):
    model, _ = models(TINY)
    latents, timestep, known, low = clip(rand, model, KNOWN["as many, elsewhere"])
    dropped = torch.tensor([True, False])
    with torch.no_grad():
        found = model(latents, timestep, known=known, low=low, dropped=dropped)
        again = model.project(model.plan(low, known), dropped)
        close(found, model(latents, timestep, known=known, planning=again))
        close(found[0], model(latents, timestep, known=known)[0])
        close(found[1], model(latents, timestep, known=known, low=low)[1])


@pytest.mark.parametrize("identity", ["self_token", "self_frame", "bypass"])
@pytest.mark.parametrize("attention", ["time", "clip"])
@pytest.mark.parametrize("name", ["the first", "both ends", "as many, elsewhere"])
def test_references_give_what_is_computed_without_them(rand, name, attention, identity):
    scope = "clip" if name == "both ends" else "frame"
    choices = {"attention": attention, "identity": identity, "cross_scope": scope}
    model, _ = models(config_of(ref_t="zero", **choices))
    latents, timestep, known, low = clip(rand, model, KNOWN[name])
    ours = {"planned": model.plan(low, known), "without a plan": None}
    with torch.no_grad():
        for signal in ours.values():
            planning = model.project(signal)
            references = model.references(latents, known, planning)
            noisy = latents.where(known[:, None, :, None, None], rand(*latents.shape))
            for t in (timestep, timestep + 100):
                wanted = model(noisy, t, known=known, planning=planning)
                close(model(noisy, t, known=known, references=references), wanted)


def test_known_frames_are_not_computed_again_with_references(rand):
    model, _ = models(config_of(ref_t="zero"))
    latents, timestep, known, low = clip(rand, model, KNOWN["as many, elsewhere"])
    with torch.no_grad():
        references = model.references(latents, known, model.project(model.plan(low, known)))
        rows = []
        for block in model.generator.blocks:
            block.mlp.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[1]))
        poisoned = latents.masked_fill(known[:, None, :, None, None], torch.nan)
        found = model(poisoned, timestep, known=known, references=references)
    assert rows == [3 * 24] * 2
    assert found.isfinite().all()


def test_the_last_block_leaves_known_frames_out(rand):
    model, _ = models(TINY)
    latents, timestep, known, low = clip(rand, model, KNOWN["as many, elsewhere"])
    rows = []
    for block in model.generator.blocks:
        block.mlp.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[1]))
        block.cross.q.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[1]))
    with torch.no_grad():
        model(latents, timestep, known=known, low=low)
    assert rows == [5, 5 * 24, 3, 3 * 24]


def test_attention_over_time_takes_over_the_weights_of_attention_over_clips(rand):
    model, _ = models(config_of(attention="clip"))
    swapped = model.with_temporal(frames=9)
    assert swapped.config.generator.attention == "time"
    assert swapped.config.frames == 9
    own = swapped.state_dict()
    for name, value in model.state_dict().items():
        assert own[name].data_ptr() == value.data_ptr()
    loaded = MarDini(config_of(attention="time"))
    loaded.load_state_dict(model.state_dict(), strict=True)
    latents, timestep, known, low = clip(rand, model, KNOWN["the first"])
    with torch.no_grad():
        found = swapped(latents, timestep, known=known, low=low)
        close(found, loaded(latents, timestep, known=known, low=low), 0)
        assert not torch.allclose(found, model(latents, timestep, known=known, low=low))


@pytest.mark.parametrize("options", [{}, {"next_token": True, "signal_next": True, "patch": 2}])
def test_the_first_stage_reads_latents_off_the_plan(rand, options):
    model, _ = models(config_of(planner=options))
    _, _, known, low = clip(rand, model, KNOWN["the first"], height=4, width=8)
    found = model.reconstruct(model.plan(low, known), height=low.shape[3])
    assert found.shape == low.shape
    found.square().mean().backward()
    assert model.planner.blocks[0].clip.q.weight.grad.any()
    if not options:  # a token is a cell: its place in the picture is kept
        signal = torch.zeros(1, 5, 8, 64)
        signal[:, :, 5] = 1
        lit = model.reconstruct(signal, height=2) - model.reconstruct(signal * 0, height=2)
        assert lit.abs().sum((0, 1, 2)).nonzero().tolist() == [[1, 1]]


def test_the_planner_learns_through_cross_attention_and_through_modulation(rand):
    latents, timestep, known, low = clip(rand, models(TINY)[0], KNOWN["both ends"])
    norms = []
    for silent in (None, "cross", "modulation"):
        model, _ = models(TINY)
        if silent == "cross":
            for block in model.generator.blocks:
                block.cross.proj.weight.data.zero_()
        if silent == "modulation":
            model.generator.plan.weight.data.zero_()
        model(latents, timestep, known=known, low=low).square().mean().backward()
        grads = [p.grad for name, p in model.planner.named_parameters() if "head" not in name]
        assert all(grad.isfinite().all() for grad in grads)
        norms.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
    assert min(norms) > 0
    assert len({round(norm, 9) for norm in norms}) == 3


def test_gradients_are_those_of_the_plain_model(rand):
    model, peer = models(config_of(attention="clip"), torch.float64)
    latents, timestep, known, low = clip(rand, model, KNOWN["one and four"], dtype=torch.float64)
    weight = rand(*latents.shape, dtype=torch.float64)
    (model(latents, timestep, known=known, low=low) * weight).sum().backward()
    (peer(latents, timestep, known, peer.plan(low, known)) * weight).sum().backward()
    theirs = dict(peer.named_parameters())
    for name, value in model.named_parameters():
        if value.grad is not None:
            close(value.grad, theirs[name].grad, 1e-10)


def test_starts_from_nothing_and_can_learn(rand):
    model = MarDini(TINY)
    latents, timestep, known, low = clip(rand, model, KNOWN["the first"])
    assert not model(latents, timestep, known=known, low=low).any()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    target = rand(*latents.shape) * ~known[:, None, :, None, None]
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(latents, timestep, known=known, low=low) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_more_frames_than_in_training_on_request(rand):
    model = redraw(MarDini(replace(TINY, longer=True)))
    known = [[1] + [0] * 8]
    latents, timestep, known, low = clip(rand, model, known)
    assert model(latents, timestep, known=known, low=low).shape[2] == 9


def test_planning_sizes_keep_the_picture():
    model = MarDini(replace(MARDINI_TINY, planner=replace(MARDINI_TINY.planner, side=32, depth=1)))
    assert model.planning_size(64, 64) == (32, 32)
    assert model.planning_size(40, 64) == (20, 32)
    assert model.planning_size(16, 4) == (32, 8)
    assert model.planning_size(1000, 1) == (32, 1)
