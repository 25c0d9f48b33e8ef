"""The networks of Pyramid Flow: what they promise beside parity, and what they refuse."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fastvid.models.pyramid_columns import Column
from fastvid.models.pyramid_flow import (
    PyramidFlux,
    PyramidFluxConfig,
    PyramidMMDiT,
    PyramidMMDiTConfig,
)
from fastvid.training.distributed import World, shard, whole
from tests.models.tiny import close, redraw

SIZE = {"channels": 4, "heads": 2, "head_width": 32, "text_width": 24, "pooled_width": 20}
FLUX = PyramidFluxConfig(
    **SIZE, joint_blocks=2, single_blocks=2, time_width=8, row_width=12, column_width=12
)
MMDIT = PyramidMMDiTConfig(**SIZE, joint_blocks=3, positions=16, trained_positions=8, frames=20)
MMDIT_ONE = replace(MMDIT, joint_blocks=1)
LOW, MIDDLE, HIGH = (4, 6), (8, 12), (16, 24)


@pytest.fixture(params=[FLUX, MMDIT], ids=["flux", "mmdit"])
def model(request):
    kind = PyramidFlux if request.param is FLUX else PyramidMMDiT
    return redraw(kind(request.param)).eval()


@pytest.fixture
def column(rand):
    """A column of clips (frames, size), the last one noisy, its texts of so many valid tokens."""

    def draw(clips=((3, LOW), (1, MIDDLE), (1, MIDDLE)), lengths=(7, 3), L=10):
        B = len(lengths)
        *history, noisy = (rand(B, 4, frames, *size) for frames, size in clips)
        timestep = torch.linspace(300, 900, B)
        return Column(noisy, timestep, rand(B, L, 24), torch.tensor(lengths), rand(B, 20), history)

    return draw


def call(model, column, **more):
    arguments = column._asdict() | more
    return model(arguments.pop("latents"), arguments.pop("timestep"), **arguments)


def extend(model, column, **more):
    arguments = column._asdict() | more
    return model.extend(arguments.pop("latents"), arguments.pop("timestep"), **arguments)


@pytest.mark.parametrize(
    ("kind", "config", "count"),
    [
        (PyramidFlux, PyramidFluxConfig(), 1_972_059_200),
        (PyramidMMDiT, PyramidMMDiTConfig(), 2_028_334_144),
    ],
)
def test_published_sizes(kind, config, count):
    with torch.device("meta"):
        model = kind(config)
    assert sum(value.numel() for value in model.parameters()) == count
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_a_new_model_predicts_zero(model, column):
    model.reset_parameters()
    assert not call(model, column()).any()
    block = model.blocks[0].video
    for part in block.qkv.weight.chunk(3):  # three layers, not one wide one
        assert part.abs().max() > (6 / (2 * 64)) ** 0.5 * 0.9
    assert 0.015 < model.context.weight.std() < 0.025
    zeros = [layer for name, layer in model.named_modules() if name.endswith("modulation")]
    assert len(zeros) > len(model.blocks)
    assert not any(value.any() for layer in [*zeros, model.final] for value in layer.parameters())


@pytest.mark.parametrize(
    "clips",
    [
        [(1, HIGH)],  # an image
        [(4, LOW)],  # several noisy frames at once
        [(1, LOW), (1, LOW)],
        [(5, LOW), (1, MIDDLE), (1, HIGH), (2, HIGH)],
        [(2, (2, 4)), (1, (4, 8)), (1, (8, 16))],
        [(1, (6, 2)), (1, (18, 6))],  # thirds
    ],
)
@pytest.mark.parametrize("lengths", [(10, 1), (4,)])
def test_any_frames_and_resolution(model, column, clips, lengths):
    inputs = column(clips, lengths)
    with torch.no_grad():
        out = call(model, inputs)
    assert out.shape == inputs.latents.shape
    assert out.isfinite().all()
    for b in range(len(lengths)):  # no sample depends on another
        alone = inputs._replace(
            **{name: getattr(inputs, name)[b : b + 1] for name in Column._fields[:-1]},
            history=[clip[b : b + 1] for clip in inputs.history],
        )
        with torch.no_grad():
            close(call(model, alone), out[b : b + 1])


def test_padding_of_the_text_changes_nothing(model, column):
    inputs = column()
    text = inputs.text.clone()
    for row, length in zip(text, inputs.text_lengths, strict=True):
        row[length:] = 1e3
    with torch.no_grad():
        out = call(model, inputs)
        assert torch.equal(call(model, inputs._replace(text=text)), out)
        text[:, 0] += 1
        assert not torch.allclose(call(model, inputs._replace(text=text)), out)


def test_every_frame_of_the_history_counts_and_later_ones_are_not_seen(model, column):
    inputs = column([(2, LOW), (3, MIDDLE)])
    with torch.no_grad():
        out = call(model, inputs)
        for frame in range(2):
            history = inputs.history[0].clone()
            history[:, :, frame] += 1
            assert not torch.allclose(call(model, inputs._replace(history=[history])), out)
        latents = inputs.latents.clone()
        latents[:, :, 2] += 1
        changed = call(model, inputs._replace(latents=latents))
    close(changed[:, :, :2], out[:, :, :2])
    assert not torch.allclose(changed[:, :, 2], out[:, :, 2])


class TestPacked:
    @pytest.fixture
    def columns(self, column):
        return [
            column([(1, LOW)], (10, 10)),
            column([(1, MIDDLE), (1, MIDDLE)], (1,)),
            column([(2, LOW), (1, MIDDLE), (1, HIGH), (1, HIGH)], (2, 9, 4)),
        ]

    def test_columns_of_any_size_are_what_they_are_alone(self, model, columns):
        with torch.no_grad():
            outputs = model.packed(columns)
            for column, out in zip(columns, outputs, strict=True):
                close(out, call(model, column))

    def test_a_linear_layer_is_called_once_for_all(self, model, columns):
        rows = []
        for block in model.blocks:
            layer = block.video.qkv if hasattr(block, "video") else block.qkv
            layer.register_forward_hook(lambda _, inputs, out: rows.append(len(out)))
        model.packed(columns)
        video = 2 * 6 + 2 * 24 + 3 * (2 * 6 + 24 + 96 + 96)
        text = 2 * 10 + 1 + (2 + 9 + 4)  # what is padding is left out
        joint = len(model.blocks) if isinstance(model, PyramidMMDiT) else 2
        assert rows == [video] * joint + [video + text] * (len(model.blocks) - joint)

    def test_only_the_noisy_tokens_go_through_the_end_of_the_last_block(self, model, columns):
        rows = []
        block = model.blocks[-1]
        layer = block.video.proj if hasattr(block, "video") else block.fc
        layer.register_forward_hook(lambda _, inputs, out: rows.append(len(out)))
        model.packed(columns)
        assert rows == [2 * 6 + 24 + 3 * 96]

    def test_nothing_to_do_is_refused(self, model):
        with pytest.raises(ValueError, match="columns must hold at least one Column"):
            model.packed([])

    def test_a_bad_column_is_named(self, model, columns):
        columns[1] = columns[1]._replace(pooled=columns[1].pooled[:, 1:])
        with pytest.raises(ValueError, match=r"columns\[1\]\.pooled must be \(1, 20\)"):
            model.packed(columns)


class TestPrefix:
    """Text and oldest frames are computed once for all units that see them."""

    @pytest.mark.parametrize("lengths", [(7, 3), (10, 1), (4,)])
    def test_reuse_is_exact(self, model, column, lengths):
        first = column([(3, LOW), (1, MIDDLE), (1, MIDDLE)], lengths)
        with torch.no_grad():
            plain = call(model, first)
            out, prefix = extend(model, first, keep=3)
            close(out, plain)
            assert prefix.frames == 3
            for frames in (4, 6):  # units to come: what was newest is now at the lowest stage
                more = column([(frames - 3, LOW), (1, MIDDLE), (1, MIDDLE)], lengths)
                low = torch.cat([first.history[0], more.history[0]], 2)
                unit = more._replace(
                    history=[low, more.history[1]],
                    **{name: getattr(first, name) for name in Column._fields[1:5]},
                )
                plain = call(model, unit)
                close(call(model, unit, prefix=prefix), plain)
                out, prefix = extend(model, unit, prefix=prefix, keep=frames)
                close(out, plain)
                close(call(model, unit, prefix=prefix), plain)
                first = unit

    def test_what_it_holds_is_not_computed_again(self, model, column):
        inputs = column([(3, LOW), (1, MIDDLE), (1, MIDDLE)])
        _, prefix = extend(model, inputs, keep=2)
        tokens = []
        for block in model.blocks:
            for name, layer in block.named_modules():
                if name.endswith("qkv"):
                    layer.register_forward_hook(lambda _, inputs, out: tokens.append(len(out)))
        call(model, inputs, prefix=prefix)
        assert tokens == [2 * (6 + 24 + 24)] * len(model.blocks)
        tokens.clear()
        call(model, inputs)
        joint = [2 * (3 * 6 + 24 + 24), 7 + 3]
        assert set(tokens) == (
            {*joint} if isinstance(model, PyramidMMDiT) else {*joint, sum(joint)}
        )

    def test_it_says_what_it_weighs(self, model, column):
        _, prefix = extend(model, column(), keep=2)
        per_layer = 2 * 2 * (7 + 2 * 6) * 64 * 4  # keys and values of two samples, float32
        assert prefix.nbytes == len(model.blocks) * per_layer
        held = {part.untyped_storage().nbytes() for layer in prefix.layers for part in layer}
        assert held == {per_layer // 2}  # and holds no more alive

    def test_a_prefix_that_does_not_fit_is_refused(self, model, column):
        inputs = column()
        _, prefix = extend(model, inputs, keep=3)
        history = [torch.zeros(2, 4, 3, *MIDDLE), inputs.history[1]]
        with pytest.raises(ValueError, match=r"prefix holds frames of \(6, 6, 6\) tokens"):
            call(model, inputs._replace(history=history), prefix=prefix)
        with pytest.raises(ValueError, match="which history must start with"):
            call(model, inputs._replace(history=[inputs.history[0][:, :, :2]]), prefix=prefix)
        with pytest.raises(ValueError, match=r"prefix is of noisy units of \(4, 6\) patches"):
            call(model, inputs._replace(latents=torch.zeros(2, 4, 1, *HIGH)), prefix=prefix)
        with pytest.raises(ValueError, match="prefix must have the batch of latents, 1, got 2"):
            call(model, column(lengths=(4,)), prefix=prefix)

    @pytest.mark.parametrize("keep", [0, 5, 2])
    def test_frames_to_keep_that_are_not_there_are_refused(self, model, column, keep):
        prefix = extend(model, column(), keep=3)[1] if keep == 2 else None
        with pytest.raises(ValueError, match="keep must be"):
            extend(model, column(), keep=keep, prefix=prefix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bfloat16_and_float16(model, column, dtype):
    inputs = column()
    with torch.no_grad():
        exact = call(model, inputs)
        out = call(model.to(dtype), inputs)
    assert out.dtype == torch.float32
    assert (out - exact).norm() < 0.05 * exact.norm()


def test_autocast_trains_like_float32(model, column):
    columns, gradients = [column(), column([(1, HIGH)], (3,))], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = model.packed(columns)
        sum(out.square().mean() for out in outputs).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    exact, rounded = gradients
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("blocks", [1, 3, 99])
def test_recomputed_blocks_give_the_same_gradients(model, column, blocks):
    columns = [column(), column([(1, HIGH)], (3,))]
    gradients = []
    for count in (0, blocks):
        model.checkpoint_blocks = count
        model.zero_grad()
        sum(out.square().mean() for out in model.packed(columns)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_recomputed_blocks_keep_less(model, column):
    inputs = column()

    def kept(count):
        model.checkpoint_blocks, seen = count, {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call(model, inputs)
        return sum(seen.values())

    assert kept(3) < kept(1) < kept(0)


def test_no_modulation_is_spread_over_tokens_and_no_mask_is_made(model, column):
    """Nothing as large as (tokens, 6 D), or (tokens, tokens), is ever made."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    inputs = column([(5, (32, 32)), (1, (32, 32))], (1,), L=1)
    with Watch(), torch.no_grad():
        call(model, inputs)
    tokens = 6 * 16 * 16 + 1
    assert largest < tokens * 6 * 64 * 4
    assert largest < tokens * tokens


