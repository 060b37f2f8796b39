"""Inputs that the native tests share, and the comparison of every op with the float64 reference."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ragged_exit import _native
from ragged_exit.heads import MlpHead
from ragged_exit.ops import (
    LayerNormWeights,
    PackedLayer,
    linears_available,
    native,
    pack_linear,
    packed_layer,
    packed_linear,
    reference,
)
from ragged_exit.ops.reference.packed_linear import ACTIVATIONS
from ragged_exit.rules import DistanceEntropy, Energy, Entropy, MaxProb, Patience
from ragged_exit.testing import assert_error_budget, assert_same_values

# Units in the last place; measured over all instruction sets: 1.9, 1.6 and 1.4.
UNITS = {"exp": 2.5, "exp2": 2.0, "tanh": 2.0}
RANGES = {"exp": (-104.0, 89.0), "exp2": (-150.0, 128.0), "tanh": (-12.0, 12.0)}


def evaluate(function: str, x: Tensor) -> Tensor:
    """A function of csrc/math.inl.h on fp32 ``[n]``."""
    y = torch.empty_like(x)
    _native.elementwise(function, x.data_ptr(), y.data_ptr(), len(x))
    return y


def check_accuracy(function: str) -> None:
    """The function against float64 over its whole range, subnormal and infinite results included."""
    low, high = RANGES[function]
    whole, middle, tiny = (
        torch.linspace(low, high, 1_000_003),
        torch.linspace(-1, 1, 200_001),
        torch.logspace(-38, 0, 999),
    )
    x = torch.cat([whole, middle, tiny])
    expected, actual = getattr(torch, function)(x.double()), evaluate(function, x)
    finite = expected.float().isfinite()
    unit = torch.from_numpy(np.spacing(expected[finite].float().abs().numpy())).double()
    error = (actual[finite].double() - expected[finite]).abs() / unit
    assert error.max() <= UNITS[function], f"{function}: {error.max():.2f} units at {x[finite][error.argmax()]}"
    assert torch.equal(actual[~finite], expected[~finite].float())


def plan(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """cu_seqlens and live for rows of these lengths."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return cu_seqlens, torch.tensor([len(lengths), int(cu_seqlens[-1])], dtype=torch.int32)


