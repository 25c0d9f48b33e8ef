import itertools
import math

import pytest
import torch

from fastvid.diffusion.tasks import (
    OFFICIAL_IDS,
    OFFICIAL_MIX,
    TASKS,
    _rectangle,
    block_cells,
    draw_task,
    task_known,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", TASKS)
def test_something_is_always_left_to_generate(name):
    """Defect Q2 of the official code: a completion without given end frames gave everything."""
    for frames, side, seed in itertools.product((2, 3, 4, 5, 8, 16, 30), (1, 2, 3, 8), range(8)):
        known = task_known(name, frames, side, side + 1, batch=5, generator=seeded(seed))
        assert known.dtype == torch.bool
        assert known.shape in ((5, frames), (5, frames, side, side + 1))
        assert (~known).flatten(1).any(1).all()


@pytest.mark.parametrize("name", TASKS)
def test_a_generator_settles_the_draw(name):
    def draw(seed):
        return task_known(name, 16, 8, 8, batch=4, generator=seeded(seed))

    torch.manual_seed(1)
    first = draw(7)
    torch.manual_seed(2)
    assert torch.equal(first, draw(7))


@pytest.mark.parametrize("name", ["image-to-video", "arbitrary-interpolation", "complete"])
def test_samples_of_a_batch_are_drawn_apart(name):
    known = task_known(name, 16, 8, 8, batch=8, generator=seeded())
    assert any(not torch.equal(known[0], other) for other in known[1:])


def test_official_numbers():
    assert OFFICIAL_IDS == (
        "predict",
        "backward",
        "interpolate",
        "unconditional",
        "image-to-video",
        "arbitrary-interpolation",
        "complete",
    )


@pytest.mark.parametrize(
    ("name", "given", "frames"),
    [
        ("predict", None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("predict", 2, [0, 1]),
        ("backward", None, [8, 9, 10, 11, 12, 13, 14, 15]),
        ("backward", 1, [15]),
        ("interpolate", None, [0, 4, 8, 12]),
        ("interpolate", 2, [0, 15]),
        ("interpolate", 3, [0, 8, 15]),
        ("middle-frame", None, [8]),
        ("middle-frame", 3, [7, 8, 9]),
        ("expand", None, [0, 1, 2, 3, 4]),
        ("expand", 12, list(range(12))),
        ("slow-motion", None, [0, 5, 10, 15]),
        ("loop", None, [0, 15]),
        ("unconditional", None, []),
        ("unconditional", 0, []),
    ],
)
def test_frames_given_by_the_fixed_tasks(name, given, frames):
    known = task_known(name, 16, 4, 4, given=given, batch=2)
    assert known.shape == (2, 16)
    for sample in known:
        assert sample.nonzero().flatten().tolist() == frames


def test_a_short_clip_is_half_given():
    """Defect Q3 of the official code: 8 frames were given of any clip, of 8 frames too."""
    assert task_known("predict", 8, 1, 1).sum() == 4
    assert task_known("backward", 3, 1, 1).tolist() == [[False, False, True]]
    assert task_known("predict", 30, 1, 1, given=2).sum() == 2


@pytest.mark.parametrize("name", ["image-to-video", "arbitrary-interpolation"])
@pytest.mark.parametrize("given", [1, 2, 7])
def test_random_frames_are_as_many_as_asked_and_anywhere(name, given):
    known = task_known(name, 8, 1, 1, given=given, batch=400, generator=seeded())
    assert (known.sum(1) == given).all()
    assert (known.float().mean(0) - given / 8).abs().max() < 0.1


def test_image_to_video_gives_one_frame():
    known = task_known("image-to-video", 16, 1, 1, batch=100, generator=seeded())
    assert (known.sum(1) == 1).all()


def test_arbitrary_interpolation_gives_a_fifth_of_the_frames():
    known = task_known("arbitrary-interpolation", 16, 1, 1, batch=2000, generator=seeded())
    assert known.float().mean() == pytest.approx(0.2, abs=0.01)
    tiny = task_known("arbitrary-interpolation", 1, 1, 1, batch=200, generator=seeded())
    assert not tiny.any()


def test_completion_repeats_one_pattern_between_given_ends():
    known = task_known("complete", 16, 16, 16, batch=300, generator=seeded())
    ends = torch.zeros(2, 4)
    for sample in known:
        whole = sample.flatten(1).all(1)
        inside = (~whole).nonzero().flatten()
        first, last = int(inside[0]), 15 - int(inside[-1])
        ends[0, first] += 1
        ends[1, last] += 1
        assert len(inside) == 16 - first - last
        assert torch.equal(sample[inside], sample[first].expand(len(inside), -1, -1))
        assert (~sample[first]).sum() == 128
    assert (ends / 300 - 0.25).abs().max() < 0.1  # none to three given frames, at both ends


@pytest.mark.parametrize(("given", "first", "last"), [(0, 0, 0), (1, 1, 0), (5, 3, 2), (15, 8, 7)])
def test_completion_gives_as_many_whole_frames_as_asked(given, first, last):
    known = task_known("complete", 16, 4, 4, given=given, batch=3, generator=seeded())
    whole = [True] * first + [False] * (16 - given) + [True] * last
    assert known.flatten(2).all(2).tolist() == [whole] * 3
    inside = known[:, first : 16 - last]
    assert inside.flatten(2).sum(2).eq(8).all()
    assert not torch.equal(inside[0], inside[1])


def test_rectangles_spread_over_area_shape_and_place():
    draws = [_rectangle(64, 48, 204, generator) for generator in [seeded()] for _ in range(3000)]
    tall, wide = (
        torch.tensor([float(draw[axis].stop - draw[axis].start) for draw in draws])
        for axis in (0, 1)
    )
    area, ratio = tall * wide, (tall / wide).log() / math.log(1 / 0.3)
    assert area.mean() == pytest.approx(104, abs=4)  # uniform from 4 to 204
    assert area.std() == pytest.approx(200 / 12**0.5, rel=0.1)
    big = ratio[area > 100]  # there rounding to cells matters little
    assert big.mean() == pytest.approx(0, abs=0.05)
    assert big.std() == pytest.approx(1 / 3**0.5, rel=0.1)  # uniform from -1 to 1
    assert big.abs().max() < 1.2
    for axis, size in ((0, 64), (1, 48)):
        places = [draw[axis] for draw in draws]
        assert min(place.start for place in places) == 0
        assert max(place.stop for place in places) == size
    small = [_rectangle(64, 48, 12, generator) for generator in [seeded()] for _ in range(3000)]
    cells = [(a.stop - a.start) * (b.stop - b.start) for a, b in small]
    assert sum(cells) / 3000 == pytest.approx(8, abs=0.4)  # 6.5 with single cells among them


def test_blocks_cover_the_share_exactly_and_hang_together():
    """Defect Q1 of the official code: the generator of blocks crashed with any NumPy since 1.24."""
    for height, width, share in itertools.product((1, 2, 5, 16), (1, 3, 32), (0.25, 0.5, 1.0)):
        cells = block_cells(height, width, share=share, generator=seeded())
        assert cells.shape == (height, width)
        assert cells.sum() == max(1, int(share * height * width))
    cells = torch.stack([block_cells(32, 32, generator=seeded(i)) for i in range(50)])
    alike = (cells[:, :, 1:] == cells[:, :, :-1]).float().mean()
    assert alike > 0.85  # 0.5 for cells drawn one by one


def test_the_official_mix():
    generator = seeded()
    draws = [draw_task(OFFICIAL_MIX, 16, 8, 8, generator=generator) for _ in range(1500)]
    share = {name: sum(drawn == name for drawn, _ in draws) / 1500 for name in TASKS}
    for name, expected in OFFICIAL_MIX.items():
        assert share[name] == pytest.approx(expected, abs=0.04)
    # Published: 0.66 with one completion in four wrongly empty, 0.05 of all draws.
    generated = sum((~known).float().mean().item() for _, known in draws) / 1500
    assert generated == pytest.approx(0.68, abs=0.03)


def test_a_mix_draws_by_weight_and_takes_given_by_name():
    generator = seeded()
    weights = {"predict": 3.0, "backward": 0.0, "unconditional": 1.0}
    draws = [
        draw_task(weights, 16, 4, 4, given={"predict": 2}, batch=3, generator=generator)
        for _ in range(400)
    ]
    names = [name for name, _ in draws]
    assert names.count("backward") == 0
    assert names.count("predict") / 400 == pytest.approx(0.75, abs=0.07)
    for name, known in draws:
        assert known.shape == (3, 16)
        assert (known.sum(1) == (2 if name == "predict" else 0)).all()


@pytest.mark.parametrize(
    ("name", "given", "frames"),
    [
        ("predict", 16, 16),
        ("predict", 0, 16),
        ("backward", 17, 16),
        ("interpolate", 16, 16),
        ("image-to-video", 16, 16),
        ("arbitrary-interpolation", -1, 16),
        ("predict", None, 1),
        ("interpolate", None, 1),
        ("image-to-video", None, 1),
        ("unconditional", 1, 16),
        ("complete", 16, 16),
        ("complete", -1, 16),
    ],
)
def test_given_must_leave_a_frame(name, given, frames):
    with pytest.raises(ValueError, match="given must be"):
        task_known(name, frames, 4, 4, given=given)


def test_other_nonsense_is_refused_by_name():
    with pytest.raises(ValueError, match=r"task must be one of predict, .*got 'forecast'"):
        task_known("forecast", 16, 4, 4)
    with pytest.raises(ValueError, match="height must be at least 1, got 0"):
        task_known("complete", 16, 0, 4)
    with pytest.raises(ValueError, match=r"task must be one of .*got \['forecast'\]"):
        draw_task({"forecast": 1.0}, 16, 4, 4)
    with pytest.raises(ValueError, match="task must be one of"):
        draw_task({"predict": 1.0}, 16, 4, 4, given={"forecast": 1})
    for weights in ({}, {"predict": 0.0}, {"predict": -1.0, "backward": 2.0}):
        with pytest.raises(ValueError, match="weights must not be negative and not all 0"):
            draw_task(weights, 16, 4, 4)
