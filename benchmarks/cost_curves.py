"""Time and memory of `stream` against the number of sequences, their length, the token budget, depth and threads.

python benchmarks/cost_curves.py [--shape base|small|tiny] [--dtype fp32|bf16] [--curve sequences --curve length ...]
                                 [--largest N] [--threads N] [--json F] [--plot F]

Random weights. Memory is the process's peak over what it held before the first sequence was read (Linux).
`tiny` has two layers of hidden size 64: for a million sequences in minutes.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ragged_exit.accelerate import AcceleratedModel, accelerate
from ragged_exit.bench.environment import environment, write_result
from ragged_exit.bench.options import Shape
from ragged_exit.bench.synthetic import random_deebert
from ragged_exit.calibration.exit_table import exit_table
from ragged_exit.calibration.threshold import threshold_for_layers
from ragged_exit.cli import DType
from ragged_exit.integrations.scorer import DTYPES
from ragged_exit.models.deebert import DeeBert

CURVES = ("sequences", "length", "budget", "depth", "threads")
SEED = 20
MEAN_LENGTH = 24
ROWS = 2_000  # where the number of sequences is not what varies
BUDGET = 4096
SPEEDUP = 2.0


def main(
    shape: Shape = "small",
    curve: Annotated[list[str] | None, typer.Option(help=f"any of {', '.join(CURVES)} (default: all)")] = None,
    largest: Annotated[int, typer.Option(min=1_000, help="most sequences: a power of ten")] = 10_000,
    dtype: DType = DType.fp32,
    threads: int = 2,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    if unknown := set(curve or ()) - set(CURVES):
        raise typer.BadParameter(f"--curve: expected any of {', '.join(CURVES)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(threads)
    precision = DTYPES[dtype]
    console = Console()
    model = random_deebert(shape, SEED)
    measure = functools.partial(_point, model, precision)
    curves: dict[str, Callable[[], list[dict[str, float]]]] = {
        "sequences": lambda: [measure(n, n) for n in _powers(largest)],
        "length": lambda: [measure(x, ROWS // (x // 8), length=x) for x in (8, 16, 32, 64, 128, 256)],
        "budget": lambda: [measure(x, ROWS, budget=x) for x in (256, 1024, 4096, 16384)],
        "depth": lambda: [measure(x, ROWS, speedup=x) for x in (1.0, 1.5, 2.0, 3.0, 4.0) if x <= _layers(model)],
        "threads": lambda: [_with_threads(x, measure) for x in range(1, threads + 1)],
    }
    found = {}
    for name in curve or CURVES:
        found[name] = curves[name]()
        table = Table(name, "sequences/s", "seconds", "memory, MB", title=f"{shape}, {dtype.value}: {name}")
        for point in found[name]:
            table.add_row(*(f"{point[key]:,.6g}" for key in ("at", "rate", "seconds", "megabytes")))
        console.print(table)
    if json is not None:
        kind = {"shape": shape, "dtype": dtype.value}
        write_result(json, {"environment": environment(), **kind, "curves": found})
    if plot is not None:
        _draw(found, f"{shape}, {dtype.value}", plot)


def _layers(model: DeeBert) -> int:
    return model.config.num_hidden_layers


def _sequences(rows: int, mean: int, seed: int) -> Iterator[list[int]]:
    """Made one at a time, so that the input itself takes no memory."""
    draw = random.Random(seed)
    for _ in range(rows):
        length = draw.randint(max(1, mean // 2), mean + mean // 2)
        first = draw.randrange(1000, 30_000)
        yield [1000 + (first + 7919 * place) % 29_000 for place in range(length)]


def _fast(model: DeeBert, dtype: torch.dtype, speedup: float, mean: int) -> AcceleratedModel:
    """At the threshold under which 1 / speedup of the layers are run."""
    sample = list(_sequences(256, mean, 99))
    table = exit_table(accelerate(model), sample)
    mean_layers = max(_layers(model) / speedup, 1.1)  # some rows must stay past the first
    threshold = threshold_for_layers(table, mean_layers)
    if threshold is None:
        raise typer.BadParameter(f"--curve depth: no threshold runs as few as {mean_layers:.2f} layers a row here")
    return accelerate(model, threshold=threshold, dtype=dtype)


def _point(
    model: DeeBert,
    dtype: torch.dtype,
    at: float,
    rows: int,
    *,
    length: int = MEAN_LENGTH,
    budget: int = BUDGET,
    speedup: float = SPEEDUP,
) -> dict[str, float]:
    fast = _fast(model, dtype, speedup, length)
    for _ in fast.stream(_sequences(200, length, 1), token_budget=budget):
        pass
    before, start, layers = _new_peak(), time.perf_counter(), 0
    for result in fast.stream(_sequences(rows, length, 2), token_budget=budget):
        layers += result.executed_layers or 0
    seconds = time.perf_counter() - start
    return {
        "at": at,
        "sequences": rows,
        "seconds": seconds,
        "rate": rows / seconds,
        "megabytes": (_peak() - before) / 1e6,
        "layer_speedup": _layers(model) * rows / layers,
    }


def _with_threads(count: int, measure: Callable[..., dict[str, float]]) -> dict[str, float]:
    torch.set_num_threads(count)
    return measure(count, ROWS)


def _new_peak() -> float:
    """Forget the largest resident set of the process so far; what it holds now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> float:
    """Bytes of the largest resident set since ``_new_peak``."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def _powers(largest: int) -> list[int]:
    return [10**power for power in range(3, 10) if 10**power <= largest]


def _draw(found: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.6), squeeze=False)
    for (name, points), axis in zip(found.items(), axes[0], strict=True):
        at = [point["at"] for point in points]
        axis.plot(at, [point["rate"] for point in points], "o-", color="#4477aa")
        axis.set(xlabel=name, ylabel="sequences per second", title=f"{title}: {name}", ylim=(0, None))
        if name in ("sequences", "length", "budget"):
            axis.set_xscale("log")
        memory = axis.twinx()
        memory.plot(at, [point["megabytes"] for point in points], "s--", color="#cc6677")
        memory.set_ylabel("peak memory growth, MB", color="#cc6677")
        memory.set_ylim(0, max(50, *(1.2 * point["megabytes"] for point in points)))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
