import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastvid.data.synthetic import RECORD, draw_motion, make_motion_clips
from fastvid.data.video import probe, read_clip

SMALL = {"clips": 3, "frames": 10, "size": 16}
LOOK = {
    "frames": 24,
    "size": (32, 48),
    "shapes": (2, 3),
    "radius": (0.12, 0.24),
    "speed": (0.05, 0.1),
    "acceleration": 0.01,
    "spin": 0.1,
    "texture": 0.5,
}


def test_clips_are_real_files_of_the_asked_shape(tmp_path):
    pytest.importorskip("av")
    paths = make_motion_clips(tmp_path / "set", **SMALL | {"size": (16, 24)})
    assert [p.name for p in paths] == ["clip-00000.mp4", "clip-00001.mp4", "clip-00002.mp4"]
    info = probe(paths[0])
    assert (info.frames, info.height, info.width, info.codec) == (10, 16, 24, "h264")


def test_the_file_holds_what_was_drawn(tmp_path):
    """Brightness comes back almost exactly; colour at half the resolution, as in any video."""
    pytest.importorskip("av")
    (path,) = make_motion_clips(tmp_path / "set", clips=1, frames=16, size=32, seed=4)
    look = LOOK | {"frames": 16, "size": (32, 32), "speed": (0.03, 0.09), "acceleration": 0.0}
    drawn = draw_motion(np.random.default_rng([4, 0]), **look)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    error = ((read_clip(path) / 255 - drawn / 255) * weights).sum(1).square().mean()
    assert -10 * error.log10() > 35


