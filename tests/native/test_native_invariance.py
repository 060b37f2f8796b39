"""A row's bits depend on that row alone: not on its neighbours, its place, the number of rows or of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("ragged_exit._native", reason="the C++ extension is not built")

import native_cases

from ragged_exit.ops import native
from ragged_exit.ops.exit_step import packed_for
from ragged_exit.rules import DistanceEntropy, Entropy, ExitRule, LearnedUncertainty

ROWS = 4096
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def bits(value: Tensor) -> Tensor:
    return value.view(torch.int16 if value.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 40])
@pytest.mark.parametrize("layout", ["rows", "fastest"])
def test_exit_step(dtype: torch.dtype, classes: int, layout: str, threads: int) -> None:
    torch.manual_seed(0)
    width = 96
    head = native_cases.head(width, width, classes, dtype)
    if layout == "fastest":
        head = packed_for("native", head)
    cu_seqlens, _ = native_cases.plan([1] * ROWS)
    hidden = torch.randn(ROWS, width).to(dtype)
    rules: list[ExitRule] = [Entropy(0.5), LearnedUncertainty(0.5), DistanceEntropy(0.5)]
    for rule in rules:

        def step(rows: Tensor, rule: ExitRule = rule) -> tuple[Tensor, Tensor]:
            count = len(rows)
            result = native.exit_step(
                rows,
                None,
                cu_seqlens[: count + 1],
                torch.tensor([count, count], dtype=torch.int32),
                head.weights,
                None,
                None,
                torch.tensor([0.5]),
                rule.spec,
                False,
            )
            return bits(result.logits), bits(result.score)

        logits, score = step(hidden)
        for start, count in ((0, 1), (4095, 1), (1234, 1), (700, 13), (5, 14), (100, 15), (2000, 513)):
            some_logits, some_score = step(hidden[start : start + count])
            assert torch.equal(some_logits, logits[start : start + count])
            assert torch.equal(some_score, score[start : start + count])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(0)
    lengths = [*torch.randint(1, 80, (200,)).tolist(), 500]
    cu_seqlens, live = native_cases.plan(lengths)
    qkv = torch.randn(int(live[1]), 3, 2, 32).to(dtype)
    together = native.varlen_attention(*qkv.unbind(1), cu_seqlens, max(lengths), 0.2)
    for row in (0, 17, 123, 199, 200):
        start, end = cu_seqlens[row : row + 2].tolist()
        alone = native.varlen_attention(*qkv[start:end].unbind(1), *native_cases.plan([end - start])[:1], 500, 0.2)
        assert torch.equal(bits(alone), bits(together[start:end]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, ROWS, 100).to(dtype)
    x[1::2] += 100  # rows of little spread, whose mean is corrected
    weight, bias = torch.randn(2, 100).to(dtype)
    together = native.add_layer_norm(x, residual, weight, bias, 1e-5, "standard")
    for row in (0, 1, 1777, ROWS - 1):
        part = slice(row, row + 1)
        alone = native.add_layer_norm(x[part], residual[part], weight, bias, 1e-5, "standard")
        assert torch.equal(bits(alone), bits(together[part]))
