"""How long linears take on their own: the rate that prepacked linears reach on this machine now."""

from __future__ import annotations

import statistics
import time

import torch
from transformers import PretrainedConfig

from ragged_exit.bench.workload import layer_sizes
from ragged_exit.linears import PackedLinear


def linear_seconds(config: PretrainedConfig, dtype: torch.dtype, *, tokens: int = 2048) -> float:
    """Seconds for the four linears of one layer and one token, at the rate measured for ``tokens`` tokens."""
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
    return statistics.median(times[2:]) / tokens
