"""exp, exp2 and tanh of the kernels: accuracy, and what they make of the ends of the number line."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("ragged_exit._native", reason="the C++ extension is not built")

import native_cases


@pytest.mark.parametrize("function", native_cases.UNITS)
def test_accuracy(function: str) -> None:
    native_cases.check_accuracy(function)


@pytest.mark.parametrize(
    ("function", "at_low", "at_high"), [("exp", 0.0, torch.inf), ("exp2", 0.0, torch.inf), ("tanh", -1.0, 1.0)]
)
def test_limits(function: str, at_low: float, at_high: float) -> None:
    x = torch.tensor([-torch.inf, -3e38, -1e4, 0.0, -0.0, 1e4, 3e38, torch.inf, torch.nan])
    y = native_cases.evaluate(function, x)
    assert y[:3].tolist() == [at_low] * 3
    assert y[3:5].tolist() == ([0.0, 0.0] if function == "tanh" else [1.0, 1.0])
    assert y[5:8].tolist() == [at_high] * 3
    assert y[8].isnan()


def test_tanh_is_odd_to_the_bit() -> None:
    x = torch.linspace(0, 10, 100_001)
    assert torch.equal(native_cases.evaluate("tanh", -x), -native_cases.evaluate("tanh", x))
