"""packed_layer against float64, and against the single ops to the bit.

Tolerance: error <= 2 x that of the same layer in plain PyTorch in that dtype.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_cases import seeds
from packed_cases import PACKED_KERNELS, PACKED_NATIVELY
from torch import Tensor

from ragged_exit.ops import (
    LayerNormWeights,
    PackedLayer,
    PackedWeights,
    add_layer_norm,
    linears_available,
    pack_linear,
    packed_layer,
    packed_linear,
    varlen_attention,
)
from ragged_exit.ops.reference import add_layer_norm as reference_norm
from ragged_exit.ops.reference import varlen_attention as reference_attention
from ragged_exit.testing import assert_error_budget, assert_same_values, seeded

EPS = 1e-6
Weights = list[tuple[Tensor, Tensor]]


def random_weights(width: int, inner: int, dtype: torch.dtype, seed: int) -> Weights:
    """Linears and norms in a PackedLayer's order, as (weight, bias)."""
    generator = seeded(seed)

    def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        return weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype)

    def norm() -> tuple[Tensor, Tensor]:
        weight, bias = torch.randn(2, width, generator=generator)
        return (1 + weight / 4).to(dtype), bias.to(dtype)

    return [
        linear(3 * width, width), linear(width, width), norm(), linear(inner, width), linear(width, inner), norm()
    ]  # fmt: skip


def packed(weights: Weights) -> PackedLayer:
    qkv, output, norm, up, down, last = weights
    return PackedLayer(
        pack_linear(*qkv),
        pack_linear(*output),
        LayerNormWeights(*norm),
        pack_linear(*up),
        pack_linear(*down),
        LayerNormWeights(*last),
    )


def plain(x: Tensor, bounds: Tensor, weights: Weights, heads: int, kind: str) -> Tensor:
    """The layer in PyTorch, in the dtype of ``x``."""
    qkv, output, norm, up, down, last = ([value.to(x.dtype) for value in pair] for pair in weights)
    q, k, v = F.linear(x, *qkv).view(len(x), 3, heads, -1).unbind(1)
    context = reference_attention(q, k, v, bounds, int(bounds.diff().max()), q.shape[2] ** -0.5).reshape(x.shape)
    x = reference_norm(F.linear(context, *output), x, *norm, EPS, kind)
    return reference_norm(F.linear(F.gelu(F.linear(x, *up)), *down), x, *last, EPS, kind)


