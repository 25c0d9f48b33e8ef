"""What the verbs that sample have in common."""

from dataclasses import replace

import pytest

from fastvid.cli._sampling import latent_bound, pick_device, pick_task, progress_bar
from fastvid.training.recipes import vdt_demo


@pytest.mark.parametrize(
    ("task", "given", "picked"),
    [
        ("predict", None, ("predict", 3)),  # as vdt-demo is trained
        ("predict", 2, ("predict", 2)),
        ("predict", 0, ("predict", 0)),  # to be refused, not replaced
        ("interpolate", None, ("interpolate", None)),
        ("image-to-video", None, ("predict", 1)),
        ("image-to-video", 2, ("image-to-video", 2)),
    ],
)
def test_given_frames_are_those_asked_for_else_those_of_training(task, given, picked):
    assert pick_task(vdt_demo(), task, given) == picked


def test_only_pixels_are_bounded():
    config = vdt_demo()
    object.__setattr__(config, "codec", replace(config.codec, kind="diffusers", path="vae"))
    assert latent_bound(config) is None
    assert latent_bound(vdt_demo()) == 1.0


def test_the_device_asked_for_comes_first(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert (pick_device("cpu"), pick_device(None)) == ("cpu", "cuda")


def test_a_bar_stands_where_it_was_told(monkeypatch):
    pytest.importorskip("tqdm")
    import tqdm

    bars, plain = [], tqdm.tqdm
    monkeypatch.setattr(
        tqdm,
        "tqdm",
        lambda **settings: bars.append(plain(**settings | {"disable": False})) or bars[-1],
    )
    with progress_bar(unit="step") as progress:
        progress(1, 8)
        progress(6, 8)
        assert (bars[0].n, bars[0].total) == (6, 8)
