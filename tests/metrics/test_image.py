"""PSNR and SSIM: the stated definitions, and the refusal of the wrong range."""

import math

import numpy as np
import pytest
import torch

from fastvid.metrics import image, pooled_psnr, psnr, ssim


@pytest.fixture
def pair(rand):
    video = rand(2, 3, 3, 24, 37).sigmoid()
    return video, (video + 0.05 * rand(2, 3, 3, 24, 37)).clamp(0, 1)


def frames(pair):
    """The same frames as skimage takes them: (B, T, H, W, 3) float64."""
    return [v.double().movedim(1, -1).numpy() for v in pair]


def test_psnr_is_skimage_per_frame(pair):
    metrics = pytest.importorskip("skimage.metrics")
    x, y = frames(pair)
    ours = psnr(*pair)
    for b, t in np.ndindex(2, 3):
        expected = metrics.peak_signal_noise_ratio(y[b, t], x[b, t], data_range=1)
        assert ours[b, t].item() == pytest.approx(expected, abs=1e-9)


def test_ssim_is_skimage_with_gaussian_windows(pair):
    metrics = pytest.importorskip("skimage.metrics")
    x, y = frames(pair)
    ours = ssim(*pair)
    for b, t in np.ndindex(2, 3):
        expected = metrics.structural_similarity(
            x[b, t],
            y[b, t],
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=-1,
        )
        assert ours[b, t].item() == pytest.approx(expected, abs=1e-6)


def test_ssim_does_not_depend_on_how_frames_are_chunked(pair, monkeypatch):
    whole = ssim(*pair)
    monkeypatch.setattr(image, "SSIM_CHUNK", 1)
    assert torch.equal(ssim(*pair), whole)


def test_one_black_frame_rules_the_pooled_value(rand):
    target = rand(1, 3, 16, 16, 16).sigmoid()
    video = (target + 0.01).clamp(0, 1)
    video[:, :, 5] = 0
    per_frame, pooled = psnr(video, target), pooled_psnr(video, target)
    error = (video.double() - target.double()).square()
    assert pooled.item() == pytest.approx(-10 * math.log10(error.mean().item()), abs=1e-9)
    assert per_frame.shape == (1, 16)
    assert per_frame.mean() > pooled + 10


def test_equal_frames_are_capped_and_perfect(pair):
    video = pair[0]
    assert torch.equal(psnr(video, video), torch.full((2, 3), 100.0).double())
    assert torch.equal(pooled_psnr(video, video), torch.full((2,), 100.0).double())
    torch.testing.assert_close(ssim(video, video), torch.ones(2, 3).double(), rtol=0, atol=1e-12)


def test_half_precision_input_is_scored_in_double(pair):
    video, target = (v.half() for v in pair)
    torch.testing.assert_close(psnr(video, target), psnr(video.double(), target.double()))
    torch.testing.assert_close(ssim(video, target), ssim(video.double(), target.double()))


@pytest.mark.parametrize("metric", [psnr, pooled_psnr, ssim])
class TestRefusals:
    def test_video_in_minus_one_to_one(self, metric, pair):
        with pytest.raises(ValueError, match=r"video must lie in \[0, 1\].*\(video \+ 1\) / 2"):
            metric(2 * pair[0] - 1, pair[1])

    def test_target_of_another_range(self, metric, pair):
        with pytest.raises(ValueError, match=r"target must lie in \[0, 1\]"):
            metric(pair[0], 255 * pair[1])

    def test_nan(self, metric, pair):
        pair[0][0, 0, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"video must lie in \[0, 1\]"):
            metric(*pair)

    def test_eight_bit_video(self, metric, pair):
        with pytest.raises(TypeError, match=r"float tensor in \[0, 1\].*torch.uint8"):
            metric((255 * pair[0]).byte(), pair[1])

    def test_another_layout(self, metric, pair):
        with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\), got \(2, 5, 3, 24, 37\)"):
            metric(torch.zeros(2, 5, 3, 24, 37), torch.zeros(2, 5, 3, 24, 37))

    def test_unequal_shapes(self, metric, pair):
        with pytest.raises(ValueError, match="one shape"):
            metric(pair[0][:1], pair[1])


def test_ssim_refuses_frames_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 11x11, got 10x32"):
        ssim(torch.zeros(1, 3, 1, 10, 32), torch.zeros(1, 3, 1, 10, 32))
