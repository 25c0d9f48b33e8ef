"""Linear layers that keep little for the backward, and run on oneDNN on a CPU.

Norms, modulations and GELU cost little beside the linear layer behind them. Given as `Deferred`,
its input is made a second time in the backward from what the graph holds anyway, instead of being
kept:

    x = Deferred(torch.mul, (tokens, scale))  # nothing is computed yet
    y = apply_linear(layer, x)  # layer(tokens * scale), whose product is not kept
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

M = TypeVar("M", nn.Linear, nn.LayerNorm)


class Deferred(NamedTuple):
    """`make(*inputs)`, to be made when needed and not kept. `make` must draw nothing at random."""

    make: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def materialise(x: Tensor | Deferred) -> Tensor:
    """`x` as a tensor."""
    return x.make(*x.inputs) if isinstance(x, Deferred) else x


def is_plain(module: nn.Module | None, kind: type[M]) -> TypeGuard[M]:
    """Whether `module` is a `kind` and calling it does no more than its own forward.

    Only then may its weights be read past it. Adapters, quantised layers, parametrisations,
    hooks and sharded weights are called instead.
    """
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    own = (type(module.weight), type(module.bias)) == (nn.Parameter, nn.Parameter)
    return own and not hooked


def apply_linear(layer: nn.Module, x: Tensor | Deferred) -> Tensor:
    """`layer(x)`, by `linear` where `layer` is a plain `nn.Linear`."""
    if is_plain(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias)
    return layer(materialise(x))


def apply_linear_parts(layer: nn.Module, x: Tensor | Deferred, parts: int) -> tuple[Tensor, ...]:
    """`layer(x).chunk(parts, -1)` as tensors of their own, by `linear_parts` where it is plain."""
    if is_plain(layer, nn.Linear):
        return linear_parts(x, layer.weight, layer.bias, parts)
    return tuple(part.contiguous() for part in layer(materialise(x)).chunk(parts, -1))


def apply_linear_gelu(layer: nn.Module, x: Tensor | Deferred) -> Tensor | Deferred:
    """`gelu(layer(x))`, by `linear_gelu` where `layer` is plain."""
    if is_plain(layer, nn.Linear):
        return linear_gelu(x, layer.weight, layer.bias)
    return Deferred(gelu, (layer(materialise(x)),))


def linear(x: Tensor | Deferred, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear(x, weight, bias)`."""
    if not isinstance(x, Deferred) and not _onednn_serves(x, (torch.float32,)):
        return F.linear(x, weight, bias)
    return linear_parts(x, weight, bias, 1)[0]


def linear_parts(
    x: Tensor | Deferred, weight: Tensor, bias: Tensor, parts: int
) -> tuple[Tensor, ...]:
    """`F.linear(x, weight, bias).chunk(parts, -1)` as tensors of their own.

    Args:
        x: (..., D).
        weight, bias: (parts * E, D) and (parts * E,).
    Returns:
        `parts` contiguous tensors (..., E).
    """
    if _autocast(weight):
        dtype = torch.get_autocast_dtype(weight.device.type)
        weight, bias = weight.to(dtype), bias.to(dtype)
    make, inputs = x if isinstance(x, Deferred) else (None, (x,))
    # A compiler chooses by itself what to keep.
    if torch.compiler.is_compiling():
        return _products(_made(make, inputs, weight), weight, bias, parts)
    return _Linear.apply(make, parts, weight, bias, *inputs)


def linear_gelu(x: Tensor | Deferred, weight: Tensor, bias: Tensor) -> Tensor | Deferred:
    """`F.gelu(F.linear(x, weight, bias), approximate="tanh")`.

    Where a backward is recorded only the linear layer is kept, and GELU is left to the next one.
    """
    fused = _onednn_serves(weight, (torch.float32, torch.bfloat16)) and not _autocast(weight)
    if fused and not torch.is_grad_enabled():
        made = _made(x.make, x.inputs, weight) if isinstance(x, Deferred) else x
        return _onednn(made, weight, bias, "gelu", [], "tanh")
    return Deferred(gelu, (linear(x, weight, bias),))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, make: Callable | None, parts: int, weight: Tensor, bias: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.make = make
        ctx.save_for_backward(weight, *inputs)
        return _products(_made(make, inputs, weight), weight, bias, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        _, _, weight_needed, bias_needed, *inputs_needed = ctx.needs_input_grad
        recorded = any(inputs_needed) and ctx.make is not None
        if recorded:
            pairs = zip(inputs, inputs_needed, strict=True)
            inputs = [tensor.detach().requires_grad_(needed) for tensor, needed in pairs]
        with torch.set_grad_enabled(recorded):
            x = _made(ctx.make, inputs, weight)
        dy = grads[0] if len(grads) == 1 else torch.cat(grads, -1)
        dy = dy.reshape(-1, dy.shape[-1])
        dweight = dy.T @ x.detach().reshape(-1, x.shape[-1]) if weight_needed else None
        dbias = dy.sum(0) if bias_needed else None
        if not any(inputs_needed):
            return None, None, dweight, dbias, *([None] * len(inputs))
        dx = _product(dy, weight.T).view(x.shape)
        if ctx.make is None:
            return None, None, dweight, dbias, dx
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(x, wanted, dx))
        dinputs = [next(found) if needed else None for needed in inputs_needed]
        return None, None, dweight, dbias, *dinputs


def _made(make: Callable | None, inputs: Sequence[Tensor], weight: Tensor) -> Tensor:
    return (inputs[0] if make is None else make(*inputs)).to(weight.dtype)


def _products(x: Tensor, weight: Tensor, bias: Tensor, parts: int) -> tuple[Tensor, ...]:
    pairs = zip(weight.chunk(parts), bias.chunk(parts), strict=True)
    return tuple(_product(x, part, part_bias) for part, part_bias in pairs)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`; in float32 on a CPU by oneDNN, measured at 1.1 x the rate of MKL."""
    if _onednn_serves(x, (torch.float32,)):
        return _onednn(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _onednn(*arguments: Any) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(*arguments)  # absent from builds without oneDNN


def _onednn_serves(tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether the call outside any compiled graph is the better one."""
    eager_cpu = tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    onednn = torch.backends.mkldnn
    serves = eager_cpu and tensor.dtype in dtypes and onednn.is_available()
    return serves and bool(onednn.enabled)


def _autocast(tensor: Tensor) -> bool:
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
