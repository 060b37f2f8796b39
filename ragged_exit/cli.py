"""The command line: ragged-exit bench | fit | calibrate | score | inspect."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from ragged_exit.accelerate import accelerate
from ragged_exit.data import read_text_data
from ragged_exit.examples import read_tokenizer, token_limit, tokenise
from ragged_exit.integrations.score import score_file, score_locally
from ragged_exit.integrations.scorer import DTYPES, ScoreOptions
from ragged_exit.models.loading import load
from ragged_exit.scheduler import TOKEN_BUDGET

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Early-exit encoders that are fast in batches.")
MAX_LENGTH_HELP = "tokens a row, at most (default: as in training, else 512)"
console = Console(width=None if sys.stdout.isatty() else 120)  # a file or a pipe has no width of its own


class EngineName(StrEnum):
    """Where ``score`` runs."""

    local = "local"
    ray = "ray"


class DType(StrEnum):
    """What the accelerated forward computes in."""

    fp32 = "fp32"
    bf16 = "bf16"


@contextmanager
def clear_errors(extra: str) -> Iterator[None]:
    """What the user can mend is told in a line. extra: what is imported within, and must be installed, besides."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        console.print(f"[red]error[/red] {escape(str(error))}", highlight=False)
        if isinstance(error, ImportError):
            console.print(f"this command needs: pip install 'ragged-exit[{extra}]'", markup=False, highlight=False)
        raise typer.Exit(2) from error


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
    with clear_errors("bench"):
        from ragged_exit.bench.default import prepare, run_bench
        from ragged_exit.bench.environment import one_process_for_all

        one_process_for_all(threads)
        with console.status("preparing") as status:

            def say(line: str) -> None:
                status.update(escape(line))
                if not console.is_terminal:
                    console.print(line, style="dim", markup=False, highlight=False)

            prepared = prepare(model, data, say=say)
            report = run_bench(
                prepared,
                threshold=threshold,
                batch_size=batch_size,
                dtype=DTYPES[dtype],
                repeats=repeats,
                say=say,
            )
        report.print(console)
        for path, write in ((json, report.write_json), (plot, report.plot)):
            if path is not None:
                write(path)
                console.print(f"wrote {path}", markup=False, highlight=False)


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or id of an encoder; of a cascade's largest")],
    data: Annotated[Path, typer.Argument(help="csv, tsv, jsonl or parquet with text[, text2], label")],
    out: Annotated[Path, typer.Argument(help="new folder for the checkpoint; an unfinished run there goes on")],
    system: Annotated[
        str, typer.Option(help="deebert, berxit, de3bert, cascade, pabee, elasticbert, fastbert; full_depth: no exits")
    ],
    member: Annotated[list[str] | None, typer.Option(help="cascade: a smaller encoder, smallest first")] = None,
    valid: Annotated[Path | None, typer.Option(help="validation rows (default: 15 % of DATA)")] = None,
    pooling: Annotated[str, typer.Option(help="what heads see: cls or mean")] = "cls",
    freeze_backbone: Annotated[bool, typer.Option(help="train heads only, on features computed once")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="(default: the recipe's)")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="(default: the recipe's)")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="(default: the recipe's)")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="tokens a row, at most")] = 128,
    folds: Annotated[int, typer.Option(help="cascade: folds that find difficult rows; 0 leaves the margin out")] = 8,
    seed: int = 42,
    bf16: Annotated[bool, typer.Option(help="train in mixed precision")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: PyTorch's choice)")] = None,
) -> None:
    """Train an early-exit system on labelled text by its paper's recipe, and say how good each exit is."""
    if threads is not None:
        torch.set_num_threads(threads)
    with clear_errors("train"):
        from ragged_exit.calibration.exits import exit_qualities
        from ragged_exit.training.job import run_fit

        fitted = run_fit(
            system,
            model,
            data,
            out,
            members=member or (),
            valid_data=valid,
            pooling=pooling,
            freeze_backbone=freeze_backbone,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_length=max_length,
            folds=folds,
            seed=seed,
            bf16=bf16,
            say=lambda line: console.print(line, style="dim", markup=False, highlight=False),
        )
        exits = exit_qualities(*fitted)
    table = Table("member", "layer", "layers run", *exits[0].metrics, title=f"{system} on validation rows, by exit")
    for exit_ in exits:
        figures = (f"{value:.4f}" for value in exit_.metrics.values())
        table.add_row(str(exit_.member), str(exit_.layer), str(exit_.executed_layers), *figures)
    console.print(table)
    console.print(f"wrote {out}", markup=False, highlight=False)


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="early-exit checkpoint with its tokenizer, as fit writes it")],
    source: Annotated[Path, typer.Argument(metavar="IN", help="csv, tsv, jsonl or parquet with text[, text2][, id]")],
    out: Annotated[Path, typer.Argument(help="csv, tsv, jsonl or parquet; an unfinished run there goes on")],
    engine: Annotated[
        EngineName, typer.Option(help="local: this process; ray: a cluster's workers")
    ] = EngineName.local,
    threshold: Annotated[float | None, typer.Option(help="(default: the checkpoint's)")] = None,
    patience: Annotated[int | None, typer.Option(help="(default: the checkpoint's)")] = None,
    text: Annotated[str, typer.Option(help="column of the texts")] = "text",
    text2: Annotated[
        str | None,
        typer.Option(help="column of the second texts of pairs (default: text2 or sentence2, if it is there)"),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="fp32 or bf16")] = DType.fp32,
    max_length: Annotated[int | None, typer.Option(min=2, help=MAX_LENGTH_HELP)] = None,
    token_budget: Annotated[int, typer.Option(min=1, help="tokens a batch")] = TOKEN_BUDGET,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (ray: a worker; default 1)")] = None,
    workers: Annotated[int, typer.Option(min=1, help="ray: workers")] = 2,
    gpus: Annotated[float, typer.Option(min=0, help="ray: GPUs a worker")] = 0,
    address: Annotated[str | None, typer.Option(help="ray: a running cluster (default: start one here)")] = None,
) -> None:
    """Answer every row of a file, in order; killed and called again, it goes on without losing or repeating a row."""
    with clear_errors("ray"):
        if engine is EngineName.ray:
            from ragged_exit.integrations.ray_engine import ray_engine

            run = ray_engine(workers=workers, threads=threads or 1, gpus=gpus, address=address)
        else:
            run = score_locally
            if threads is not None:
                torch.set_num_threads(threads)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("rows", total=None)
            scored = score_file(
                ScoreOptions(model, threshold, patience, str(dtype), max_length, token_budget),
                source,
                out,
                text=text,
                text2=text2,
                engine=run,
                on_rows=lambda done, total: progress.update(task, completed=done, total=total),
            )
    console.print(
        f"wrote {scored.rows:,} rows to {out}, {scored.errors:,} of them with an error", markup=False, highlight=False
    )


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(help="early-exit checkpoint with its tokenizer; its config.json is changed")],
    data: Annotated[
        Path, typer.Argument(help="csv, tsv, jsonl or parquet with text[, text2][, label], not trained on")
    ],
    max_loss: Annotated[float, typer.Option(help="share of the right answers that leaving early may spoil")] = 0.01,
    confidence: Annotated[float, typer.Option(help="that the share holds on new rows")] = 0.95,
    speedup: Annotated[
        float | None, typer.Option(help="instead: run 1 / SPEEDUP of the layers, whatever it costs")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help=MAX_LENGTH_HELP)] = None,
) -> None:
    """Choose the threshold: the loosest with a guarantee on lost answers, or the one for a speed-up."""
    with clear_errors("train"):
        from ragged_exit.calibration.job import run_calibrate

        found = run_calibrate(
            model, data, max_loss=max_loss, confidence=confidence, speedup=speedup, max_length=max_length
        )
    console.print(f"{found.rule}: {found.verdict}", markup=False, highlight=False)
    console.print(f"wrote {model / 'config.json'}", markup=False, highlight=False)


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="early-exit checkpoint, ours or a published one")],
    data: Annotated[Path | None, typer.Argument(help="texts: where their rows leave")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help=MAX_LENGTH_HELP)] = None,
) -> None:
    """Say what a checkpoint is and, with data, at which exits the rows leave."""
    with clear_errors("train"):
        from ragged_exit.calibration.exits import exit_counts

        loaded, counts = load(model), []
        if data is not None:
            fast, tokenizer, text = accelerate(loaded), read_tokenizer(model), read_text_data(data, label=None)
            limit = token_limit(tokenizer, max_length, fast.encoders)
            counts = exit_counts(fast, tokenise(tokenizer, text, max_length=limit))
    config = loaded.config
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    facts = {
        "system": loaded.system,
        "rule": loaded.rule,
        "backbone": f"{config.model_type}, {config.num_hidden_layers} layers, hidden {config.hidden_size}",
        "outputs": config.num_labels,
        "parameters": f"{parameters:,}",
        "exits": loaded.num_exits,
    }
    for name, value in facts.items():
        console.print(f"{name:<11} {value}", markup=False, highlight=False)
    if counts:
        rows = sum(count for *_, count in counts)
        table = Table("member", "layer", "layers run", "rows", "share", title=f"where {rows:,} rows leave")
        for member, layer, executed, count in counts:
            table.add_row(str(member), str(layer), str(executed), f"{count:,}", f"{100 * count / rows:.1f} %")
        console.print(table)
        mean = sum(executed * count for _, _, executed, count in counts) / rows
        console.print(f"mean {mean:.2f} layers run, at most {counts[-1][2]}", highlight=False)


if __name__ == "__main__":
    app()
