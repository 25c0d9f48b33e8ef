"""What a config builds."""

import pytest

from fastvid.training.build import build_schedule
from fastvid.training.config import DiffusionConfig


@pytest.mark.parametrize("respacing", ["", "50", "ddim50", "10,15,1"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squared_cosine"])
def test_zero_snr_survives_any_respacing(schedule, respacing):
    config = DiffusionConfig(schedule=schedule, respacing=respacing, zero_snr=True, prediction="v")
    assert build_schedule(config).terminal_snr == 0
