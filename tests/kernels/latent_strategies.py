"""What Hypothesis draws for ops on latents (B, C, T, H, W). Without Hypothesis the tests skip."""

import pytest
import torch

from tests.kernels.noising_cases import LAYOUTS

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture],  # they hold no state
}
SHAPE = st.tuples(*(st.integers(1, most) for most in (3, 4, 5, 9, 9)))
DTYPE = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LAYOUT = st.sampled_from(sorted(LAYOUTS))
