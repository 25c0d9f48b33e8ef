"""Sampling: given frames stay, seeds decide, long clips are made window by window."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastvid.diffusion.schedule import linear, rescale_zero_terminal_snr, squared_cosine
from fastvid.diffusion.tasks import TASKS
from fastvid.models.vdt import VDT, VDTConfig
from fastvid.training.codec import PixelCodec
from fastvid.training.sample import laid_out, sample_task, window_starts, with_frames

SCHEDULE = squared_cosine(20)
CODEC = PixelCodec(4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = VDT(
        VDTConfig(
            channels=48,
            height=4,
            width=4,
            frames=5,
            dim=16,
            depth=1,
            heads=2,
            class_dropout=0.0,
            learned_variance=False,
        )
    )
    for weight in (model.final.weight, model.modulation.weight):
        nn.init.normal_(weight, std=0.1)
    return model.eval()


@pytest.fixture
def video(rand):
    return rand(2, 3, 5, 16, 16).clamp(-1, 1)


def sample(model, video, task, **options):
    options = {"seeds": [0, 1], "steps": 4, "prediction": "x0", "clip": 1.0} | options
    return sample_task(model, CODEC, SCHEDULE, video, task=task, **options)


class Ramp(nn.Module):
    """Continues the brightness of the outermost given frame by 0.05 per frame of distance."""

    def __init__(self, frames, *, backward=False):
        super().__init__()
        self.config = SimpleNamespace(frames=frames, height=2, width=2)
        self.weight = nn.Parameter(torch.zeros(()))
        self.backward = backward
        self.calls = []

    def forward(self, latents, timestep, *, known):
        T = latents.shape[2]
        places = known[0].nonzero().flatten()
        at = int(places.min() if self.backward else places.max())
        self.calls.append((T, known[0].tolist()))
        distance = (torch.arange(T) - at).abs() * 0.05
        return latents[:, :, at : at + 1] + distance[None, None, :, None, None]


@pytest.mark.parametrize("task", TASKS)
def test_given_cells_are_exact_and_the_rest_is_made(model, video, task):
    made, known = sample(model, video, task, seeds=[7, 8])
    assert made.shape == video.shape
    if task in ("slow-motion", "loop"):  # what the input begins with stands elsewhere
        video = laid_out("loop" if task == "loop" else "", video[:, :, : known[0].sum()], known)
    cells = known if known.ndim == 4 else known[:, :, None, None].expand(-1, -1, 4, 4)
    kept = cells.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, None].expand_as(video)
    assert torch.equal(made[kept], video[kept])
    assert not torch.isclose(made[~kept], video[~kept]).all()
    assert made.abs().max() <= 1


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_clip_depends_on_its_seed_alone(model, video, eta):
    together = sample(model, video, "complete", seeds=[3, 4], eta=eta)
    for i, seed in enumerate([3, 4]):
        alone = sample(model, video[i : i + 1], "complete", seeds=[seed], eta=eta)
        assert torch.equal(alone.known[0], together.known[i])
        assert torch.allclose(alone.video[0], together.video[i], atol=1e-5)
    same_input = video[:1].expand(2, -1, -1, -1, -1)
    a, b = sample(model, same_input, "predict", given=2, seeds=[3, 4], eta=eta).video
    assert not torch.allclose(a, b, atol=1e-2)


def test_zero_terminal_snr_starts_from_pure_noise(model, video):
    chain = rescale_zero_terminal_snr(linear(1000))
    options = {"given": 2, "seeds": [0, 1], "prediction": "x0", "steps": 4}
    made, _ = sample_task(model, CODEC, chain, video, task="predict", **options)
    assert made.isfinite().all()


@pytest.mark.parametrize(
    ("sizes", "starts"),
    [
        ((5, 9, 2), [0]),
        ((9, 9, 2), [0]),
        ((16, 9, 2), [0, 7]),
        ((30, 9, 2), [0, 7, 14, 21]),
        ((12, 9, 3), [0, 3]),
        ((17, 9, 1), [0, 8]),
    ],
)
def test_windows_cover_the_clip_and_share_frames(sizes, starts):
    frames, window, overlap = sizes
    assert window_starts(frames, window, overlap) == starts
    mirrored = [max(frames - window, 0) - start for start in starts]
    assert window_starts(frames, window, overlap, from_end=True) == mirrored


@pytest.mark.parametrize("overlap", [0, 9])
def test_windows_refuse_to_stand_still(overlap):
    with pytest.raises(ValueError, match="overlap"):
        window_starts(30, 9, overlap)


def test_a_long_prediction_continues_what_its_windows_made():
    model, start = Ramp(frames=5), torch.full((1, 3, 2, 8, 8), -0.75)
    made, known = sample(model, start, "predict", given=2, frames=28, seeds=[0])
    expected = torch.cat([torch.full((1,), -0.75), -0.75 + 0.05 * torch.arange(27)])
    assert torch.allclose(made[0, 0, :, 0, 0], expected, atol=1e-5)
    assert known[0].tolist() == [True] * 2 + [False] * 26
    assert all(call == (5, [True, True, False, False, False]) for call in model.calls[:-4])


def test_a_long_backward_prediction_is_made_from_its_end():
    model, end = Ramp(frames=5, backward=True), torch.full((1, 3, 14, 8, 8), -0.5)
    made, _ = sample(model, end, "backward", given=1, frames=14, seeds=[0], overlap=1)
    assert torch.allclose(made[0, 0, :, 0, 0], -0.5 + 0.05 * torch.arange(13, -1, -1), atol=1e-5)


def test_a_window_with_nothing_left_to_make_is_skipped(rand):
    model, video = Ramp(frames=4), rand(1, 3, 9, 8, 8).clamp(-1, 1)
    made, _ = sample(model, video, "predict", given=8, frames=9, seeds=[0], overlap=1)
    assert torch.equal(made[:, :, :8], video[:, :, :8])
    assert len(model.calls) == 4  # the steps of the last window


def test_a_longer_model_stands_where_it_stood(model, rand):
    longer, latents = with_frames(model, 12), rand(1, 48, 5, 4, 4)
    step = torch.tensor([3])
    assert torch.equal(longer(latents, step), model(latents, step))
    stretched = with_frames(model, 12, interpolate=True)
    assert not torch.allclose(stretched(latents, step), model(latents, step))
    made, _ = sample(longer, rand(1, 3, 2, 16, 16), "predict", given=2, frames=12, seeds=[0])
    assert made.shape == (1, 3, 12, 16, 16)


def test_progress_counts_the_steps_of_all_windows():
    seen = []
    options = {"given": 1, "frames": 9, "seeds": [0], "progress": lambda *n: seen.append(n)}
    sample(Ramp(frames=5), torch.zeros(1, 3, 1, 8, 8), "predict", **options)
    assert seen == [(i + 1, 8) for i in range(8)]


def test_refuses_clips_that_end_before_what_is_given(model, video):
    with pytest.raises(ValueError, match="first 4 frames"):
        sample(model, video[:, :, :3], "predict", given=4)
    with pytest.raises(ValueError, match="first 5 frames"):
        sample(model, None, "interpolate")
    with pytest.raises(ValueError, match="seeds"):
        sample(model, video, "predict", seeds=[0])
