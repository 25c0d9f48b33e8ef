"""Encoding goes on after a crash."""

import pytest

from fastvid.data.latents import LatentDataset
from fastvid.training import encode

pytest.importorskip("tqdm")


def test_what_a_killed_process_left_does_not_stop_the_next(config, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_PART", 2)
    original, calls = encode.to_latents, []

    def fail_later(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(encode, "to_latents", fail_later)
    with pytest.raises(KeyboardInterrupt):
        encode.encode_sets(config(), tmp_path / "out")
    (parts,) = (tmp_path / "out").iterdir()
    half = parts / ".00000004.1234.part"
    half.mkdir()
    (half / "latents-00000.safetensors").touch()
    monkeypatch.setattr(encode, "to_latents", original)
    done = encode.encode_sets(config(), tmp_path / "out")
    for name, (count, report) in done.items():
        assert len(LatentDataset(tmp_path / "out" / name)) == count
        assert report.bad == {}
    assert sum(count for count, _ in done.values()) == 20  # two clips of 4 frames in each file of 8
