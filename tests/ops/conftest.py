"""Every op test runs once per implementation named in RAGGED_EXIT_TEST_IMPL (default: reference,native).

``triton`` is for a process of its own with TRITON_INTERPRET=1 (test_triton_interpreted.py starts it) or a GPU
(RAGGED_EXIT_TEST_DEVICE=cuda). A test that takes ``impl`` and ``dtype`` gets each pair that the implementation has.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

from ragged_exit.ops.dispatch import native_available

IMPLS = os.environ.get("RAGGED_EXIT_TEST_IMPL", "reference,native").split(",")
DEVICE = os.environ.get("RAGGED_EXIT_TEST_DEVICE", "cpu")


def _marks(impl: str) -> list[pytest.MarkDecorator]:
    if impl != "native":
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = native_available()
    return [] if built else [pytest.mark.skip(reason="the C++ extension is not built")]


def _dtypes(impl: str, half: bool) -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16] + ([torch.float16] if half and impl != "native" else [])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" not in metafunc.fixturenames:
        return
    if "dtype" in metafunc.fixturenames:
        half = getattr(metafunc.module, "HALF", False)  # ops of the layers, which have float16 kernels too
        pairs = [
            pytest.param(impl, dtype, id=f"{impl}-{str(dtype).removeprefix('torch.')}", marks=_marks(impl))
            for impl in IMPLS
            for dtype in _dtypes(impl, half)
        ]
        metafunc.parametrize(("impl", "dtype"), pairs)
    else:
        metafunc.parametrize("impl", [pytest.param(impl, marks=_marks(impl)) for impl in IMPLS])


@pytest.fixture(autouse=True)
def poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.empty is full of NaN (integers: the largest), so that an output which is never written shows."""
    if DEVICE != "cpu" or request.node.path.name == "test_registration.py":
        yield  # a compiler would see other ops, a GPU other kernels
        return
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE
