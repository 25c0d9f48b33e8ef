"""`compare` finds what got slower, and nothing else."""

import json

import pytest

from benchmarks import compare

PLACE = {"machine": "A CPU", "device": "cpu", "threads": 1, "date": "2026-01-01", "commit": "aa"}


def _rows(ms=10.0, spread=0.05, ratio=None, ratio_spread=0.02, case="room/case", **changes):
    """Our row, and eager's when a ratio is given."""
    times = {
        name: ms * (1 + sign * spread)
        for name, sign in (("p20_ms", -1), ("p50_ms", 0), ("p80_ms", 1))
    }
    ours = {**PLACE, "case": case, "room": "room", "rival": "fastvid", "match": True, **times}
    found = [ours | changes]
    if ratio is not None:
        ratios = {
            name: ratio * (1 + sign * ratio_spread)
            for name, sign in (("ratio_p20", -1), ("ratio_p50", 0), ("ratio_p80", 1))
        }
        found.append({**ours, "rival": "eager", **ratios})
    return found


def _verdict(old, new):
    (change,) = compare.compare(old, new)
    return change.verdict


@pytest.mark.parametrize(("ms", "verdict"), [(12.0, "slower"), (10.5, "same"), (8.0, "faster")])
def test_times_are_judged_by_their_spread(ms, verdict):
    assert _verdict(_rows(10.0), _rows(ms)) == verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(1.2, "slower"), (1.48, "same"), (1.8, "faster")])
def test_beside_eager_the_ratio_decides_whatever_the_machine_did(ratio, verdict):
    assert _verdict(_rows(10.0, ratio=1.5), _rows(30.0, ratio=ratio)) == verdict


def test_a_wide_spread_is_no_regression():
    assert _verdict(_rows(10.0, spread=0.3), _rows(12.0, spread=0.3)) == "same"


@pytest.mark.parametrize("changes", [{"match": False}, {"match": None, "failed": "no kernel"}])
def test_a_result_that_no_longer_counts_is_a_regression(changes):
    assert _verdict(_rows(), _rows(**changes)) == "lost"


def test_what_there_was_no_time_for_says_nothing():
    assert compare.compare(_rows(), _rows(match=None, skipped="the seconds were over")) == []


def test_another_machine_or_thread_count_is_not_compared():
    for changes in ({"machine": "B"}, {"threads": 2}):
        assert compare.compare(_rows(10.0), _rows(20.0, **changes)) == []


def test_the_last_of_several_measurements_counts():
    assert _verdict(_rows(30.0) + _rows(10.0), _rows(10.0)) == "same"


def _write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def test_the_command_fails_on_a_planted_regression_and_names_it(tmp_path, capsys):
    old = _write(tmp_path / "old.jsonl", _rows(case="room/a") + _rows(case="room/b"))
    new = _write(tmp_path / "new.jsonl", _rows(case="room/a") + _rows(20.0, case="room/b"))
    assert compare.main([old, old]) == 0
    capsys.readouterr()
    assert compare.main([old, new]) == 1
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("slower")
    assert "room/b" in first


def test_nothing_in_common_is_said(tmp_path, capsys):
    old = _write(tmp_path / "old.jsonl", _rows())
    new = _write(tmp_path / "new.jsonl", _rows(case="room/other"))
    assert compare.main([old, new]) == 2
    assert "nothing to compare" in capsys.readouterr().out


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="a file or a folder"):
        compare.main([str(tmp_path / "none.jsonl"), str(tmp_path)])
