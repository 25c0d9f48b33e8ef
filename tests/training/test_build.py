"""What a config builds."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from fastvid.models.vdt import VDT, VDTConfig
from fastvid.training.build import build_schedule
from fastvid.training.config import DataConfig, DiffusionConfig, RunConfig, TrainVDT
from fastvid.training.vdt import build_model

VIDEO = VDTConfig(channels=48, height=4, width=4, frames=4, dim=384, depth=1, heads=6)
IMAGE = replace(VIDEO, mode="image", frames=1)


def wanting(init, **changes):
    """A run that starts with the weights at `init`."""
    model = replace(VIDEO, **changes)
    data = DataConfig(frames=model.frames, size=(4 * model.height, 4 * model.width))
    return TrainVDT(model=model, data=data, run=RunConfig(init=str(init)))


@pytest.fixture(params=["folder", "official file"])
def saved(request, tmp_path):
    """Write a model as its own folder or under the official names; returns the path."""

    def save(model):
        if request.param == "folder":
            model.save_pretrained(tmp_path / "model")
            return tmp_path / "model"
        save_file(model.to_official_state_dict(), tmp_path / "official.safetensors")
        return tmp_path / "official.safetensors"

    return save


def test_saved_weights_start_a_run(saved):
    source = VDT(VIDEO)
    made = build_model(wanting(saved(source)))
    assert made.config == VIDEO
    for name, value in source.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name


def test_an_image_model_starts_the_spatial_half_of_a_video_model(saved):
    image = VDT(IMAGE)
    made = build_model(wanting(saved(image)))
    assert made.config == VIDEO
    for name, value in image.state_dict().items():
        if name != "time":
            assert torch.equal(made.state_dict()[name], value), name


def test_an_official_file_serves_another_size(tmp_path):
    source = VDT(VIDEO)
    save_file(source.to_official_state_dict(), tmp_path / "official.safetensors")
    made = build_model(wanting(tmp_path / "official.safetensors", frames=6, height=8, width=8))
    assert (made.config.frames, made.config.height, made.config.width) == (6, 8, 8)
    assert torch.equal(made.final.weight, source.final.weight)
    assert torch.equal(made.time[:4], source.time)


def test_weights_of_another_architecture_are_refused(saved):
    path = saved(VDT(VIDEO))
    with pytest.raises(ValueError, match="the run wants"):
        build_model(wanting(path, depth=2))


def test_without_weights_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="neither a run with saved weights nor a model folder"):
        build_model(wanting(tmp_path))


@pytest.mark.parametrize("respacing", ["", "50", "ddim50", "10,15,1"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squared_cosine"])
def test_zero_snr_survives_any_respacing(schedule, respacing):
    config = DiffusionConfig(schedule=schedule, respacing=respacing, zero_snr=True, prediction="v")
    assert build_schedule(config).terminal_snr == 0
