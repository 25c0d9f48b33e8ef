"""Two conditionings, one computation: given frames mixed in, or put before the noisy ones."""

import pytest
import torch

from fastvid.diffusion.losses import diffusion_loss
from fastvid.diffusion.sampling import sample_ddim, seeded
from fastvid.diffusion.schedule import linear, respace
from fastvid.diffusion.tasks import task_known
from fastvid.models.vdt import VDT, VDTConfig

T, GIVEN = 5, 2
SHAPE = (2, 4, T, 4, 4)
CHAIN = linear()


@pytest.fixture(params=[False, True], ids=["fixed variance", "learned variance"])
def model(request):
    """A VDT without zero weights."""
    config = VDTConfig(
        height=4,
        width=4,
        frames=T,
        dim=16,
        depth=2,
        heads=2,
        class_dropout=0.0,
        learned_variance=request.param,
    )
    torch.manual_seed(0)
    model = VDT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def inputs():
    clean, noise = (torch.randn(SHAPE, generator=g) for g in seeded([1, 2]))
    return clean, noise, task_known("predict", T, 4, 4, given=GIVEN)


def test_training_on_prediction_trains_frame_concatenation(model, inputs):
    clean, noise, known = inputs
    index = torch.tensor([3, 700])

    def gradients(*args, **kwargs):
        model.zero_grad()
        loss = diffusion_loss(model, *args, CHAIN, **kwargs)["loss"]
        loss.mean().backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    mixed = gradients(clean, index, noise, known=known)
    given, rest = clean[:, :, :GIVEN], clean[:, :, GIVEN:]
    condition = {"condition_frames": given}
    before = gradients(rest, index, noise[:, :, GIVEN:], condition=condition)
    torch.testing.assert_close(mixed, before)


@torch.no_grad()
def test_prediction_samples_as_frame_concatenation_does(model, inputs):
    clean, noise, known = inputs
    model.eval()
    mixed = sample_ddim(model, noise, respace(CHAIN, 4), known=known, clean=clean)
    condition = {"condition_frames": clean[:, :, :GIVEN]}
    rest = sample_ddim(model, noise[:, :, GIVEN:], respace(CHAIN, 4), condition=condition)
    torch.testing.assert_close(mixed[:, :, GIVEN:], rest, rtol=1e-4, atol=1e-4)
