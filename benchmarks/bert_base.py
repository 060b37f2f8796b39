"""BERT-base shapes, random weights, SST-2-like lengths, rows leaving uniformly over the 12 layers.

python benchmarks/bert_base.py [--shape base|small] [--dtype fp32|bf16] [--threads N] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ragged_exit.accelerate import accelerate
from ragged_exit.bench.compare import compare
from ragged_exit.bench.synthetic import SHAPES, random_deebert, random_workload, uniform_exits
from ragged_exit.calibration.exit_table import exit_table
from ragged_exit.cli import DType

SEED = 20


def main(
    shape: Annotated[str, typer.Option(help=" or ".join(SHAPES))] = "base",
    dtype: DType = DType.fp32,
    rows: Annotated[int, typer.Option(help="sequences a repeat")] = 512,
    repeats: int = 3,
    threads: int = 2,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    torch.set_num_threads(threads)
    console = Console()
    model = random_deebert(shape, SEED)
    calibration = random_workload(rows, SEED)
    rule = uniform_exits(exit_table(accelerate(model), calibration.sequences))
    report = compare(
        f"BERT {shape}, random weights, SST-2-like lengths, uniform exits",
        model,
        rule,
        random_workload(256, SEED + 1),
        lambda number: random_workload(rows, 1000 + number),
        batch_size=32,
        dtype=torch.float32 if dtype is DType.fp32 else torch.bfloat16,
        repeats=repeats,
        say=lambda line: console.print(line, style="dim"),
    )
    report.print(console)
    if json is not None:
        report.write_json(json)
    if plot is not None:
        report.plot(plot)


if __name__ == "__main__":
    typer.run(main)
