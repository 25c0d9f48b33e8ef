"""VDT: what it promises beside parity, and what it refuses."""

from dataclasses import asdict, replace

import pytest
import torch

from fastvid.models.vdt import VDT, VDT_L, VDT_S
from tests.models.tiny import TINY, close, redraw


@pytest.mark.parametrize(
    ("config", "millions", "trainable"),
    [
        (VDT_S, 41.4, 41.36),
        (VDT_L, 859.8, 859.70),
        (replace(VDT_S, mode="image", frames=1), 32.5, None),
        (replace(VDT_L, mode="image", frames=1), 673.8, None),
    ],
)
def test_published_sizes(config, millions, trainable):
    with torch.device("meta"):
        model = VDT(config)
    count = sum(value.numel() for value in model.state_dict().values()) / 1e6
    assert round(count, 1) == millions
    if trainable:
        assert round(sum(value.numel() for value in model.parameters()) / 1e6, 2) == trainable


def test_a_new_model_predicts_zero_and_moves_in_time(rand):
    model = VDT(TINY)
    latents = rand(1, 4, 6, 8, 12)
    assert not model(latents, torch.tensor([3])).any()
    x = rand(1, 6, 24, 32)
    block = model.blocks[0]
    assert not torch.equal(block(x.clone(), torch.zeros(1, 6, 32)), x)  # Xavier in temporal.fc
    bound = (6 / (TINY.dim + 3 * TINY.dim)) ** 0.5
    assert bound * 0.9 < block.spatial.qkv.weight.abs().max() <= bound
    assert 0.015 < model.timestep.fc2.weight.std() < 0.025
    assert not any(v.any() for n, v in model.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize("size", [(1, 8, 12), (6, 4, 8), (3, 2, 2)])
def test_smaller_clips_use_the_first_positions(model, clip, size):
    """Q7 of the official defects: one length, square frames."""
    T, H, W = size
    latents, timestep = clip
    out = model(latents[:, :, :T, :H, :W], timestep)
    state = model.to_official_state_dict()
    grid = state["pos_embed"].view(4, 6, -1)[: H // 2, : W // 2]
    state |= {"pos_embed": grid.reshape(1, -1, 32), "time_embed": state["time_embed"][:, :T]}
    small = replace(TINY, frames=T, height=H, width=W)
    exact = VDT.from_official(state, config=small).eval()
    close(out, exact(latents[:, :, :T, :H, :W], timestep))
    assert out.shape == (2, 8, T, H, W)


def test_one_timestep_serves_the_batch(model, clip):
    latents, _ = clip
    shared = model(latents, torch.tensor([5]))
    close(shared, model(latents, torch.tensor([5, 5])))


def test_fixed_variance_is_the_first_half_of_the_learned(model, clip):
    """Q4 of the official defects: swapped axes, which go unnoticed where T = C."""
    latents, timestep = clip[0][:, :, :4], clip[1]
    fixed = VDT(replace(TINY, learned_variance=False)).eval()
    state = model.state_dict()
    for name in ("final.weight", "final.bias"):  # rows ordered (row, column, channel)
        state[name] = state[name].unflatten(0, (4, 8))[:, :4].flatten(0, 1)
    fixed.load_state_dict(state)
    close(fixed(latents, timestep), model(latents, timestep)[:, :4])


def test_condition_frames_are_put_before_and_cut_off(model, clip):
    latents, timestep = clip
    out = model(latents[:, :, 2:], timestep, condition_frames=latents[:, :, :2])
    close(out, model(latents, timestep)[:, :, 2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bfloat16_and_float16(model, clip, dtype):
    """Q7 of the official defects: the timestep stays in float32 and does not fit the weights."""
    latents, timestep = clip
    with torch.no_grad():
        exact = model(latents, timestep)
        out = model.to(dtype)(latents, timestep)
    assert out.dtype == torch.float32
    assert (out - exact).norm() < 0.03 * exact.norm()


def test_autocast_trains_like_float32(model, clip):
    """Q9 of the official defects: no autocast."""
    latents, timestep = clip
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(latents, timestep).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    exact, rounded = gradients
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_autocast_infers_like_float32(model, clip):
    with torch.no_grad():
        exact = model(*clip)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(*clip)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("blocks", [1, 2])
def test_recomputed_blocks_give_the_same_gradients(model, clip, blocks):
    """Q9 of the official defects: no recomputation."""
    gradients = []
    for count in (0, blocks):
        model.checkpoint_blocks = count
        model.zero_grad()
        model(*clip).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_recomputed_blocks_keep_less(model, clip):
    def kept(count):
        model.checkpoint_blocks, seen = count, {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*clip)
        return sum(seen.values())

    assert kept(2) < kept(1) < kept(0)


def test_less_is_kept_than_one_tensor_per_layer(clip):
    """Per token and block, in units of the width: 5 temporal, 6 spatial, 6 in the MLP.

    The final layer keeps one more.
    """
    config = replace(TINY, depth=1, mlp_ratio=4.0)
    model, seen = redraw(VDT(config)), {}
    own = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    unit = 2 * 6 * 24 * 32 * 4  # bytes of the stream

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*clip)
    streams = sum(size for at, size in seen.items() if at not in own and size >= unit)
    assert streams <= (17 + 1) * unit


def test_folding_changes_nothing_but_the_parameters(model, clip):
    latents, timestep = clip
    before = sum(value.numel() for value in model.parameters())
    with torch.no_grad():
        exact = model(latents, timestep)
        close(model.fold()(latents, timestep), exact)
        folded = model(latents, timestep)
        assert model.fold() is model  # a second time, which changes nothing
        assert torch.equal(model(latents, timestep), folded)
    assert before - sum(value.numel() for value in model.parameters()) == 2 * (32 * 32 + 32)
    for save in (
        model.state_dict,
        torch.nn.Sequential(model).state_dict,
        model.to_official_state_dict,
        lambda: model.save_pretrained("never"),
    ):
        with pytest.raises(RuntimeError, match="folded"):
            save()


def test_inference_leaves_its_inputs_alone(model, clip):
    latents, timestep = clip
    before = latents.clone()
    with torch.no_grad():
        model(latents, timestep)
    assert torch.equal(latents, before)


def test_compiles_whole(model, clip):
    """Q9 of the official defects: no compiling."""
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(*clip)
    close(out, model(*clip))
    out.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(*clip).square().mean().backward()
    for name, p in model.named_parameters():
        close(gradients[name], p.grad)


def test_labels_drop_in_training_unless_told_otherwise(clip):
    """Q8 of the official defects: labels drop even where there is one class."""
    latents, timestep = clip
    model = redraw(VDT(replace(TINY, drop_labels=True, class_dropout=0.5))).train()
    torch.manual_seed(0)
    drawn = {tuple(model(latents, timestep).flatten().tolist()) for _ in range(6)}
    assert len(drawn) > 1
    model.eval()
    assert torch.equal(model(latents, timestep), model(latents, timestep))
    model = redraw(VDT(replace(TINY, class_dropout=0.5))).train()
    assert torch.equal(model(latents, timestep), model(latents, timestep))


def test_guidance_reaches_the_dropped_label(model, clip):
    """Q6 of the official defects: guidance raises."""
    latents, timestep = clip
    null = torch.tensor([TINY.num_classes])
    assert not torch.allclose(model(latents, timestep), model(latents, timestep, labels=null))
    mixed = model(latents, timestep, labels=torch.tensor([0, 1]))
    close(mixed[1], model(latents, timestep, labels=null)[1])


def test_image_weights_start_a_video_model(clip):
    latents, timestep = clip
    image = redraw(VDT(replace(TINY, mode="image", frames=1))).eval()
    video = VDT.from_image(image, frames=6).eval()
    assert video.config == replace(TINY, frames=6)
    for block in video.blocks:
        torch.nn.init.zeros_(block.temporal.fc.weight)
    video.time.zero_()
    frames = torch.stack([image(latents[:, :, t : t + 1], timestep)[:, :, 0] for t in range(6)], 2)
    close(video(latents, timestep), frames)
    with pytest.raises(ValueError, match="image must have"):
        VDT.from_image(video)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 30, "heads": 2}, "dim must be a multiple of 4"),
        ({"heads": 3}, "dim must be a multiple of 3"),
        ({"height": 7}, "height must be a multiple of 2"),
        ({"depth": 0}, "depth must be positive"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be"),
        ({"class_dropout": 1.0}, "class_dropout must be in"),
        ({"mode": "audio"}, "mode must be"),
        ({"mode": "image"}, "frames=1"),
        ({"mlp_ratio": float("nan")}, r"mlp_ratio must be in \[1 / dim, 256\], got nan"),
        ({"mlp_ratio": 1e308}, "mlp_ratio must be in"),
    ],
)
def test_configs_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


