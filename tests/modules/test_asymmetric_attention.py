"""Cross-attention on a context that is projected once per video."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree

from fastvid.modules.attention import AsymmetricCrossAttention, PlanningKV


def plain(module, x, context):
    """Frame by frame, or all keys for all, from the same weights."""
    if module.scope == "clip":
        flat = plain_rows(module, x.flatten(1, 2), context.flatten(1, 2))
        return flat.view(x.shape)
    frames = zip(x.unbind(1), context.unbind(1), strict=True)
    return torch.stack([plain_rows(module, *frame) for frame in frames], 1)


def plain_rows(module, x, context):
    k, v = F.linear(context, module.kv.weight, module.kv.bias).chunk(2, -1)
    q, k = module.q_norm(module.q(x)), module.k_norm(k)
    q, k, v = (part.unflatten(-1, (module.heads, -1)).transpose(1, 2) for part in (q, k, v))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return module.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("norm", [None, nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_is_attention_on_the_context(rand, scope, norm):
    module = AsymmetricCrossAttention(32, 2, 24, scope=scope, qk_norm=norm)
    x, context = rand(2, 3, 7, 32), rand(2, 3, 5, 24)
    wanted = plain(module, x, context)
    torch.testing.assert_close(
        module(x, module.project_context(context)), wanted, atol=1e-6, rtol=1e-5
    )


def test_context_is_projected_once_for_all_steps(rand):
    module, calls = AsymmetricCrossAttention(32, 2, 24, qk_norm=nn.LayerNorm), []
    module.kv.register_forward_hook(lambda *_: calls.append("kv"))
    module.k_norm.register_forward_hook(lambda *_: calls.append("norm"))
    planning = module.project_context(rand(1, 3, 5, 24))
    for _ in range(3):
        module(rand(2, 3, 7, 32), planning)  # two halves share one context
    assert calls == ["kv", "norm"]


def test_planning_is_a_pytree_and_trains_the_planner(rand):
    module = AsymmetricCrossAttention(32, 2, 24)
    context = rand(1, 3, 5, 24).requires_grad_()
    planning = module.project_context(context)
    x = rand(2, 3, 7, 32)
    module(x, planning).square().sum().backward()
    assert context.grad.abs().min() > 0
    detached = _pytree.tree_map(torch.Tensor.detach, planning)
    assert isinstance(detached, PlanningKV)
    assert not detached.k.requires_grad
    torch.testing.assert_close(module(x, detached), module(x, planning))


def test_projected_keys_are_views_of_one_product(rand):
    k, v = AsymmetricCrossAttention(32, 2, 24).project_context(rand(1, 3, 5, 24))
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_no_context_is_a_bias(monkeypatch, rand, scope):
    module, x = AsymmetricCrossAttention(32, 2, 24, scope=scope), rand(2, 3, 7, 32)
    token = rand(1, 1, 1, 24).requires_grad_()
    wanted = plain(module, x, token.expand(2, 3, 5, 24))
    monkeypatch.setattr("fastvid.modules.attention.asymmetric_attention", None)  # not called
    out = module(x, module.project_context(token))
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-5)
    assert out.stride()[:3] == (0, 0, 0)  # nor stored more than once
    found = torch.autograd.grad(out.square().sum(), (token, module.kv.weight))
    for a, b in zip(
        found, torch.autograd.grad(wanted.square().sum(), (token, module.kv.weight)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_one_key_in_each_frame_of_a_clip_is_attention(rand):
    module = AsymmetricCrossAttention(32, 2, 24, scope="clip")
    x, context = rand(2, 3, 7, 32), rand(2, 3, 1, 24)
    wanted = plain(module, x, context)
    torch.testing.assert_close(
        module(x, module.project_context(context)), wanted, atol=1e-6, rtol=1e-5
    )


def test_known_frames_leave_the_others_alone(rand):
    module = AsymmetricCrossAttention(32, 2, 24)
    x, planning = rand(2, 3, 7, 32), module.project_context(rand(2, 3, 5, 24))
    known = torch.tensor([[True, False, False]])
    out = module(x, planning, known)
    torch.testing.assert_close(out[:, 1:], module(x, planning)[:, 1:])
    assert torch.equal(out[:, 0], module.proj.bias.expand_as(out[:, 0]))


@pytest.mark.parametrize("norm", [None, nn.LayerNorm])
def test_autocast(rand, norm):
    module = AsymmetricCrossAttention(32, 2, 24, qk_norm=norm)
    x, context = rand(2, 3, 7, 32), rand(2, 3, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, module.project_context(context))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain(module, x, context), atol=2e-2, rtol=2e-2)


def test_compiles_without_breaks(rand):
    module = AsymmetricCrossAttention(32, 2, 24, qk_norm=nn.RMSNorm)
    x, context = rand(2, 3, 7, 32), rand(2, 3, 5, 24)
    step = torch.compile(
        lambda x, context: module(x, module.project_context(context)),
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    torch.testing.assert_close(step(x, context), plain(module, x, context), atol=1e-6, rtol=1e-5)
