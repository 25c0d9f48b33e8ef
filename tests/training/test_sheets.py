"""Contact sheets and curves: the pixels are those of the clips, given parts are outlined."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

from fastvid.training.sheets import (
    GIVEN,
    Row,
    moving_sheet,
    save_contact_sheet,
    save_curves,
    to_uint8,
)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def is_outline(picture):
    return (picture == GIVEN).all(-1)


@pytest.fixture
def video(rand):
    return rand(3, 5, 16, 24).clamp(-1, 1)


def test_levels_round_and_clamp():
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(3, 2, 1, 5)
    assert to_uint8(video)[0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(video).shape == (2, 3, 1, 5)


def test_small_frames_are_enlarged_by_repeating_pixels(video, tmp_path):
    sheet = pixels(save_contact_sheet(tmp_path / "sheet.png", [Row("a", video)], cell=64))
    frames = to_uint8(video).permute(0, 2, 3, 1).numpy().repeat(4, axis=1).repeat(4, axis=2)
    strip = sheet[-6 - 64 : -6]  # below the frames there is a gap
    for frame in frames:
        places = [x for x in range(strip.shape[1] - 95) if (strip[:, x : x + 96] == frame).all()]
        assert len(places) == 1


def test_given_frames_are_outlined_and_no_others(video, tmp_path):
    known = torch.tensor([True, False, False, True, False])
    plain = pixels(save_contact_sheet(tmp_path / "a.png", [Row("a", video)], cell=64))
    marked = pixels(save_contact_sheet(tmp_path / "b.png", [Row("a", video, known)], cell=64))
    changed = np.flatnonzero((plain != marked).any((0, 2)))
    assert not is_outline(plain).any()
    assert is_outline(marked)[(plain != marked).any(-1)].all()
    spans = np.split(changed, np.flatnonzero(np.diff(changed) > 1) + 1)
    assert [len(span) for span in spans] == [96, 96]  # two frames, each from edge to edge
    assert spans[1][0] - spans[0][0] == 3 * (96 + 6)


def test_given_part_of_a_frame_is_outlined_inside_that_part(tmp_path):
    known = torch.zeros(1, 4, 4, dtype=torch.bool)
    known[0, 1:3, :2] = True
    rows = [Row("a", torch.zeros(3, 1, 32, 32), known)]
    outline = is_outline(pixels(save_contact_sheet(tmp_path / "a.png", rows, cell=64)))
    rows, columns = np.flatnonzero(outline.any(1)), np.flatnonzero(outline.any(0))
    assert (len(rows), len(columns)) == (32, 32)  # of a frame of 64 x 64
    assert not outline[rows[0] + 8 : rows[-1] - 8, columns[0] + 8 : columns[-1] - 8].any()


def test_long_clips_show_evenly_spaced_frames_with_both_ends(tmp_path):
    video = torch.linspace(-1, 1, 33).view(1, 33, 1, 1).expand(3, 33, 8, 8)
    sheet = pixels(save_contact_sheet(tmp_path / "a.png", [Row("", video)], cell=16, columns=5))
    middle = sheet[-6 - 8, 6 + 8 :: 16 + 6, 0]
    assert middle[:5].tolist() == [0, 64, 128, 191, 255]


def test_groups_of_rows_stand_apart(tmp_path):
    rows = [Row("", torch.full((3, 1, 8, 8), -1.0))] * 5
    sheet = pixels(save_contact_sheet(tmp_path / "a.png", rows, cell=16, group=2))
    dark = np.flatnonzero((sheet[:, 6 + 8] == 0).all(-1))
    starts = dark[np.diff(dark, prepend=-2) > 1]
    assert np.diff(starts).tolist() == [22, 40, 22, 40]
    assert len(dark) == 5 * 16
    assert sheet.shape[0] - dark[-1] == 7  # the gap below is no wider than others


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one"),
        ([Row("a", torch.zeros(4, 2, 8, 8))], r"\(3, T, H, W\)"),
        ([Row("a", torch.zeros(3, 2, 8, 8)), Row("b", torch.zeros(3, 3, 8, 8))], "one length"),
        ([Row("a", torch.zeros(3, 2, 8, 8), torch.ones(3, dtype=torch.bool))], "known"),
    ],
)
def test_refuses_what_makes_no_sheet(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_contact_sheet(tmp_path / "a.png", rows)
    assert not (tmp_path / "a.png").exists()


def test_moving_sheet_is_a_video_that_files_take(video):
    known = torch.tensor([True, False, False, False, True])
    moving = moving_sheet([[Row("clip", video), Row("model", video, known)]] * 2, cell=33)
    T, channels, H, W = moving.shape
    assert (T, channels, H % 2, W % 2, moving.dtype) == (5, 3, 0, 0, torch.uint8)
    assert [is_outline(f.permute(1, 2, 0).numpy()).any() for f in moving] == known.tolist()


def test_curves_are_drawn_with_their_marks(tmp_path):
    pytest.importorskip("matplotlib")
    curves = {"train": ([1, 2, 3], [1.0, 0.1, 0.01]), "validation": ([1, 3], [1.0, 0.1])}
    bare = pixels(save_curves(tmp_path / "a.png", {"train": curves["train"]}))
    both = pixels(save_curves(tmp_path / "deep" / "b.png", curves, marks={"resumed": 2}))
    first, second = (31, 119, 180), (255, 127, 14)  # matplotlib's first two colours
    assert (bare == first).all(-1).any()
    assert not (bare == second).all(-1).any()
    assert (both == second).all(-1).any()