SIZES = [name for name, value in asdict(TINY).items() if type(value) is int]


@pytest.mark.parametrize("name", SIZES)
def test_absurd_sizes_are_refused_before_anything_is_made(name):
    with pytest.raises(ValueError, match=f"{name} must be at most [0-9]+, got 1000000000000"):
        replace(TINY, **{name: 10**12})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_ratio": "4"}, "mlp_ratio must be float, got '4'"),
        ({"depth": 2.5}, r"depth must be int, got 2\.5"),
        ({"heads": True}, "heads must be int, got True"),
        ({"class_dropout": None}, "class_dropout must be float, got None"),
        ({"drop_labels": 0}, "drop_labels must be bool, got 0"),
        ({"learned_variance": "no"}, "learned_variance must be bool, got 'no'"),
    ],
)
def test_values_of_another_type(change, message):
    with pytest.raises(TypeError, match=message):
        replace(TINY, **change)
    assert replace(TINY, mlp_ratio=4).mlp_ratio == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"latents": (2, 3, 6, 8, 12)}, ValueError, r"latents must be \(B, 4, T, H, W\)"),
        ({"latents": (2, 4, 7, 8, 12)}, ValueError, "1 to 6 frames, got 7"),
        ({"latents": (2, 4, 0, 8, 12)}, ValueError, "1 to 6 frames, got 0"),
        (
            {"latents": torch.ones(4, 6, 8, 12)},
            ValueError,
            r"latents must be .* got \(4, 6, 8, 12\)",
        ),
        ({"condition_frames": torch.ones(4, 1, 8, 12)}, ValueError, "condition_frames must be"),
        ({"latents": (2, 4, 6, 10, 12)}, ValueError, "H of latents .* at most 8"),
        ({"latents": (2, 4, 6, 8, 11)}, ValueError, "W of latents must be a multiple of 2"),
        ({"timestep": torch.tensor([1, 2, 3])}, ValueError, r"timestep must be \(2,\) or \(1,\)"),
        ({"timestep": torch.tensor([0.5])}, TypeError, "timestep must be integers"),
        ({"known": torch.ones(2, 6)}, TypeError, "known must be bool, True where given"),
        ({"known": torch.ones(2, 5).bool()}, ValueError, r"known must be \(2, 6\) or"),
        ({"latents": torch.ones(2, 4, 6, 8, 12).int()}, TypeError, "latents must be a floating"),
        ({"timestep": 5}, TypeError, "timestep must be integers, as a tensor, got int"),
        ({"timestep": torch.tensor([True])}, TypeError, "timestep must be integers.*bool"),
        ({"known": [[True] * 6] * 2}, TypeError, "known must be bool.* got list"),
        ({"labels": torch.tensor([0.0])}, TypeError, "labels must be integers"),
        ({"labels": [0, 1]}, TypeError, "labels must be integers.* got list"),
        ({"labels": torch.tensor([0, 0, 0])}, ValueError, r"labels must be \(2,\) or \(1,\)"),
        ({"labels": torch.tensor([[0], [0]])}, ValueError, r"labels must be \(2,\) or \(1,\)"),
        ({"labels": torch.tensor([0, 2])}, ValueError, r"labels must be 0 to 1, got \[0, 2\]"),
        ({"labels": torch.tensor([-1])}, ValueError, r"labels must be 0 to 1, got \[-1\]"),
        ({"condition_frames": [1]}, TypeError, "condition_frames must be a floating"),
        ({"condition_frames": torch.ones(2, 4, 1, 8, 8)}, ValueError, "condition_frames must be"),
        ({"condition_frames": torch.ones(2, 4, 1, 8, 12)}, ValueError, "got 7"),
    ],
)
def test_bad_input_is_named(model, arguments, error, message):
    latents = arguments.pop("latents", (2, 4, 6, 8, 12))
    latents = torch.zeros(latents) if isinstance(latents, tuple) else latents
    timestep = arguments.pop("timestep", torch.tensor([1]))
    with pytest.raises(error, match=message):
        model(latents, timestep, **arguments)
