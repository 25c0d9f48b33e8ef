from pathlib import Path

import pytest

from fastvid.data.split import split_files

NAMES = [f"clips/{i:04d}.mp4" for i in range(1000)]


def test_every_file_is_on_one_side_in_order():
    train, held = split_files(NAMES, 0.1)
    assert not set(train) & set(held)
    assert sorted(train + held) == [Path(n) for n in NAMES]
    assert train == sorted(train)
    assert 70 < len(held) < 130


def test_added_files_move_nobody():
    few, many = split_files(NAMES[::3]), split_files(NAMES)
    assert set(few[0]) <= set(many[0])
    assert set(few[1]) <= set(many[1])


def test_the_seed_decides_and_the_order_does_not():
    assert split_files(NAMES, seed=1)[1] != split_files(NAMES, seed=0)[1]
    assert sorted(split_files(NAMES[::-1])[1]) == split_files(NAMES)[1]


def test_the_same_footage_in_two_files_shares_a_side():
    pairs = [f"{d}/{i}.{e}" for i in range(100) for d, e in [("a", "mp4"), ("b/c", "webm")]]
    train, held = split_files(pairs, 0.3)
    assert not {p.stem for p in train} & {p.stem for p in held}


@pytest.mark.parametrize("count", range(2, 12))
def test_small_sets_leave_neither_side_empty(count):
    for share in (0.01, 0.5, 0.99):
        train, held = split_files(NAMES[:count], share)
        assert train
        assert held
    assert split_files(NAMES[:count], 0) == ([Path(n) for n in NAMES[:count]], [])


def test_one_file_is_for_training():
    assert split_files(["a.mp4"], 0.9) == ([Path("a.mp4")], [])


def test_root_tells_files_of_one_name_apart():
    paths = [f"set/scene{i}/video.mp4" for i in range(20)]
    with pytest.raises(ValueError, match="pass root"):
        split_files(paths)
    train, held = split_files(paths, 0.3, root="set")
    assert train
    assert held
    moved = [f"elsewhere/{p}" for p in paths]
    assert [str(p) for p in split_files(moved, 0.3, root="elsewhere/set")[1]] == [
        f"elsewhere/{p}" for p in held
    ]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="validation must be"):
        split_files(NAMES, 1.0)
    with pytest.raises(ValueError, match="empty"):
        split_files([])