def packed_rows(lengths: list[int], width: int, dtype: torch.dtype, seed: int, spare: int = 0) -> tuple[Tensor, Tensor]:
    """hidden [T + spare, H], NaN in what is spare, and cu_seqlens."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    x = torch.randn(int(bounds[-1]), width, generator=seeded(seed)).to(dtype)
    return F.pad(x, (0, 0, 0, spare), value=math.nan), bounds


@pytest.mark.parametrize(("kernel", "dtype"), PACKED_KERNELS)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    width=st.sampled_from((32, 64, 96)),
    inner=st.sampled_from((32, 96, 256)),
    heads=st.sampled_from((1, 2, 4)),
    kind=st.sampled_from(("standard", "uer")),
    threads=st.integers(1, 3),
    seed=seeds,
)
def test_packed_layer(kernel, lengths, width, inner, heads, kind, dtype, threads, seed):
    weights = random_weights(width, inner, dtype, seed)
    hidden, bounds = packed_rows(lengths, width, dtype, seed, spare=3)
    x = hidden[:-3].clone()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    packed_layer(hidden, bounds, packed(weights), heads, EPS, kind, impl=kernel)
    torch.set_num_threads(before)
    wide = [(weight.double(), bias.double()) for weight, bias in weights]
    oracle = plain(x.double(), bounds, wide, heads, kind)
    assert_error_budget(hidden[:-3], plain(x, bounds, weights, heads, kind), oracle, dtype)
    assert hidden[-3:].isnan().all()


def by_single_ops(x: Tensor, bounds: Tensor, layer: PackedLayer, heads: int) -> Tensor:
    q, k, v = packed_linear(x, layer.qkv).view(len(x), 3, heads, -1).unbind(1)
    context = varlen_attention(q, k, v, bounds, int(bounds.diff().max()), 1 / math.sqrt(q.shape[2]))
    x = add_layer_norm(
        packed_linear(context.view(x.shape), layer.attention_output, residual=x), None, *layer.attention_norm, EPS
    )
    inner = packed_linear(x, layer.feed_forward_up, activation="gelu")
    return add_layer_norm(packed_linear(inner, layer.feed_forward_down, residual=x), None, *layer.output_norm, EPS)


@pytest.mark.parametrize("dtype", PACKED_NATIVELY)
@pytest.mark.parametrize(("width", "inner"), [(32, 64), (64, 1056), (32, 1536)])
def test_the_bits_are_those_of_the_single_ops(width, inner, dtype):
    """Few tokens, whose kernels the threads share; many, of which each takes parts; inner activations in chunks."""
    layer = packed(random_weights(width, inner, dtype, 1))
    lengths = torch.randint(1, 90, (120,), generator=seeded(2)).tolist()  # some 5,400 tokens
    before = torch.get_num_threads()
    for rows in (1, 7, 40, 120):
        x, bounds = packed_rows(lengths[:rows], width, dtype, 3)
        expected = by_single_ops(x, bounds, layer, 2)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            hidden = x.clone()
            packed_layer(hidden, bounds, layer, 2, EPS)
            assert_same_values(hidden, expected)
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", PACKED_NATIVELY)
def test_rows_that_are_longer_than_a_part_and_rows_without_tokens(dtype):
    """One sequence may be a part alone, and leave others empty."""
    layer = packed(random_weights(32, 64, dtype, 4))
    for lengths in ([0, 3000, 0, 0], [2500, 1, 0, 2600, 0], [0, 0, 1, 4100]):
        hidden, bounds = packed_rows(lengths, 32, dtype, 5)
        expected = by_single_ops(hidden, bounds, layer, 1)
        packed_layer(hidden, bounds, layer, 1, EPS)
        assert_same_values(hidden, expected)


@pytest.mark.parametrize(("kernel", "dtype"), PACKED_KERNELS)
def test_nan_stays_in_its_row(kernel, dtype):
    layer = packed(random_weights(32, 64, dtype, 6))
    hidden, bounds = packed_rows([5, 9, 4], 32, dtype, 7)
    broken = hidden.clone()
    broken[6, 3] = math.nan
    for value in (hidden, broken):
        packed_layer(value, bounds, layer, 2, EPS, impl=kernel)
    assert broken[5:14].isnan().all()
    assert_same_values(broken[:5], hidden[:5])
    assert_same_values(broken[14:], hidden[14:])


@pytest.mark.parametrize(("kernel", "dtype"), PACKED_KERNELS)
def test_opcheck(kernel, dtype):
    layer = packed(random_weights(32, 64, dtype, 8))
    hidden, bounds = packed_rows([3, 4], 32, dtype, 9)
    op = torch.ops.ragged_exit.packed_layer
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_autograd_registration")
    arguments = (hidden, torch.empty(2, 32), bounds, layer.tensors, 2, EPS, "standard", kernel)
    assert torch.library.opcheck(op, arguments, test_utils=checks) == dict.fromkeys(checks, "SUCCESS")


def test_a_layer_of_parts_that_do_not_fit_cannot_be():
    weights = random_weights(32, 64, torch.float32, 10)
    layer = packed(weights)

    def refused(match: str, **parts: PackedWeights | LayerNormWeights) -> None:
        with pytest.raises(ValueError, match=match):
            replace(layer, **parts)

    refused(r"qkv: expected .*\[96, 32\], got .*\[32, 32\]", qkv=layer.attention_output)
    half = pack_linear(weights[0][0].bfloat16(), None)
    refused(r"attention_output: expected torch\.bfloat16 .* got torch\.float32", qkv=half)
    refused(
        r"output_norm: expected .*\[32\], got .*\[31\]", output_norm=LayerNormWeights(torch.ones(32), torch.ones(31))
    )
    wide = LayerNormWeights(torch.ones(32).double(), torch.ones(32))
    refused(r"attention_norm: expected torch\.float32 \[32\], got torch\.float64", attention_norm=wide)
    odd = layer.feed_forward_up._replace(bias=torch.zeros(65))
    refused(r"feed_forward_up: expected a float32 bias \[64\], got .*\[65\]", feed_forward_up=odd)


def test_errors_name_the_argument(monkeypatch):
    layer = packed(random_weights(32, 64, torch.float32, 10))
    hidden, bounds = packed_rows([3, 4], 32, torch.float32, 11)

    def refused(error: type[Exception], match: str, hidden=hidden, bounds=bounds, heads=2, kind="standard"):
        with pytest.raises(error, match=match):
            packed_layer(hidden, bounds, layer, heads, EPS, kind)

    for heads in (3, 0, -2):
        refused(ValueError, f"num_heads: expected a divisor of 32, got {heads}", heads=heads)
    refused(ValueError, "kind: expected one of", kind="rms")
    refused(ValueError, "hidden: expected a CPU tensor", hidden=hidden.to("meta"))
    refused(ValueError, r"hidden: expected contiguous \[T, 32\]", hidden=hidden[:, :31])
    refused(ValueError, r"hidden: expected contiguous \[T, 32\]", hidden=torch.empty(7, 64)[:, :32])
    refused(TypeError, r"hidden: expected torch\.float32 as the packed weights", hidden=hidden.bfloat16())
    for bad in (torch.empty(3, 32), torch.empty(2, 32).double(), torch.empty(2, 64)[:, :32]):
        with pytest.raises(ValueError, match=r"means: expected contiguous float32 \[2, 32\]"):
            packed_layer(hidden, bounds, layer, 2, EPS, means=bad)
    refused(ValueError, r"cu_seqlens: expected int32 \[B \+ 1\]", bounds=bounds.long())
    refused(ValueError, r"cu_seqlens: expected int32 \[B \+ 1\] .* got torch\.int32 \[0\]", bounds=bounds[:0])
    monkeypatch.setattr(sys.modules["ragged_exit.ops.packed_linear"], "linears_available", lambda dtype: False)
    with pytest.raises(RuntimeError, match=r"no kernels for torch\.float32 linears|not built"):
        packed_layer(hidden, bounds, layer, 2, EPS, impl="native")


@pytest.mark.parametrize(("kernel", "dtype"), PACKED_KERNELS)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=40).filter(any),
    width=st.sampled_from((32, 64, 416)),
    threads=st.integers(1, 3),
    seed=seeds,
)
def test_the_means_are_those_of_what_leaves_the_layer(kernel, lengths, width, dtype, threads, seed):
    layer = packed(random_weights(width, 32, dtype, seed))
    hidden, bounds = packed_rows(lengths, width, dtype, seed, spare=3)
    without, means = hidden.clone(), torch.full((len(lengths), width), math.nan)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    packed_layer(without, bounds, layer, 2, EPS, impl=kernel)
    packed_layer(hidden, bounds, layer, 2, EPS, means=means, impl=kernel)
    torch.set_num_threads(before)
    assert_same_values(hidden, without)
    for mean, row in zip(means, hidden[:-3].split(lengths), strict=True):
        expected = row.double().mean(0) if len(row) else torch.zeros(width)
        # sums of up to 300 numbers of size 1, one after the other
        torch.testing.assert_close(mean.double(), expected.double(), rtol=0, atol=1e-5)


@pytest.mark.skipif(not linears_available(torch.float32), reason="no kernels for float32 linears")
def test_row_ends_past_the_buffer_are_refused():
    layer = packed(random_weights(32, 64, torch.float32, 12))
    hidden, bounds = packed_rows([3, 4], 32, torch.float32, 13)
    for bad in (bounds + 1, torch.tensor([0, 5, 4], dtype=torch.int32), torch.tensor([0, 8], dtype=torch.int32)):
        with pytest.raises(ValueError, match="cu_seqlens"):
            packed_layer(hidden, bad, layer, 2, EPS, impl="native")
