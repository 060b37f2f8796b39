"""How long the executed linears alone would take at the rate that prepacked linears reach on this machine now."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ragged_exit.bench.workload import layer_sizes
from ragged_exit.linears import PackedLinear


def linear_seconds(
    config: PretrainedConfig, lengths: Sequence[int], executed_layers: Tensor, dtype: torch.dtype, *, tokens: int = 2048
) -> float:
    """Seconds for the four linears of every executed layer of every row, at the rate measured for ``tokens`` tokens."""
    hidden, inner = layer_sizes(config)
    shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)]
    linears = [PackedLinear(torch.randn(n, k, dtype=dtype), torch.zeros(n, dtype=dtype)) for k, n in shapes]
    inputs = [torch.randn(tokens, k, dtype=dtype) for k, _ in shapes]
    times = []
    for _ in range(15):
        start = time.perf_counter()
        for linear, x in zip(linears, inputs, strict=True):
            linear(x)
        times.append(time.perf_counter() - start)
    row_layers = float((torch.tensor(lengths, dtype=torch.float64) * executed_layers).sum())
    return statistics.median(times[2:]) / tokens * row_layers
