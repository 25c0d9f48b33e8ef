import pytest
import torch

from fastvid.models.vdt import VDT
from tests.models.tiny import TINY, redraw


@pytest.fixture
def model():
    return redraw(VDT(TINY)).eval()


@pytest.fixture
def clip(rand):
    return rand(2, 4, 6, 8, 12), torch.tensor([7, 901])