def test_a_seed_decides_everything(tmp_path):
    pytest.importorskip("av")
    first, again, other = (
        [p.read_bytes() for p in make_motion_clips(tmp_path / name, seed=seed, **SMALL)]
        for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert first == again
    assert not set(first) & set(other)
    assert len(set(first)) == 3


FILL_AND_WRITE = """
import ctypes, hashlib, sys
from pathlib import Path
from fastvid.data.synthetic import make_motion_clips

M_PERTURB, M_MMAP_THRESHOLD = -6, -3  # of glibc's malloc.h
libc = ctypes.CDLL(None)
libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)  # large buffers too come from the filled heap
for fill in (0, 8, 85, 136, 255):
    libc.mallopt(M_PERTURB, fill)
    (path,) = make_motion_clips(Path(sys.argv[1]) / str(fill), clips=1, frames=8, size=24)
    print(hashlib.sha256(path.read_bytes()).hexdigest())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="fills memory by glibc's mallopt")
def test_what_memory_held_before_does_not_get_into_the_file(tmp_path):
    pytest.importorskip("av")
    child = [sys.executable, "-c", FILL_AND_WRITE, str(tmp_path)]
    made = subprocess.run(child, check=True, capture_output=True, text=True).stdout.split()
    assert len(made) == 5
    assert len(set(made)) == 1


def test_a_second_call_writes_nothing_and_a_changed_one_writes_again(tmp_path):
    pytest.importorskip("av")
    folder = tmp_path / "set"
    path = make_motion_clips(folder, **SMALL)[0]
    written = path.stat().st_mtime_ns
    assert make_motion_clips(folder, **SMALL)[0].stat().st_mtime_ns == written
    make_motion_clips(folder, **SMALL | {"clips": 2, "seed": 3})
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [RECORD, "clip-00000.mp4", "clip-00001.mp4"]
    )
    assert json.loads((folder / RECORD).read_text())["settings"]["seed"] == 3


def test_a_damaged_clip_is_made_again(tmp_path):
    pytest.importorskip("av")
    path = make_motion_clips(tmp_path / "set", **SMALL)[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert make_motion_clips(tmp_path / "set", **SMALL)[1].read_bytes() == whole


def test_other_files_are_never_touched(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "holiday.mp4").write_bytes(b"dear")
    with pytest.raises(ValueError, match="holds other files"):
        make_motion_clips(tmp_path, **SMALL)
    make_motion_clips(tmp_path / "set", **SMALL)
    (tmp_path / "set" / "mine.txt").touch()
    with pytest.raises(ValueError, match="holds other files"):
        make_motion_clips(tmp_path / "set", **SMALL | {"seed": 1})


def test_what_a_killed_process_left_does_not_move_in(tmp_path):
    pytest.importorskip("av")
    stale = tmp_path / f".set.{os.getpid()}.part"
    stale.mkdir()
    (stale / "clip-99999.mp4").touch()
    make_motion_clips(tmp_path / "set", **SMALL)
    assert not (tmp_path / "set" / "clip-99999.mp4").exists()


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("av")
    from fastvid.data import synthetic

    write, count = synthetic.write_mp4, []

    def fail_at_the_third(*args, **kwargs):
        count.append(1)
        if len(count) == 3:
            raise OSError("disk full")
        return write(*args, **kwargs)

    monkeypatch.setattr(synthetic, "write_mp4", fail_at_the_third)
    with pytest.raises(OSError, match="disk full"):
        make_motion_clips(tmp_path / "set", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_shapes_stay_inside_and_move_at_the_asked_speed():
    """The centre of a lone shape moves, by no more than its speed, and turns back at walls."""
    look = LOOK | {"shapes": (1, 1), "texture": 0.0, "acceleration": 0.0, "frames": 80}
    for seed in range(6):
        video = draw_motion(np.random.default_rng(seed), **look).float()
        ground = video.flatten(2).permute(1, 0, 2).flatten(1).median(1).values
        share = (video - ground[:, None, None]).abs().sum(1)
        share = share / share.amax()
        area = share.sum((1, 2))
        assert area.max() / area.min() < 1.1  # never cut by a wall
        y = (share.sum(2) * (torch.arange(32) + 0.5)).sum(1) / area
        x = (share.sum(1) * (torch.arange(48) + 0.5)).sum(1) / area
        step = torch.hypot(y.diff(), x.diff())
        assert step.max() < 0.1 * 32 * 1.1
        assert step.median() > 0.05 * 32 * 0.8
        assert ((y.diff().sign().diff() != 0) | (x.diff().sign().diff() != 0)).any()


def test_edges_are_drawn_at_sub_pixel_places():
    """Half a pixel of motion changes the picture: speed 0.01 of 32 pixels is a third of one."""
    look = LOOK | {"speed": (0.01, 0.01), "spin": 0.0, "acceleration": 0.0, "frames": 8}
    video = draw_motion(np.random.default_rng(0), **look).int()
    assert (video.diff(dim=0).abs().amax((1, 2, 3)) > 5).all()


def test_later_shapes_hide_earlier_ones():
    """The shape in front always shows its whole area; the one behind loses some of its own."""
    look = LOOK | {"size": (96, 96), "spin": 0.0, "frames": 60, "radius": (0.2, 0.24)}
    alone = draw_motion(np.random.default_rng(3), **look | {"shapes": (1, 1)})
    both = draw_motion(np.random.default_rng(3), **look | {"shapes": (2, 2)})
    added = (alone != both).any(1)
    front = both.permute(0, 2, 3, 1)[added].mode(0).values  # the colour of the second shape
    whole = (both == front[:, None, None]).all(1).sum((1, 2))
    assert whole.max() / whole.min() < 1.1
    hidden = both.permute(0, 2, 3, 1)[~added].unique(dim=0, return_counts=True)
    behind = hidden[0][hidden[1].argmax()]
    seen = (both == behind[:, None, None]).all(1).sum((1, 2))
    assert seen.min() < 0.9 * seen.max()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 15}, "size even"),
        ({"clips": 0}, "clips=0"),
        ({"speed": (0.2, 0.1)}, "speed must be"),
        ({"radius": (0.1, 0.6)}, "radius must stay below"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_motion_clips(tmp_path / "set", **SMALL | wrong)
    assert list(tmp_path.iterdir()) == []
