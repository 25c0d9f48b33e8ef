"""VDT does what PyTorch expects of a module: hooks, adapters, meta, compilation, export, FSDP2."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.models.tiny import close

LAYERS = ["temporal.qkv", "temporal.proj", "temporal.fc", "spatial.qkv", "spatial.proj"]
LAYERS = [f"blocks.1.{name}" for name in [*LAYERS, "mlp.fc1", "mlp.fc2", "temporal_norm"]]
LAYERS += ["final"]


class Adapted(nn.Module):
    """A layer and a low-rank change of it, without the attributes of the layer."""

    def __init__(self, base):
        super().__init__()
        out, width = base.weight.shape
        self.base, self.down, self.up = base, nn.Linear(width, 2), nn.Linear(2, out)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    def merged(self):
        layer = nn.Linear(*self.base.weight.T.shape)
        layer.weight.data = (self.base.weight + self.up.weight @ self.down.weight).detach()
        layer.bias.data = (self.base.bias + self.up(self.down.bias)).detach()
        return layer


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", [name for name in LAYERS if "norm" not in name])
def test_adapters_take_part(model, clip, name, recorded):
    plain = model(*clip).detach()
    adapted = Adapted(model.get_submodule(name))
    model.set_submodule(name, adapted)
    with torch.set_grad_enabled(recorded):
        out = model(*clip)
    if recorded:
        out.sum().backward()
        assert adapted.up.weight.grad.any()
        assert adapted.base.weight.grad.any()
    model.set_submodule(name, adapted.merged())
    close(out, model(*clip))
    assert not torch.allclose(out, plain)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_hooks_are_called(model, clip, name, recorded):
    layer, calls = model.get_submodule(name), []
    handles = [layer.register_forward_pre_hook(lambda *_: calls.append("before"))]
    handles += [layer.register_forward_hook(lambda *_: calls.append("after"))]
    with torch.set_grad_enabled(recorded):
        out = model(*clip)
        assert {"before", "after"} == set(calls)
        for handle in handles:
            handle.remove()
        close(out, model(*clip))


def test_a_hook_may_change_the_result(model, clip):
    plain = model(*clip)
    model.final.register_forward_hook(lambda layer, x, y: y + 1)
    close(model(*clip), plain + 1)


def test_what_block_hooks_see_stays_as_it_was(model, clip):
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, x: seen.append((x[0], x[0].clone())))
        block.register_forward_hook(lambda block, x, y: seen.append((y, y.clone())))
    with torch.no_grad():
        model(*clip)
    assert len(seen) == 4
    for tensor, then in seen:
        assert torch.equal(tensor, then)


def test_a_block_takes_expanded_tokens(model, rand):
    x, modulation = rand(1, 1, 24, 32).expand(2, 6, -1, -1), rand(2, 6, 32)
    expected = model.blocks[0](x, modulation)
    with torch.no_grad():
        close(model.blocks[0](x, modulation), expected)


@pytest.mark.parametrize("recorded", [True, False])
def test_meta(model, clip, recorded):
    latents, timestep = (value.to("meta") for value in clip)
    with torch.set_grad_enabled(recorded):
        out = model.to("meta")(latents, timestep)
    assert out.shape == (2, 8, 6, 8, 12)
    assert out.device.type == "meta"


@pytest.mark.parametrize("recorded", [True, False])
def test_an_empty_batch(model, rand, recorded):
    with torch.set_grad_enabled(recorded):
        out = model(rand(0, 4, 6, 8, 12), torch.tensor([3]))
    assert out.shape == (0, 8, 6, 8, 12)


def test_onednn_can_be_switched_off(model, clip):
    with torch.no_grad():
        expected = model(*clip)
        with torch.backends.mkldnn.flags(enabled=False), torch.profiler.profile() as profile:
            out = model(*clip)
    close(out, expected)
    assert not [event for event in profile.key_averages() if "mkldnn" in event.key]


@pytest.mark.parametrize("recorded", [True, False])
def test_one_dynamic_graph_serves_all_sizes(model, rand, recorded):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.set_grad_enabled(recorded):
        for batch, T, H, W in [(2, 6, 8, 12), (3, 2, 4, 4), (2, 5, 8, 8), (4, 6, 6, 12)]:
            latents, timestep = rand(batch, 4, T, H, W), torch.arange(batch)
            close(compiled(latents, timestep), model(latents, timestep))
    assert counter.frame_count == 1


def test_compiles_for_inference(model, clip):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(*clip), model(*clip))


@pytest.mark.parametrize("folded", [False, True])
def test_exports(model, clip, folded):
    expected = model(*clip)
    model = model.fold() if folded else model
    with torch.no_grad():
        program = torch.export.export(model, clip)
        close(program.module()(*clip), expected)


def test_pure_bfloat16_trains_like_float32(model, clip):
    latents, timestep = clip

    def gradients():
        model.zero_grad()
        model(latents, timestep).square().mean().backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters()])

    exact = gradients()
    model.bfloat16()
    rounded = gradients()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.fixture
def alone_in_the_world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_per_block_with_recomputation_in_bfloat16(model, clip, alone_in_the_world):
    model(*clip).square().mean().backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.checkpoint_blocks = 2
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=alone_in_the_world, mp_policy=policy)
    fully_shard(model, mesh=alone_in_the_world, mp_policy=policy)
    model(*clip).float().square().mean().backward()
    error, size = 0.0, 0.0
    for name, p in model.named_parameters():
        gradient = p.grad.full_tensor()
        assert gradient.dtype == torch.float32
        error += (gradient - exact[name]).square().sum().item()
        size += exact[name].square().sum().item()
    assert error < 0.05**2 * size
