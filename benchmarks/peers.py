"""Ours against every other runtime, on random weights of a known shape: padded batching, compilers, inference engines.

python benchmarks/peers.py [--profile sst2|mrpc|long|uniform] [--shape base|small|tiny] [--dtype fp32|bf16]
                           [--exits uniform|first|none] [--rows N] [--threads N] [--no-peers] [--json F] [--plot F]

Heads are fitted to tell two topics of random words apart. `uniform` exits: the same number of rows leaves at every
layer. The peers run the full-depth model, sorted by length; those that are not installed (onnxruntime, openvino,
ctranslate2) are named under the table.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ragged_exit.bench.compare import compare
from ragged_exit.bench.environment import one_process_for_all
from ragged_exit.bench.options import Profile, Shape
from ragged_exit.bench.peers import peers
from ragged_exit.bench.synthetic import fit_heads, random_deebert, random_workload, uniform_rule
from ragged_exit.cli import DType
from ragged_exit.integrations.scorer import DTYPES
from ragged_exit.models.deebert import DeeBert
from ragged_exit.rules import Entropy, ExitRule

SEED = 20
CHECKED_ROWS = 512  # at most: a single one must not be 0.3 points of accuracy
ROWS = {"sst2": 512, "mrpc": 256, "long": 64, "uniform": 128}  # a repeat


class Exits(StrEnum):
    """Where rows leave."""

    uniform = "uniform"
    first = "first"
    none = "none"


def main(
    profile: Profile = "sst2",
    shape: Shape = "base",
    dtype: DType = DType.fp32,
    exits: Annotated[
        Exits, typer.Option(help="all layers alike, all at the first exit, or nobody early")
    ] = Exits.uniform,
    rows: Annotated[int | None, typer.Option(min=1, help="sequences a repeat (default: by profile)")] = None,
    repeats: int = 3,
    threads: int = 2,
    others: Annotated[bool, typer.Option("--peers/--no-peers", help="measure other runtimes too")] = True,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    one_process_for_all(threads)
    console = Console()
    rows = ROWS[profile] if rows is None else rows
    precision = DTYPES[dtype]
    model = random_deebert(shape, SEED)
    fit_heads(model, SEED + 100, profile)

    def say(line: str) -> None:
        console.print(line, style="dim")

    found, missing = peers(model, precision, threads) if others else ([], {})
    report = compare(
        f"BERT {shape}, random encoder, {profile} lengths, exits: {exits}",
        model,
        _rule(exits, model, profile),
        random_workload(min(rows, CHECKED_ROWS), SEED + 1, profile),
        lambda number: random_workload(rows, 1000 + number, profile),
        batch_size=32,
        dtype=precision,
        repeats=repeats,
        say=say,
        peers=found,
        missing=missing,
    )
    report.print(console)
    if json is not None:
        report.write_json(json)
    if plot is not None:
        report.plot(plot)


def _rule(exits: Exits, model: DeeBert, profile: str) -> ExitRule:
    if exits is Exits.uniform:
        return uniform_rule(model, SEED, profile)
    return Entropy(10.0 if exits is Exits.first else -1.0)  # nats: always above, or never below


if __name__ == "__main__":
    typer.run(main)