@pytest.fixture
def mesh():
    """One process that shards as many would."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_sharded_weights_train_packed_and_sample(model, column, mesh):
    columns = [column(), column([(1, HIGH)], (3,))]

    def train():
        sum(out.square().mean() for out in model.packed(columns)).backward()
        return {name: whole(p.grad).clone() for name, p in model.named_parameters()}

    plain = train()
    model.zero_grad()
    out, prefix = extend(model, columns[0], keep=2)
    shard(model, World(0, 1, torch.device("cpu"), mesh))
    for name, gradient in train().items():
        close(gradient, plain[name])
    close(extend(model, columns[0], keep=2)[0], out)
    close(call(model, columns[0], prefix=prefix), out)


@pytest.mark.parametrize("small", [replace(FLUX, joint_blocks=1, single_blocks=1), MMDIT_ONE])
def test_compiles_whole(small, column):
    model = redraw((PyramidMMDiT if small is MMDIT_ONE else PyramidFlux)(small))
    inputs = column([(1, LOW), (1, MIDDLE)], (7,))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = call(compiled, inputs)
    close(out, call(model, inputs))
    out.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    call(model, inputs).square().mean().backward()
    for name, p in model.named_parameters():
        close(gradients[name], p.grad)


def test_inputs_are_left_alone(model, column):
    inputs = column()
    before = [clip.clone() for clip in (*inputs.history, inputs.latents)]
    with torch.no_grad():
        call(model, inputs)
    assert all(map(torch.equal, before, (*inputs.history, inputs.latents)))


def test_inference_before_training_leaves_no_trace(model, column):
    """Positions are shared between calls."""
    inputs = column()
    with torch.inference_mode():
        call(model, inputs)
    call(model, inputs).square().mean().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"latents": torch.zeros(2, 3, 1, 8, 12)},
            ValueError,
            r"latents must be \(2, 4, T, H, W\)",
        ),
        ({"latents": torch.zeros(2, 4, 8, 12)}, ValueError, "latents must be"),
        ({"latents": [1]}, TypeError, "latents must be a tensor of floating-point"),
        ({"latents": torch.zeros(2, 4, 1, 7, 12)}, ValueError, "multiples of 2, got T=1, H=7"),
        ({"latents": torch.zeros(2, 4, 0, 8, 12)}, ValueError, "latents must have frames"),
        ({"latents": torch.zeros(0, 4, 1, 8, 12)}, ValueError, "at least one sample, got none"),
        ({"history": [torch.zeros(2, 3, 1, 4, 6)]}, ValueError, r"history\[0\] must be \(2, 4,"),
        ({"history": [torch.zeros(1, 4, 1, 4, 6)]}, ValueError, r"history\[0\] must be \(2, 4,"),
        ({"history": [torch.zeros(2, 4, 1, 4, 5)]}, ValueError, r"history\[0\] must have frames"),
        ({"timestep": torch.zeros(3)}, ValueError, r"timestep must be \(2,\), got \(3,\)"),
        ({"timestep": torch.tensor([1, 2])}, TypeError, "timestep must be floating-point numbers"),
        ({"text": torch.zeros(2, 10, 23)}, ValueError, r"text must be \(2, L, 24\), got \(2, 10,"),
        ({"pooled": torch.zeros(2, 21)}, ValueError, r"pooled must be \(2, 20\), got \(2, 21\)"),
        ({"text_lengths": torch.zeros(2)}, TypeError, "text_lengths must be integers"),
        ({"text_lengths": torch.tensor([0, 3])}, ValueError, "text_lengths must be 1 to 10"),
        ({"text_lengths": torch.tensor([11, 3])}, ValueError, "text_lengths must be 1 to 10"),
    ],
)
def test_bad_input_is_named(model, column, change, error, message):
    fields = column()._asdict() | change
    with pytest.raises(error, match=message.replace("(2, 4, T", "(B, 4, T")):
        call(model, Column(**fields))


def test_no_further_than_the_positions_reach(column):
    model = PyramidMMDiT(MMDIT)
    with pytest.raises(ValueError, match="history and latents must have 20 frames at most, got 21"):
        call(model, column([(20, LOW), (1, LOW)]))
    with pytest.raises(ValueError, match="16 x 16 patches at most, got 17 x 3"):
        call(model, column([(1, (34, 6))]))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (FLUX, {"single_blocks": 0}, "single_blocks must be 1 to 1024, got 0"),
        (FLUX, {"joint_blocks": 10**12}, "joint_blocks must be 1 to 1024"),
        (MMDIT, {"positions": 10**12}, "positions must be 1 to 65536"),
        (FLUX, {"time_width": 10}, "must add up to head_width = 32"),
        (FLUX, {"time_width": 7, "row_width": 13}, "must be even"),
        (MMDIT, {"head_width": 20}, "head_width must be a multiple of 8"),
    ],
)
def test_configs_that_make_no_sense(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


@pytest.mark.parametrize("change", [{"heads": 2.0}, {"channels": True}])
def test_values_of_another_type(change):
    with pytest.raises(TypeError, match="must be int"):
        replace(FLUX, **change)
    with pytest.raises(TypeError, match="interpolate_history must be bool"):
        replace(MMDIT, interpolate_history=1)
