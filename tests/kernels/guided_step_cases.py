"""What the tests of `guided_step` share: draws, and what users write."""

import torch

import fastvid.functional  # noqa: F401  registers the ops
from fastvid.diffusion import schedule
from fastvid.diffusion.tables import ddim_table, ddpm_table, euler_table
from fastvid.kernels._shared.planes import known_cells
from fastvid.kernels.guided_step import reference

STEP = torch.ops.fastvid.guided_step.default
CHAIN = schedule.respace(schedule.linear(), 8)
TABLES = {
    "ddim": ddim_table(CHAIN, prediction="v"),
    "noisy ddim": ddim_table(CHAIN, eta=1.0, prediction="x0"),
    "ddpm": ddpm_table(CHAIN),
    "euler": euler_table([1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]),
}
SCALES = {"one branch": [], "two branches": [7.5], "three branches": [1.5, 7.0]}


def draw_known(kind, B, T, H, W, device="cpu"):
    """`kind` is nothing, frames or cells; "for all" where one row serves the batch."""
    if kind == "nothing":
        return None
    shape = (1 if kind.endswith("for all") else B, T) + ((H, W) if "cells" in kind else ())
    known = torch.rand(shape, generator=torch.Generator().manual_seed(T)) < 0.5
    known.view(-1)[0], known.view(-1)[-1] = True, False
    return known.to(device)


def eager(x, prediction, row, scales, clip=None, known=None, clean=None, noise=None):
    """What users write today, in the dtypes of their tensors."""
    a, b, of_x0, of_x, of_noise = row.tolist()
    branches = prediction.chunk(len(scales) + 1)
    guided = branches[0]
    for scale, before, after in zip(scales, branches, branches[1:], strict=False):
        guided = guided + scale * (after - before)
    if clip is None:
        following = (of_x + of_x0 * a) * x + (of_x0 * b) * guided
    else:
        following = of_x0 * (a * x + b * guided).clamp(-clip, clip) + of_x * x
    if noise is not None:
        following = following + of_noise * noise
    following = following.to(x.dtype)
    return following if known is None else torch.where(known_cells(known), clean, following)


def exactly(x, prediction, row, scales, clip=None, known=None, clean=None, noise=None):
    """The reference in float64."""
    wide = (None if t is None else t.double() for t in (clean, noise))
    clean, noise = wide
    x, prediction = x.double(), prediction.double()
    return reference.guided_step(x, prediction, row.double(), scales, clip, known, clean, noise)


def check(within_budget, step, x, prediction, table, row, scales, clip, known, clean, noise):
    """Hold a step with noise given to float64. `step` has the schema of the op."""
    at = torch.tensor([row], device=x.device)
    found = step(x, prediction, table, at, scales, clip, known, clean, noise, None, 0)
    rest = table[row], scales, clip, known, clean, noise
    assert found.is_contiguous()
    within_budget(found, eager(x, prediction, *rest), exactly(x, prediction, *rest))
    if known is not None:
        cells = known_cells(known).expand(x.shape)
        assert torch.equal(found[cells], clean[cells])
