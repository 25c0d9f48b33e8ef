"""Attention over one axis equals the same on moved tokens; over frames, that of the frames."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fastvid
from fastvid.functional import FrameLayout, Visibility
from fastvid.modules.attention import (
    AsymmetricCrossAttention,
    MaskedSelfAttention,
    SpatialAttention,
    TemporalAttention,
)


def plain(module, x, visible=None, turn=lambda q: q):
    """(sequences, length, D), qkv packed; `visible` (sequences, 1, length, length)."""
    S, L, D = x.shape
    qkv = F.linear(x, module.qkv.weight, module.qkv.bias)
    q, k, v = qkv.view(S, L, 3, module.heads, D // module.heads).permute(2, 0, 3, 1, 4)
    scores = turn(q) @ turn(k).transpose(-1, -2) / (D // module.heads) ** 0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1)
    return F.linear(
        (weights @ v).transpose(1, 2).reshape(S, L, D), module.proj.weight, module.proj.bias
    )


def test_spatial(rand):
    module, x = SpatialAttention(32, 4), rand(2, 3, 7, 32)
    expected = plain(module, x.flatten(0, 1)).view(x.shape)
    torch.testing.assert_close(module(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("folded", [False, True])
def test_temporal(rand, frames, folded):
    module, x = TemporalAttention(32, 4), rand(2, frames, 7, 32)  # fewer and more tokens than D
    torch.nn.init.normal_(module.proj.bias)
    torch.nn.init.normal_(module.fc.bias)
    moved = plain(module, x.transpose(1, 2).flatten(0, 1))
    expected = F.linear(moved, module.fc.weight, module.fc.bias)
    expected = expected.view(2, 7, frames, 32).transpose(1, 2)
    if folded:
        module.fold()
        assert module.fc is None
    torch.testing.assert_close(module(x), expected, atol=2e-6, rtol=1e-5)


def test_temporal_by_rules(rand, device):
    """Known frames, a window, and turns along the frames, alone and together."""
    B, T, N = 2, 5, 3
    module, x = TemporalAttention(32, 4), rand(B, T, N, 32)
    module.fold()
    known = torch.tensor([[True, False, False, True, False], [False] * 5], device=device)
    frame = torch.arange(T, device=device)
    after = frame[None, :] - frame[:, None]
    near, self_only = (after >= -2) & (after <= 1), after == 0
    angles = frame[:, None] * 0.5 ** torch.arange(4, device=device)
    cos, sin = angles.cos(), angles.sin()

    def turn(q):  # (..., T, E)
        a, b = q[..., ::2], q[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def check(visible, turned, **rule):
        moved, visible = x.transpose(1, 2).flatten(0, 1), visible.expand(B, T, T)
        per_token = visible[:, None].repeat_interleave(N, 0)
        wanted = plain(module, moved, per_token, turn if turned else lambda q: q)
        wanted = wanted.view(B, N, T, 32).transpose(1, 2)
        torch.testing.assert_close(module(x, **rule), wanted, atol=1e-6, rtol=1e-5)

    of_known = ~known[:, :, None] | self_only
    every = torch.ones_like(near)
    check(of_known, False, known=known)
    check(near, False, window=(2, 1))
    check(every, True, rotary=(cos, sin))
    together = {"known": known, "window": (2, 1), "rotary": (cos, sin)}
    check(of_known & near, True, **together)


def test_temporal_keeps_official_key_names():
    layers = "fc", "proj", "qkv"
    names = [f"{layer}.{part}" for layer in layers for part in ("bias", "weight")]
    assert sorted(TemporalAttention(32, 4).state_dict()) == names


def test_no_layout_copies(rand):
    module, x = TemporalAttention(32, 4), rand(2, 5, 7, 32)
    module.fold()
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(x)
    assert not {event.key for event in profile.key_averages()} & {"aten::copy_", "aten::clone"}


def test_masked(rand):
    module, x = MaskedSelfAttention(32, 2), rand(2, 21, 32)
    full = Visibility.full(FrameLayout([7] * 3))
    torch.testing.assert_close(module(x, full), plain(module, x), atol=1e-6, rtol=1e-5)
    alone = Visibility.window(FrameLayout([7] * 3), 0, 0)
    frames = plain(module, x.reshape(6, 7, 32)).view(x.shape)
    torch.testing.assert_close(module(x, alone), frames, atol=1e-6, rtol=1e-5)
    assert sorted(module.state_dict()) == ["proj.bias", "proj.weight", "qkv.bias", "qkv.weight"]


@pytest.mark.parametrize("heads", [3, 0])
@pytest.mark.parametrize(
    "make",
    [
        MaskedSelfAttention,
        SpatialAttention,
        TemporalAttention,
        functools.partial(AsymmetricCrossAttention, context_dim=24),
    ],
)
def test_heads_divide_the_width(make, heads):
    with pytest.raises(ValueError, match=f"multiple of heads, got dim=32 and heads={heads}"):
        make(32, heads)


@pytest.fixture
def alone_in_the_world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


FRAMES = Visibility.identity(FrameLayout([7] * 3), [True, False, False])


@pytest.mark.parametrize(
    ("make", "shape", "more"),
    [(MaskedSelfAttention, (2, 21, 32), (FRAMES,)), (TemporalAttention, (2, 3, 7, 32), ())],
)
def test_under_fsdp(alone_in_the_world, make, shape, more):
    torch.manual_seed(0)
    module, x = make(32, 2), torch.randn(shape)
    wanted = module(x, *more)
    (grad,) = torch.autograd.grad(wanted.sum(), module.qkv.weight)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    fully_shard(module, mesh=alone_in_the_world, mp_policy=policy)
    out = module(x, *more)
    out.sum().backward()
    assert (out - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert (module.qkv.weight.grad.full_tensor() - grad).abs().max() < 0.02 * grad.abs().max()


# Each process holds half of the weights and takes one sample, with a visibility of its own.
WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from fastvid.functional import FrameLayout, Visibility
from fastvid.modules.attention import MaskedSelfAttention

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
module, x, dout = MaskedSelfAttention(32, 2), *torch.randn(2, 2, 21, 32)
known = torch.tensor([[True, False, False], [False, True, True]])
visible = [Visibility.identity(FrameLayout([7] * 3), each) for each in (known, known[rank])]
whole = module(x, visible[0])
names, weights = zip(*module.named_parameters())
wanted = dict(zip(names, torch.autograd.grad(whole, weights, dout)))
fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
mine = slice(rank, rank + 1)
for _ in range(2):  # gathered and freed once more
    module.zero_grad()
    out = module(x[mine], visible[1])
    out.backward(dout[mine])
    torch.testing.assert_close(out, whole[mine])
for name, weight in module.named_parameters():
    assert weight.to_local().numel() < weight.numel(), name
    torch.testing.assert_close(2 * weight.grad.full_tensor(), wanted[name])  # the mean of both
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_masked_in_two_processes(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    paths = os.pathsep.join([str(Path(fastvid.__file__).parents[1]), *filter(None, sys.path)])
    environment = os.environ | {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
