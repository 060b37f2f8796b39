"""Layouts that the kernels read in place, numbers that must not spread, and plans that they refuse."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("ragged_exit._native", reason="the C++ extension is not built")

import native_cases

from ragged_exit.ops import native, pack_linear
from ragged_exit.rules import Entropy

DTYPES = [torch.float32, torch.bfloat16]


def misaligned(*shape: int, dtype: torch.dtype, row_stride: int | None = None) -> torch.Tensor:
    """Random numbers one element past an aligned address, rows ``row_stride`` apart."""
    *front, width = shape
    stride = row_stride or width
    return torch.randn(math.prod(front) * stride + 1).to(dtype)[1:].view(*front, stride)[..., :width]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_misaligned_inputs(dtype: torch.dtype) -> None:
    cu_seqlens, live = native_cases.plan([4, 1, 30])
    q, k, v = (misaligned(35, 3, 20, dtype=dtype, row_stride=23) for _ in range(3))
    exact = native.varlen_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, 30, 0.3)
    assert torch.equal(native.varlen_attention(q, k, v, cu_seqlens, 30, 0.3), exact)
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]  # the last dimension not contiguous
    assert torch.equal(native.varlen_attention(*turned, cu_seqlens, 30, 0.3), exact)

    x, residual = (misaligned(9, 50, dtype=dtype, row_stride=53) for _ in range(2))
    weight, bias = (misaligned(50, dtype=dtype) for _ in range(2))
    copies = [value.contiguous().clone() for value in (x, residual, weight, bias)]
    expected = native.add_layer_norm(*copies, 1e-5, "uer")
    assert torch.equal(native.add_layer_norm(x, residual, weight, bias, 1e-5, "uer"), expected)

    head = native_cases.head(50, 33, 3, dtype)
    hidden = misaligned(35, 50, dtype=dtype, row_stride=64)
    arguments = (head.weights, None, None, torch.tensor([0.5]), Entropy(0.5).spec, False)
    strided = native.exit_step(hidden, None, cu_seqlens, live, *arguments)
    assert torch.equal(strided.logits, native.exit_step(hidden.contiguous(), None, cu_seqlens, live, *arguments).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    cu_seqlens, live = native_cases.plan([2])
    x = torch.zeros(2, 4, dtype=dtype)
    calls = (
        lambda: native.varlen_attention(*[x[:, None]] * 3, cu_seqlens, 2, 1.0),
        lambda: native.add_layer_norm(x, None, x[0], x[0], 1e-5, "standard"),
        lambda: native.exit_decide(
            x[:1], None, cu_seqlens, live, None, None, torch.tensor([0.5]), Entropy(0.5).spec, False
        ),
    )
    for call in calls:
        with pytest.raises(TypeError, match=f"native: expected float32 or bfloat16, got {dtype}"):
            call()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_stays_in_its_sequence(dtype: torch.dtype, poison: float) -> None:
    torch.manual_seed(0)
    cu_seqlens, live = native_cases.plan([5, 20, 70, 3])
    qkv = torch.randn(100, 3, 2, 16).to(dtype)
    clean = native.varlen_attention(*qkv.unbind(1), cu_seqlens, 70, 0.25)
    qkv[5:25] = poison
    qkv[98:] = poison  # past the last sequence
    dirty = native.varlen_attention(*qkv.unbind(1), cu_seqlens, 70, 0.25)
    assert torch.equal(dirty[:5], clean[:5])
    assert torch.equal(dirty[25:98], clean[25:98])
    assert not dirty[98:].any()

    head = native_cases.head(16, 40, 3, dtype)
    hidden = torch.randn(98, 16).to(dtype)
    arguments = (head.weights, None, None, torch.tensor([9.0]), Entropy(9.0).spec, False)
    clean_step = native.exit_step(hidden, None, cu_seqlens, live, *arguments)
    hidden[5] = poison
    step = native.exit_step(hidden, None, cu_seqlens, live, *arguments)
    others = torch.tensor([0, 2, 3])
    assert torch.equal(step.logits[others], clean_step.logits[others])
    if math.isnan(poison):
        assert step.score[1].isnan() and not step.exits[1]


def test_plans_that_point_outside_are_refused() -> None:
    x = torch.zeros(4, 1, 8)
    for cu_seqlens in ([0, 5], [0, 3, 2], [1, 4]):
        with pytest.raises(ValueError, match="cu_seqlens: expected to rise from 0 to at most 4"):
            native.varlen_attention(x, x, x, torch.tensor(cu_seqlens, dtype=torch.int32), 5, 1.0)
    cu_seqlens, _ = native_cases.plan([2, 2])
    survivors = torch.tensor([7, -1], dtype=torch.int32)
    new_cu_seqlens = torch.tensor([0, 2, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="survivors: entry 0 does not fit the plan"):
        new_live = torch.tensor([1, 2], dtype=torch.int32)
        native.compact([x[:2].clone()], [], [x], [], survivors, cu_seqlens, new_cu_seqlens, new_live)


def test_a_head_that_does_not_fit_is_refused() -> None:
    cu_seqlens, live = native_cases.plan([1, 2])
    head = native_cases.head(16, 40, 3, torch.float32)
    arguments = (None, None, torch.tensor([0.5]), Entropy(0.5).spec, False)
    with pytest.raises(TypeError, match="head: expected weights in the dtype of hidden"):
        native.exit_step(torch.zeros(3, 16, dtype=torch.bfloat16), None, cu_seqlens, live, head.weights, *arguments)
    head = native_cases.head(32, 40, 3, torch.float32)
    for packed in (  # panels are of 32 outputs: one would leave 8 of 40 unset
        pack_linear(torch.zeros(32, 32), None).panels,
        pack_linear(torch.zeros(64, 32), None).panels.double(),
        torch.zeros(40, 32),
    ):
        with pytest.raises(ValueError, match="packed_pooler: expected what packed_for makes"):
            native.exit_step(
                torch.zeros(3, 32), None, cu_seqlens, live, head.weights._replace(packed_pooler=packed), *arguments
            )
