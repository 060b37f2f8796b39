"""Do the systems keep their accuracy when the batch really shrinks? Trains, chooses thresholds, reports; resumes.

python benchmarks/quality.py --data FOLDER [--task sst2 --task stsb] [--system deebert] [--quick] [--json F] [--plot F]
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ragged_exit.bench.quality.models import BUDGETS, Study
from ragged_exit.bench.quality.points import measure, metrics
from ragged_exit.bench.quality.report import TaskReport, draw, write_json
from ragged_exit.bench.quality.tasks import TASKS, Task, load_task
from ragged_exit.embedded import cache_dir

QUICK_ROWS, QUICK_DEV_ROWS = 1_000, 200


def main(
    data: Annotated[Path, typer.Option(help="folder with sst2/, mrpc/, rte/, stsb/")],
    task: Annotated[list[str] | None, typer.Option(help=f"any of {', '.join(TASKS)} (default: all)")] = None,
    system: Annotated[list[str] | None, typer.Option(help="only these (default: all that fit the task)")] = None,
    quick: Annotated[bool, typer.Option(help="a few rows and one epoch: minutes, and poor models")] = False,
    work_dir: Annotated[Path | None, typer.Option(help="trained models (default: in the cache folder)")] = None,
    pooling: Annotated[str, typer.Option(help="what pooled heads see: cls, as published, or mean")] = "cls",
    repeats: Annotated[int, typer.Option(min=1, help="timed repeats, each on other rows")] = 3,
    threads: int = 2,
    bf16: Annotated[bool, typer.Option(help="train in bf16 (autocast)")] = True,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    torch.set_num_threads(threads)
    console = Console()
    folder = work_dir or cache_dir() / ("quality-quick" if quick else "quality")
    reports = []
    for name in task or TASKS:
        budget, loaded = BUDGETS[name], load_task(name, data)
        if quick:
            budget = replace(budget, rows=QUICK_ROWS, epochs=1)
            loaded = Task(name, loaded.train, *(_first(part) for part in (loaded.valid, loaded.dev)))
        study = Study(
            loaded, budget, folder, pooling=pooling, bf16=bf16, say=lambda line: console.print(line, style="dim")
        )
        names = [item for item in study.systems() if not system or item in system]
        report = TaskReport(
            task=name,
            metric=next(iter(metrics(name))),
            rows={"train": len(study.train), "valid": len(study.valid), "dev": len(study.dev)},
            training=asdict(budget) | {"pooling": pooling, "seed": study.seed, "bf16": bf16},
            points=measure(study, names, repeats=repeats, say=study.say),
        )
        report.print(console)
        reports.append(report)
        if json is not None:  # after every task, so that a long run leaves what it has
            write_json(json, reports)
        if plot is not None:
            draw(plot, reports)


def _first(data):
    return data.select(range(min(QUICK_DEV_ROWS, len(data))))


if __name__ == "__main__":
    typer.run(main)
