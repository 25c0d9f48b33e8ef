"""The CPU paths of `noising` and `masked_mse`: passes of PyTorch, and the compiled kernels."""

import torch
from torch import Tensor

from .._shared import native, philox
from .._shared.planes import known_cells, like, planes
from . import reference


def noising(x0, alpha, sigma, noise, seeds, stream, known, known_alpha, known_sigma, target):
    """Noisy latents and target ("none": empty), in the dtype of x0."""
    wide = accumulator(x0)
    data = x0.to(wide)
    if noise is None:
        noise = draw(seeds, x0.shape, stream)
    noise = noise.to(wide)
    alpha, sigma = reference.levels(alpha, sigma, known, known_alpha, known_sigma, data)
    noisy = torch.mul(noise, sigma).addcmul_(data, alpha).to(x0.dtype)
    if known is not None and known_alpha is None:  # 1 * -0.0 + 0 * eps would be 0.0
        noisy = torch.where(known_cells(known), x0, noisy)
    if target == "none":
        return noisy.contiguous(), x0.new_empty(0)
    if target == "v":
        made = torch.mul(noise, alpha).addcmul_(data, sigma, value=-1)
    else:
        made = noise - data if target == "flow" else noise
    return noisy.contiguous(), made.to(x0.dtype).contiguous()


def draw(seeds: Tensor, shape: torch.Size, stream: int) -> Tensor:
    """Noise of whole samples, float32."""
    count = shape[1:].numel()
    if not native.loaded():
        return philox.normal(seeds, count, stream).view(shape)
    noise = torch.empty(shape, dtype=torch.float32)
    if count:
        torch.ops.fastvid_cpp.normal(seeds.contiguous(), stream, noise.view(shape[0], count))
    return noise


def mse(pred, target, known, average):
    """Loss (B,) and one over each sample's divisor."""
    wide = accumulator(pred, target)
    difference = pred.to(wide) - target.to(wide)
    if known is not None:
        difference.masked_fill_(known_cells(known), 0)
    _, divisor = reference.unknown_share(known, difference, average)
    divisor = divisor.expand(pred.shape[0])
    # 0 / 0: NaN where nothing is unknown.
    return difference.square_().flatten(1).sum(1) / divisor, divisor.reciprocal()


def mse_backward(dloss, pred, target, known, weight):
    """The gradient of pred."""
    wide = weight.dtype
    slope = (2 * dloss * weight).reshape(-1, 1, 1, 1, 1)
    dpred = (pred.to(wide) - target.to(wide)).mul_(slope)
    if known is not None:
        dpred.masked_fill_(known_cells(known), 0)
    return dpred.to(pred.dtype).contiguous()


def accumulator(*tensors: Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 where a tensor is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def compiled_serves(*tensors: Tensor | None) -> bool:
    """Whether the C++ kernels know the dtypes."""
    return all(t is None or t.dtype in (torch.float32, torch.bfloat16) for t in tensors)


def compiled_noising(
    x0, alpha, sigma, noise, seeds, stream, known, known_alpha, known_sigma, target
):
    """The C++ kernel."""
    noisy = like(x0)
    made = x0.new_empty(0) if target == "none" else like(x0)
    levels = [None if t is None else t.float() for t in (alpha, sigma, known_alpha, known_sigma)]
    if noisy.numel():
        torch.ops.fastvid_cpp.noising(
            planes(x0), *levels[:2], _planes(noise), seeds, stream, _cells(known), *levels[2:],
            target, noisy, made,
        )  # fmt: skip
    return noisy, made


def compiled_mse(pred, target, known, average):
    """The C++ kernel."""
    loss, weight = (pred.new_empty(pred.shape[0], dtype=torch.float32) for _ in range(2))
    if not pred.numel():
        return mse(pred, target, known, average)
    torch.ops.fastvid_cpp.masked_mse(
        planes(pred), planes(target), _cells(known), average == "all", loss, weight
    )
    return loss, weight


def compiled_mse_backward(dloss, pred, target, known, weight):
    """The C++ kernel."""
    dpred = like(pred)
    if dpred.numel():
        torch.ops.fastvid_cpp.masked_mse_backward(
            dloss.contiguous(), planes(pred), planes(target), _cells(known), weight, dpred
        )
    return dpred


def _planes(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else planes(tensor)


def _cells(known: Tensor | None) -> Tensor | None:
    return known if known is None or known.dim() == 2 else planes(known)