def head(width: int, pooled: int, classes: int, dtype: torch.dtype, projected: int = 8) -> MlpHead:
    """A head with everything that a rule can ask for."""
    generator = torch.Generator().manual_seed(width + classes)

    def new(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    return MlpHead(
        classifier_weight=new(classes, pooled),
        classifier_bias=new(classes),
        pooler_weight=new(pooled, width),
        pooler_bias=new(pooled),
        uncertainty_weight=new(pooled),
        uncertainty_bias=new(1),
        prototype_weight=new(projected, width),
        prototype_bias=new(projected),
        prototypes=new(classes, projected),
    )


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def check_all_ops(dtype: torch.dtype) -> None:
    """Every op on small awkward shapes against the reference in float64."""
    torch.manual_seed(0)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for lengths, heads, dim in (([1, 3, 17, 60], 3, 32), ([5, 200, 64], 2, 20), ([33], 1, 64), ([2, 70], 2, 7)):
        cu_seqlens, live = plan(lengths)
        qkv = torch.randn(int(live[1]) + 3, 3, heads, dim).to(dtype)
        arguments = (cu_seqlens, max(lengths), dim**-0.5)
        actual = native.varlen_attention(*qkv.unbind(1), *arguments)
        close(actual, reference.varlen_attention(*qkv.double().unbind(1), *arguments), tolerance)
    for tokens, width in ((1, 1), (5, 7), (9, 48), (3, 384), (2, 771)):
        x, residual, weight, bias = (
            torch.randn(*shape).to(dtype) for shape in ((tokens, width), (tokens, width), (width,), (width,))
        )
        for kind in ("standard", "uer"):
            for second in (residual, None):
                wide = [None if value is None else value.double() for value in (x, second, weight, bias)]
                actual = native.add_layer_norm(x, second, weight, bias, 1e-5, kind)
                close(actual, reference.add_layer_norm(*wide, 1e-5, kind), tolerance)
    for tokens, inputs, outputs in ((1, 32, 32), (7, 64, 96), (13, 416, 160), (40, 1536, 64)):
        if not linears_available(dtype):  # not with the baseline, and bfloat16 not with AVX2
            break
        x, weight, bias, residual = (
            torch.randn(*shape).to(dtype)
            for shape in ((tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs))
        )
        weights, wide = pack_linear(weight, bias), F.linear(x.double(), weight.double(), bias.double())
        scale = inputs**0.5
        for activation, function in ACTIVATIONS.items():
            close(native.packed_linear(x, *weights, None, activation) / scale, function(wide) / scale, tolerance)
        close(native.packed_linear(x, *weights, residual, "") / scale, (wide + residual) / scale, tolerance)
    for width, pooled, classes, rows in ((32, 40, 2, 33), (50, 33, 3, 1), (19, 7, 40, 20)):
        cu_seqlens, live = plan([1 + i % 4 for i in range(rows)])
        hidden = torch.randn(int(live[1]), width).to(dtype)
        threshold, head_ = torch.tensor([0.5]), head(width, pooled, classes, dtype)
        wide_head = head_.to(torch.float64, torch.device("cpu"))
        state = (torch.zeros(rows, dtype=torch.int32), torch.zeros(rows))
        rules = [Entropy(0.5, dialect=dialect) for dialect in ("exact", "hf", "castorini", "categorical", "normalised")]
        for rule in (*rules, MaxProb(0.5), Energy(0.5), DistanceEntropy(0.5), Patience(1)):
            counted = state if isinstance(rule, Patience) else (None, None)
            arguments = (*counted, threshold, rule.spec, False)
            actual = native.exit_step(hidden, None, cu_seqlens, live, head_.weights, *arguments)
            expected = reference.exit_step(hidden.double(), None, cu_seqlens, live, wide_head.weights, *arguments)
            close(actual.logits, expected.logits, tolerance)
            close(actual.score, expected.score, 10 * tolerance)
            kept = actual.survivors[: actual.live[0]].long()
            assert kept.tolist() == (~actual.exits).nonzero()[:, 0].tolist()
            gather = ([hidden], [], actual.survivors, cu_seqlens, actual.cu_seqlens, actual.live)
            moved, wanted = torch.ones_like(hidden), torch.zeros_like(hidden)
            native.compact([moved], [], *gather)
            reference.compact([wanted], [], *gather)
            assert torch.equal(moved, wanted)


def check_without_tokens(dtype: torch.dtype) -> None:
    """Linears, attention and a layer of no tokens, attention without heads or dims: nothing is divided by nothing."""
    nobody = torch.zeros(1, dtype=torch.int32)
    for tokens, heads, dim in ((0, 2, 64), (3, 0, 64), (3, 2, 0)):
        q = torch.empty(tokens, heads, dim, dtype=dtype)
        for cu_seqlens in (nobody, torch.tensor([0, tokens], dtype=torch.int32)):
            assert native.varlen_attention(q, q, q, cu_seqlens, 3, 0.2).shape == q.shape
    if not linears_available(dtype):
        return
    added = torch.empty(0, 96, dtype=dtype)
    for activation, residual in (*((name, None) for name in ACTIVATIONS), ("", added)):
        weights = pack_linear(torch.randn(96, 64).to(dtype), None)
        x = torch.empty(0, 64, dtype=dtype)
        out = packed_linear(x, weights, activation=activation, residual=residual, impl="native")
        assert out.shape == (0, 96) and out.dtype == dtype
    norm = LayerNormWeights(*torch.ones(2, 64, dtype=dtype))
    qkv, output, up, down = (
        pack_linear(torch.randn(*shape).to(dtype), None) for shape in ((192, 64), (64, 64), (96, 64), (64, 96))
    )
    layer = PackedLayer(qkv, output, norm, up, down, norm)
    for rows in (0, 1, 3):
        cu_seqlens, means = torch.zeros(rows + 1, dtype=torch.int32), torch.full((rows, 64), torch.nan)
        packed_layer(torch.empty(0, 64, dtype=dtype), cu_seqlens, layer, 2, 1e-5, means=means, impl="native")
        assert not means.any()


def check_rows_of_little_spread(dtype: torch.dtype) -> None:
    """LayerNorms of rows whose mean is large beside the deviation; a constant row gives the bias, exactly."""
    generator, eps = torch.Generator().manual_seed(0), 1e-12  # BERT's
    for width in (1, 7, 32, 384, 768):
        weight, bias = torch.randn(2, width, generator=generator).to(dtype)
        for kind in ("standard", "uer"):
            x = torch.tensor([0.1, -0.3, 1e-5, 12345.678, -3e6, 1e30]).to(dtype)[:, None].expand(-1, width)
            expected = torch.full_like(bias, torch.nan) if kind == "uer" and width == 1 else bias  # 0 / 0
            for residual in (None, -3 * x):
                assert_same_values(native.add_layer_norm(x, residual, weight, bias, eps, kind), expected.expand_as(x))
            if width == 1:
                continue
            ids, out = torch.zeros(3, dtype=torch.int64), torch.full((3, width), torch.nan, dtype=dtype)
            native.embed_layer_norm(out, ids, ids, None, x[:1], x[3:4], x[1:2], weight, bias, eps, kind)
            assert_same_values(out, bias.expand_as(out))
            for mean in (0.1, -12345.678, 3e6):
                for spread in (1e-7, 1e-6, 1e-4, 1e-2, 1 / 17, 1 / 15):
                    near = (mean * (1 + spread * torch.randn(20, width, generator=generator))).to(dtype)
                    wide = [value.double() for value in (near, weight, bias)]
                    oracle = reference.add_layer_norm(wide[0], None, *wide[1:], eps, kind)
                    plain = reference.add_layer_norm(near, None, weight, bias, eps, kind)
                    assert_error_budget(
                        native.add_layer_norm(near, None, weight, bias, eps, kind), plain, oracle, dtype
                    )
    if not linears_available(dtype):
        return
    numbers = torch.tensor([0.1, 12345.678, -0.3, 0.7]).to(dtype)[:, None].expand(-1, 64)
    qkv, output, up, down = (
        pack_linear(torch.zeros(*shape, dtype=dtype), bias)
        for shape, bias in (((192, 64), None), ((64, 64), numbers[1]), ((64, 64), None), ((64, 64), numbers[3]))
    )
    first = LayerNormWeights(torch.ones(64, dtype=dtype), numbers[2])
    last = LayerNormWeights(*torch.randn(2, 64, generator=generator).to(dtype))
    hidden = numbers[:1].repeat(9, 1)
    packed_layer(hidden, plan([4, 5])[0], PackedLayer(qkv, output, first, up, down, last), 2, eps, impl="native")
    assert_same_values(hidden, last.bias.expand_as(hidden))
