"""The command line: ragged-exit bench."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Early-exit encoders that are fast in batches.")
console = Console(width=None if sys.stdout.isatty() else 120)  # a file or a pipe has no width of its own


class DType(StrEnum):
    """What the accelerated forward computes in."""

    fp32 = "fp32"
    bf16 = "bf16"


@app.callback()
def main() -> None:
    """Early-exit encoders that are fast in batches."""


@app.command()
def bench(
    model: Annotated[str | None, typer.Option(help="early-exit checkpoint, or Hugging Face directory or id")] = None,
    data: Annotated[Path | None, typer.Option(help="csv, tsv, jsonl or parquet with text[, text2], label")] = None,
    threshold: Annotated[float | None, typer.Option(help="entropy threshold (default: chosen on validation)")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows a batch of the plain padded contender")] = 32,
    dtype: Annotated[DType, typer.Option(help="fp32 or bf16")] = DType.fp32,
    threads: Annotated[int, typer.Option(min=1, help="threads for every contender")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="timed repeats, each on other rows")] = 3,
    json: Annotated[Path | None, typer.Option(help="write every figure here")] = None,
    plot: Annotated[Path | None, typer.Option(help="write a PNG here")] = None,
) -> None:
    """Score real text against padded batching; answers are compared before anything is timed."""
    import torch  # here, so that --help answers at once

    from ragged_exit.bench.default import prepare, run_bench

    torch.set_num_threads(threads)
    try:
        with console.status("preparing") as status:

            def say(line: str) -> None:
                status.update(line)
                if not console.is_terminal:
                    console.print(line, style="dim", highlight=False)

            prepared = prepare(model, data, say=say)
            report = run_bench(
                prepared,
                threshold=threshold,
                batch_size=batch_size,
                dtype=torch.float32 if dtype is DType.fp32 else torch.bfloat16,
                repeats=repeats,
                say=say,
            )
    except (ValueError, FileNotFoundError) as error:
        console.print(f"[red]error[/red] {error}", highlight=False)
        raise typer.Exit(2) from error
    report.print(console)
    for path, write in ((json, report.write_json), (plot, report.plot)):
        if path is not None:
            write(path)
            console.print(f"wrote {path}")


if __name__ == "__main__":
    app()
