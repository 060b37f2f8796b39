"""add_layer_norm against float64.

Tolerance: error <= 2 x that of plain PyTorch (F.layer_norm, or the UER formula) in the same dtype.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_cases import INTERPRETED, seeds
from torch import Tensor

from ragged_exit.ops import add_layer_norm
from ragged_exit.testing import assert_error_budget, assert_same_values, seeded

HALF = True
KINDS = ("standard", "uer")


def plain(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, kind: str) -> Tensor:
    """PyTorch as a model would write it, in the dtype of the inputs."""
    total = x if residual is None else x + residual
    if kind == "standard":
        return F.layer_norm(total, total.shape[1:], weight, bias, eps)
    return weight * (total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + eps) + bias


def oracle(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, kind: str) -> Tensor:
    """Float64, from the definitions."""
    x, weight, bias = (value.cpu().double() for value in (x, weight, bias))
    total = x if residual is None else x + residual.cpu().double()
    width = total.shape[1]
    centred = total - total.sum(1, keepdim=True) / width
    squares = (centred**2).sum(1, keepdim=True)
    if kind == "standard":
        return weight * centred / (squares / width + eps).sqrt() + bias
    return weight * centred / ((squares / (width - 1)).sqrt() + eps) + bias


def inputs(
    tokens: int, width: int, seed: int, dtype: torch.dtype, device: str, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = seeded(seed)
    x, residual = torch.randn(2, tokens, width, generator=generator) * 2 + offset
    weight = 1 + 0.3 * torch.randn(width, generator=generator)
    bias = 0.3 * torch.randn(width, generator=generator)
    x, residual, weight, bias = (value.to(dtype).to(device) for value in (x, residual, weight, bias))
    return x, residual, weight, bias


@given(
    tokens=st.integers(1, 20 if INTERPRETED else 200),
    width=st.one_of(st.integers(2, 300), st.sampled_from((384, 768, 1024))),
    residual=st.booleans(),
    kind=st.sampled_from(KINDS),
    eps=st.sampled_from((1e-12, 1e-6, 1e-5)),
    seed=seeds,
)
def test_layer_norm(impl, dtype, device, tokens, width, residual, kind, eps, seed):
    x, other, weight, bias = inputs(tokens, width, seed, dtype, device)
    other = other if residual else None
    arguments = (x, other, weight, bias, eps, kind)
    out = add_layer_norm(*arguments, impl=impl)
    assert out.shape == x.shape and out.dtype == dtype
    # of few values by luck plain PyTorch has no error at all: the widest rows of a two-element norm are +-1
    assert_error_budget(out, plain(*arguments), oracle(*arguments), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_far_from_zero(impl, device, kind):
    """A mean 1,000 times the deviation: two passes are needed, E[x^2] - E[x]^2 would lose the variance."""
    x, residual, weight, bias = inputs(5, 100, 1, torch.float32, device, offset=1000.0)
    arguments = (x, residual, weight, bias, 1e-12, kind)
    assert_error_budget(add_layer_norm(*arguments, impl=impl), plain(*arguments), oracle(*arguments), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [7, 384, 768])
def test_a_row_of_one_value_is_the_bias(impl, device, width, kind):
    """Its mean, rounded, is another value: nothing may be left of that difference, which eps 1e-12 would enlarge."""
    if impl == "reference" and kind == "uer":
        pytest.skip("the reference is UER's formula as published: the mean's rounding over a deviation of 0")
    x = torch.tensor([0.1, -0.3, 1e-5, 12345.678, -3e6], device=device)[:, None].expand(-1, width)
    weight, bias = torch.randn(2, width, generator=seeded(4)).to(device)
    for residual in (None, -3 * x):
        out = add_layer_norm(x, residual, weight, bias, 1e-12, kind, impl=impl)
        torch.testing.assert_close(out, bias.expand_as(out), rtol=0, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_where_eps_stands(impl, device, eps):
    """standard: inside the root of the biased variance; uer: beside the unbiased deviation."""
    x = torch.tensor([[1.0, -1.0]], device=device)
    one, zero = torch.ones(2, device=device), torch.zeros(2, device=device)
    standard = add_layer_norm(x, None, one, zero, eps, impl=impl)
    uer = add_layer_norm(x, None, one, zero, eps, "uer", impl=impl)
    assert float(standard[0, 0]) == pytest.approx(1 / math.sqrt(1 + eps), rel=1e-6)
    assert float(uer[0, 0]) == pytest.approx(1 / (math.sqrt(2) + eps), rel=1e-6)
    constant = add_layer_norm(torch.full((1, 2), 3.0, device=device), None, one, one, eps, impl=impl)
    assert constant.tolist() == [[1.0, 1.0]]  # no deviation: the bias alone


def test_low_precision_adds_in_fp32(impl, dtype, device):
    """x + residual is not rounded before the statistics: 256 + 1/2 would lose the half in bfloat16."""
    x = torch.full((1, 4), 256.0, dtype=dtype, device=device)
    residual = torch.tensor([[0.5, -0.5, 0.25, -0.25]], dtype=dtype, device=device)
    one, zero = torch.ones(4, dtype=dtype, device=device), torch.zeros(4, dtype=dtype, device=device)
    out = add_layer_norm(x, residual, one, zero, 1e-12, impl=impl)
    expected = oracle(x, residual, one, zero, 1e-12, "standard")
    torch.testing.assert_close(out.cpu().double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_values_stay_in_their_row(impl, dtype, device, kind):
    x, residual, weight, bias = inputs(6, 37, 2, dtype, device)
    before = add_layer_norm(x, residual, weight, bias, 1e-6, kind, impl=impl)
    broken = x.clone()
    broken[2, 5], broken[4, 7] = math.nan, math.inf
    after = add_layer_norm(broken, residual, weight, bias, 1e-6, kind, impl=impl)
    assert after[2].isnan().all() and after[4].isnan().any()
    keep = [0, 1, 3, 5]
    assert_same_values(after[keep], before[keep])


@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_give_finite_rows(impl, dtype, device, kind):
    """Tokens past live are zero; what comes out of them must not poison the next linear."""
    x, _, weight, bias = inputs(3, 16, 3, dtype, device)
    out = add_layer_norm(torch.zeros_like(x), None, weight, bias, 1e-12, kind, impl=impl)
    assert_same_values(out, bias.expand(3, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_odd_memory(impl, dtype, device, kind):
    x, residual, weight, bias = inputs(7, 29, 4, dtype, device)
    expected = add_layer_norm(x, residual, weight, bias, 1e-6, kind, impl=impl)
    wide = torch.full((7, 40), math.nan, dtype=dtype, device=device)
    wide[:, 5:34] = x
    shifted = torch.empty(7 * 29 + 1, dtype=dtype, device=device)
    shifted[1:] = x.reshape(-1)
    twice = weight.repeat_interleave(2)[::2]
    for some in (wide[:, 5:34], x.T.contiguous().T, shifted[1:].view(7, 29)):
        actual = add_layer_norm(some, residual.T.contiguous().T, twice, bias, 1e-6, kind, impl=impl)
        if impl == "reference":  # a strided mean adds in another order
            torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        else:
            assert_same_values(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_invariance(impl, dtype, device, kind):
    if impl == "reference":
        pytest.skip("the reference makes no such promise")
    x, residual, weight, bias = inputs(33, 45, 5, dtype, device)
    together = add_layer_norm(x, residual, weight, bias, 1e-6, kind, impl=impl)
    for rows in ([7], [32, 0, 5], list(range(32, -1, -1))):
        alone = add_layer_norm(x[rows], residual[rows], weight, bias, 1e-6, kind, impl=impl)
        assert_same_values(alone, together[rows])


def test_inputs_are_left_alone(impl, device):
    values = inputs(4, 9, 6, torch.float32, device)
    copies = [value.clone() for value in values]
    out = add_layer_norm(*values, 1e-6, impl=impl)
    for value, copy in zip(values, copies, strict=True):
        assert_same_values(value, copy)
        assert out.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_out(impl, dtype, device, kind):
    """A slice of a larger buffer, x itself or the residual itself: the same bits, and nothing beside it is touched."""
    x, residual, weight, bias = inputs(5, 77, 8, dtype, device)
    expected = add_layer_norm(x, residual, weight, bias, 1e-6, kind, impl=impl)
    buffer = torch.full((9, 77), 7.0, dtype=dtype, device=device)
    buffer[2:7] = math.nan
    for place in (buffer[2:7], x.clone(), residual.clone()):
        given_x, given_residual = (place if torch.equal(place, value) else value for value in (x, residual))
        out = add_layer_norm(given_x, given_residual, weight, bias, 1e-6, kind, out=place, impl=impl)
        assert out is place
        assert_same_values(place, expected)
    assert (buffer[:2] == 7).all() and (buffer[7:] == 7).all()


def test_errors_name_the_argument(impl, device):
    x, residual, weight, bias = inputs(4, 9, 7, torch.float32, device)
    with pytest.raises(ValueError, match=r"x: expected \[T, H\], got \[9\]"):
        add_layer_norm(x[0], None, weight, bias, 1e-6, impl=impl)
    with pytest.raises(ValueError, match=r"kind: expected one of .* got 'rms'"):
        add_layer_norm(x, None, weight, bias, 1e-6, "rms", impl=impl)
    with pytest.raises(ValueError, match="residual: expected"):
        add_layer_norm(x, residual[:3], weight, bias, 1e-6, impl=impl)
    with pytest.raises(ValueError, match="weight: expected"):
        add_layer_norm(x, residual, weight[:8], bias, 1e-6, impl=impl)
    with pytest.raises(ValueError, match="bias: expected"):
        add_layer_norm(x, residual, weight, bias.to("meta"), 1e-6, impl=impl)
    with pytest.raises(TypeError, match="weight: expected the dtype of x"):
        add_layer_norm(x, residual, weight.double(), bias, 1e-6, impl=impl)
    with pytest.raises(ValueError, match=r"out: expected \[4, 9\]"):
        add_layer_norm(x, residual, weight, bias, 1e-6, out=x[:3], impl=impl)
    with pytest.raises(TypeError, match="out: expected the dtype of x"):
        add_layer_norm(x, residual, weight, bias, 1e-6, out=x.double(), impl=impl)
    with pytest.raises(ValueError, match="out: expected a contiguous tensor"):
        add_layer_norm(x, residual, weight, bias, 1e-6, out=x.T.contiguous().T, impl=impl)
