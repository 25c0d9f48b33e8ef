"""The linear layers that keep their input's inputs: same values, same gradients, less kept."""

import pytest
import torch
import torch.nn.functional as F

from fastvid.modules.linear import Deferred, apply_linear, linear, linear_gelu, linear_parts
from fastvid.modules.mlp import MLP


def squared(x, scale):
    return x.square() * scale


@pytest.fixture
def tensors(rand):
    draw = lambda *shape: rand(*shape, dtype=torch.float64).requires_grad_()  # noqa: E731
    return draw(2, 5, 6), draw(6), draw(12, 6), draw(12)


@pytest.mark.parametrize("parts", [1, 3])
def test_gradients(tensors, parts):
    def call(x, scale, weight, bias):
        return linear_parts(Deferred(squared, (x, scale)), weight, bias, parts)

    assert torch.autograd.gradcheck(call, tensors)
    plain = F.linear(squared(*tensors[:2]), *tensors[2:]).chunk(parts, -1)
    for got, expected in zip(call(*tensors), plain, strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, expected)


def test_float32_rounds_no_worse_than_pytorch(rand):
    tensors, cotangent = (rand(64, 384), rand(96, 384) / 20, rand(96)), rand(64, 96)

    def results(call, dtype):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
        y = call(*leaves)
        y.backward(cotangent.to(dtype))
        return y.detach(), *(leaf.grad for leaf in leaves)

    exact = results(F.linear, torch.float64)
    eager = results(F.linear, torch.float32)
    for got, plain, reference in zip(results(linear, torch.float32), eager, exact, strict=True):
        floor = torch.finfo(torch.float32).eps * reference.abs().max()
        assert (got - reference).abs().max() <= 2 * (plain - reference).abs().max() + floor


def test_a_single_row(rand):
    x, weight, bias = (rand(*shape).requires_grad_() for shape in ((6,), (3, 6), (3,)))
    y = linear(x, weight, bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    gradients = torch.autograd.grad(y, (x, weight, bias), torch.arange(3.0))
    plain = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), torch.arange(3.0))
    for got, expected in zip(gradients, plain, strict=True):
        torch.testing.assert_close(got, expected)


def test_frozen_parts_get_no_gradient(tensors):
    x, scale, weight, bias = tensors
    linear(Deferred(squared, (x.detach(), scale)), weight.detach(), bias).sum().backward()
    assert x.grad is None
    assert weight.grad is None
    assert scale.grad is not None
    assert bias.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gelu_is_the_same_with_and_without_a_gradient(rand, dtype):
    mlp = MLP(32, 128).to(dtype)
    x = rand(2, 7, 32, dtype=dtype)
    recorded = mlp(x)
    with torch.no_grad():
        fused = mlp(x)
    assert isinstance(linear_gelu(x, mlp.fc1.weight, mlp.fc1.bias), Deferred)
    torch.testing.assert_close(fused, recorded, atol=4 * torch.finfo(dtype).eps, rtol=1e-2)


def test_only_the_pre_activation_is_kept(rand):
    mlp, kept = MLP(32, 128), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(rand(50, 32))
    weights = {p.untyped_storage().data_ptr() for p in mlp.parameters()}
    assert sum(n for at, n in kept.items() if at not in weights) == 50 * (32 + 128)


def test_the_example_of_the_module(rand):
    layer, tokens, scale = torch.nn.Linear(6, 3), rand(2, 6).requires_grad_(), rand(6)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = apply_linear(layer, Deferred(torch.mul, (tokens, scale)))
    torch.testing.assert_close(y, layer(tokens * scale))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (tokens, scale, layer.weight)}
