"""What each operation costs in the accelerated forward: shares of the wall-clock time, on fresh batches.

python benchmarks/where_time_goes.py [--profile sst2|mrpc|long|uniform] [--shape base|small|tiny] [--dtype fp32|bf16]
                                     [--full] [--rows N] [--threads N] [--json F]

Random weights, the same number of rows leaves at every layer (`--full`: nobody leaves early). Profiling slows the
forward a little, so shares are of the profiled run; what happens inside a layer that is one call (packed_layer) it
tells itself. `linears` has the rate that they reached and their share of the rate that the same linears reach alone,
back to back, without activation (as roofline_fraction counts).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from ragged_exit.accelerate import accelerate
from ragged_exit.bench.contenders import full_depth_stage, ragged
from ragged_exit.bench.environment import environment, write_result
from ragged_exit.bench.options import Profile, Shape
from ragged_exit.bench.report import workload_facts
from ragged_exit.bench.roofline import linear_seconds
from ragged_exit.bench.synthetic import random_deebert, random_workload, uniform_rule
from ragged_exit.cli import DType
from ragged_exit.executor import RaggedExecutor
from ragged_exit.integrations.scorer import DTYPES
from ragged_exit.ops import take_layer_seconds

SEED = 20
WARM_UP = 2  # workloads, so that most kernels of this batch size are built
OPS = {
    "linears": ("mkldnn::_linear_pointwise", "ragged_exit::packed_linear"),
    "attention": ("ragged_exit::varlen_attention",),
    "layer norm": ("ragged_exit::add_layer_norm", "ragged_exit::add_layer_norm_into"),
    "embeddings": ("ragged_exit::embed_layer_norm",),
    "exit step": ("ragged_exit::exit_step",),
    "compact": ("ragged_exit::compact",),
}


def main(
    profile_name: Profile = "sst2",
    shape: Shape = "base",
    dtype: DType = DType.fp32,
    full: Annotated[bool, typer.Option("--full", help="exits off")] = False,
    rows: int = 512,
    token_budget: int = 8192,
    threads: int = 2,
    json: Path | None = None,
) -> None:
    torch.set_num_threads(threads)
    precision = DTYPES[dtype]
    model = random_deebert(shape, SEED)
    fast = accelerate(model, rule=uniform_rule(model, SEED, profile_name), dtype=precision)
    executor = RaggedExecutor([full_depth_stage(fast)], impl=fast.impl) if full else fast.executor
    run = ragged(fast, executor)
    for number in range(WARM_UP):
        run(random_workload(rows, number, profile_name), token_budget)
    workload = random_workload(rows, WARM_UP, profile_name)
    take_layer_seconds()  # of the warm-up
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        answers = run(workload, token_budget)
        wall = time.perf_counter() - start
    inside = dict(zip(("linears", "attention", "layer norm"), take_layer_seconds(), strict=True))
    spent = {event.key: event for event in profiler.key_averages()}
    seconds = {
        name: sum(event.cpu_time_total for key, event in spent.items() if key.split(".")[0] in ops) / 1e6
        + inside.get(name, 0.0)
        for name, ops in OPS.items()
    }
    seconds["everything else"] = wall - sum(seconds.values())
    alone = linear_seconds(model.config, precision) * workload.token_layers(answers.exit_layer)
    _print(f"BERT {shape}, {profile_name}, {dtype.value}, {'full depth' if full else 'exits'}", seconds, wall, alone)
    if json is not None:
        asked = {"shape": shape, "dtype": dtype.value, "profile": profile_name, "exits": "none" if full else "uniform"}
        facts = workload_facts([workload], [answers.exit_layer], model)
        found = {"seconds": seconds, "wall": wall, "linears_alone": alone, "token_budget": token_budget, "rows": rows}
        write_result(json, {"environment": environment(), **asked, "workload": facts, **found})


def _print(title: str, seconds: dict[str, float], wall: float, alone: float) -> None:
    table = Table("operation", "seconds", "share", title=title)
    for name, value in seconds.items():
        table.add_row(name, f"{value:.3f}", f"{100 * value / wall:.1f} %")
    console = Console()
    console.print(table)
    console.print(
        f"linears reach {100 * alone / seconds['linears']:.0f} % of their rate alone; roofline {alone / wall:.3f}"
    )


if __name__ == "__main__":
    typer.run(main)
