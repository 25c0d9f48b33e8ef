"""The trivial rivals against loops written from their definition."""

import pytest
import torch

from fastvid.metrics import copy_nearest, linear_blend

T = 7


def pixel_by_pixel(video, known, blend):
    """Nearest copy or linear blend of every pixel on its own; all pixels are known some time."""
    out = video.clone()
    B, _, T, H, W = video.shape
    for b in range(B):
        for y in range(H):
            for x in range(W):
                given = [t for t in range(T) if known[b, t, y, x]]
                for t in range(T):
                    before = max((g for g in given if g <= t), default=None)
                    after = min((g for g in given if g >= t), default=None)
                    ends = [g for g in (before, after) if g is not None]
                    if t in given:
                        continue
                    if blend and len(ends) == 2:
                        w = (t - before) / (after - before)
                        value = (1 - w) * video[b, :, before, y, x] + w * video[b, :, after, y, x]
                    else:
                        nearest = min(ends, key=lambda g: (abs(g - t), g))
                        value = video[b, :, nearest, y, x]
                    out[b, :, t, y, x] = value
    return out


@pytest.mark.parametrize(("rival", "blend"), [(copy_nearest, False), (linear_blend, True)])
class TestBothRivals:
    @pytest.mark.parametrize("given", [[0], [0, 1], [6], [0, 6], [3], [1, 2, 5]])
    def test_whole_frames(self, rival, blend, rand, given):
        video = rand(2, 3, T, 4, 6, dtype=torch.float64)
        known = torch.zeros(2, T, dtype=torch.bool)
        known[:, given] = True
        expected = pixel_by_pixel(video, known[:, :, None, None].expand(2, T, 4, 6), blend)
        torch.testing.assert_close(rival(video, known), expected)

    def test_cells_on_a_coarser_grid(self, rival, blend, rand):
        video = rand(2, 3, T, 4, 6, dtype=torch.float64)
        known = rand(2, T, 2, 3) > 0.3
        known[:, 2] = True
        pixels = known.repeat_interleave(2, 2).repeat_interleave(2, 3)
        expected = pixel_by_pixel(video, pixels, blend)
        torch.testing.assert_close(rival(video, known), expected)

    def test_known_pixels_are_bit_exact_and_unknown_ones_never_read(self, rival, blend, rand):
        video = rand(2, 3, T, 4, 6)
        known = rand(2, T, 4, 6) > 0.5
        known[1, :, 0, 0] = False  # a pixel that is never given
        known[:, 0, 1] = True
        poisoned = video.masked_fill(~known[:, None], torch.nan)
        out = rival(poisoned, known)
        assert torch.equal(out, rival(video, known))
        assert torch.equal(out[known[:, None].expand_as(out)], video[known[:, None].expand_as(out)])

    def test_a_pixel_never_given_takes_the_mean_known_colour(self, rival, blend, rand):
        video = rand(1, 3, T, 2, 2, dtype=torch.float64)
        known = torch.zeros(1, T, 2, 2, dtype=torch.bool)
        known[0, [1, 4], 0] = True
        colour = video[:, :, [1, 4], 0].mean(dim=(2, 3))
        out = rival(video, known)
        torch.testing.assert_close(out[:, :, :, 1], colour[:, :, None, None].expand(1, 3, T, 2))

    def test_refuses_float_known(self, rival, blend):
        with pytest.raises(TypeError, match=r"known must be bool.*got torch.float32"):
            rival(torch.zeros(1, 3, T, 4, 4), torch.ones(1, T))

    @pytest.mark.parametrize("shape", [(1, T + 1), (2, T), (1, T, 3, 4), (1, T, 4)])
    def test_refuses_other_shapes(self, rival, blend, shape):
        with pytest.raises(ValueError, match="known must be"):
            rival(torch.zeros(1, 3, T, 4, 4), torch.ones(shape, dtype=torch.bool))

    def test_refuses_a_clip_without_given_cells(self, rival, blend):
        known = torch.ones(2, T, dtype=torch.bool)
        known[1] = False
        with pytest.raises(ValueError, match="at least one cell of every clip"):
            rival(torch.zeros(2, 3, T, 4, 4), known)


def test_blend_is_exact_on_linear_motion_of_brightness():
    ramp = torch.linspace(0, 1, T).reshape(1, 1, T, 1, 1).expand(1, 3, T, 4, 4)
    known = torch.zeros(1, T, dtype=torch.bool)
    known[:, [0, -1]] = True
    torch.testing.assert_close(linear_blend(ramp, known), ramp)
    assert not torch.allclose(copy_nearest(ramp, known), ramp)
