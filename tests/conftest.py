"""What every test shares: hypothesis profiles, two threads, and the folder of evidence from outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", max_examples=40, derandomize=True, **_COMMON)
settings.register_profile("interpreted", max_examples=6, derandomize=True, **_COMMON)  # Triton's interpreter is slow
settings.register_profile("gpu", max_examples=10, derandomize=True, **_COMMON)  # each drawn size is compiled anew
settings.register_profile("long", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder RAGGED_EXIT_SHARED, with ``fixtures/`` made by the original systems."""
    folder = os.environ.get("RAGGED_EXIT_SHARED")
    if not folder:
        pytest.skip("RAGGED_EXIT_SHARED is not set: no evidence from the original systems to test against")
    return Path(folder)
