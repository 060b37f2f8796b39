"""PackedLinear does what linears do, by every path: this package's kernels, oneDNN's, plain."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from packed_cases import PACKED_NATIVELY
from tiny import (
    one_thread,  # noqa: F401
)

from ragged_exit import linears
from ragged_exit.linears import PackedLinear, prepacking_available
from ragged_exit.ops import linears_available

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
TOLERANCES = {torch.float32: {"rtol": 0, "atol": 3e-6}, torch.bfloat16: {"rtol": 0.02, "atol": 0.02}}


@pytest.fixture(params=["prepacked", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(linears, "prepacking_available", lambda: False)
    elif not prepacking_available():
        pytest.skip("this torch has no prepacked oneDNN linears")
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 32, 96])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_is_linear(path: str, dtype: torch.dtype, rows: int, bias: bool) -> None:
    weight, x = torch.randn(24, 40, dtype=dtype) / 40**0.5, torch.randn(rows, 40, dtype=dtype)
    offset = torch.randn(24, dtype=dtype) if bias else None
    linear = PackedLinear(weight, offset)
    assert linear.kind == {"prepacked": "onednn", "plain": "plain"}[path]
    truth = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    close = TOLERANCES[dtype]
    out = linear(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), truth, **close)
    for name, function in ACTIVATIONS.items():
        torch.testing.assert_close(linear(x, name).double(), function(truth), **close)
    residual = torch.randn(rows, 24, dtype=dtype)
    before = residual.clone()
    first, second = linear.sum_with(x, residual)
    assert (second is None) == (path == "prepacked")
    total = first.double() if second is None else first.double() + second.double()
    torch.testing.assert_close(total, truth + residual.double(), **close)
    assert torch.equal(residual, before)


def test_packed_linear_is_a_snapshot(path: str) -> None:
    weight, bias, x = torch.randn(8, 16), torch.randn(8), torch.randn(32, 16)
    linear = PackedLinear(weight, bias)
    before = linear(x)
    weight.zero_()
    bias.zero_()
    assert torch.equal(linear(x), before)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_pickled_packed_linear_is_the_same_to_the_bit(path: str, bias: bool, dtype: torch.dtype) -> None:
    weight, offset, x = torch.randn(24, 40).to(dtype), torch.randn(24).to(dtype), torch.randn(33, 40).to(dtype)
    linear = PackedLinear(weight, offset if bias else None)
    again = pickle.loads(pickle.dumps(linear))
    assert again.kind == linear.kind == {"prepacked": "onednn", "plain": "plain"}[path]
    assert torch.equal(again(x), linear(x))
    assert torch.equal(again(x, "gelu"), linear(x, "gelu"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", PACKED_NATIVELY)
def test_packed_linear_on_own_kernels_is_linear(bias: bool, dtype: torch.dtype) -> None:
    weight, x = (torch.randn(64, 96) / 96**0.5).to(dtype), torch.randn(50, 96).to(dtype)
    offset, residual = torch.randn(64).to(dtype) if bias else None, torch.randn(50, 64).to(dtype)
    linear = PackedLinear(weight, offset)
    assert linear.kind == "packed"
    truth = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    torch.testing.assert_close(linear(x).double(), truth, **TOLERANCES[dtype])
    for name, function in ACTIVATIONS.items():
        torch.testing.assert_close(linear(x, name).double(), function(truth), **TOLERANCES[dtype])
    total, rest = linear.sum_with(x, residual)
    assert rest is None
    torch.testing.assert_close(total.double(), truth + residual.double(), **TOLERANCES[dtype])


def test_own_kernels_are_for_what_fits_them_and_not_for_the_reference() -> None:
    weight = torch.randn(64, 96)
    assert (PackedLinear(weight, None).kind == "packed") == linears_available(torch.float32)
    assert PackedLinear(weight, None, impl="reference").kind != "packed"
    assert PackedLinear(weight.half(), None).kind != "packed"
    assert PackedLinear(weight[:, :95], None).kind != "packed"


@pytest.mark.parametrize("dtype", PACKED_NATIVELY)
def test_an_explicit_native_linear_is_native_whatever_the_environment_says(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, x = PackedLinear(torch.randn(64, 96).to(dtype), None, impl="native"), torch.randn(3, 96).to(dtype)
    expected = linear(x)
    monkeypatch.setenv("RAGGED_EXIT_IMPL", "triton")  # which has no such op, and would raise
    assert torch.equal(linear(x), expected)
    assert torch.equal(linear.sum_with(x, torch.zeros(3, 64).to(dtype))[0], expected)


def test_packed_linear_takes_weights_that_are_views(path: str) -> None:
    weight, x = torch.randn(16, 8).T, torch.randn(32, 16)
    torch.testing.assert_close(PackedLinear(weight, None)(x), F.linear(x, weight), rtol=0, atol=1e-5)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, NotImplementedError])
@pytest.mark.parametrize("op", ["_reorder_linear_weight", "_linear_pointwise"])
def test_the_probe_notices_what_is_missing(error: type, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise error("not here")

    fake = missing if op == "_reorder_linear_weight" else SimpleNamespace(binary=missing)
    torch.ops.mkldnn._reorder_linear_weight  # noqa: B018  (resolved and cached, so that the patch can be undone)
    torch.ops.mkldnn._linear_pointwise  # noqa: B018
    monkeypatch.setattr(torch.ops.mkldnn, op, fake)
    assert prepacking_available.__wrapped__() is False


def test_the_probe_finds_wrong_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(binary=lambda x, other, *rest: x)
    torch.ops.mkldnn._linear_pointwise  # noqa: B018
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", fake)
    assert prepacking_available.__wrapped__() is False
