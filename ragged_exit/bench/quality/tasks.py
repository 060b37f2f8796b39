"""The quality study's tasks: SST-2, MRPC, RTE and STS-B as files that lie in one folder a task."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from ragged_exit.data import TextData, read_text_data, split_by_hash
from ragged_exit.training.job import VALID_SHARE

TASKS = ("sst2", "mrpc", "rte", "stsb")


@dataclass(frozen=True)
class Task:
    """train to fit on, valid to choose thresholds on, dev to report on, once."""

    name: str
    train: TextData
    valid: TextData
    dev: TextData

    @property
    def num_labels(self) -> int:
        """1 for a regression."""
        return 1 if self.train.is_regression else 2


def load_task(name: str, folder: Path) -> Task:
    """Read a task from ``folder/name``, in the files' published formats.

    sst2: train.tsv, valid.tsv, dev.tsv. rte: train.tsv, dev.tsv. mrpc: msr_paraphrase_{train,test}.txt; test reports.
    stsb: sts-{train,dev}.csv, scores 0 to 5. Raises ValueError for an unknown task, FileNotFoundError without a file.
    """
    if name not in TASKS:
        raise ValueError(f"name: expected one of {', '.join(TASKS)}, got {name!r}")
    folder = folder / name
    if name == "sst2":
        return Task(name, *(read_text_data(folder / f"{part}.tsv") for part in ("train", "valid", "dev")))
    if name == "rte":
        train, dev = (read_text_data(folder / f"{part}.tsv") for part in ("train", "dev"))
    elif name == "mrpc":
        train, dev = (_mrpc(folder / f"msr_paraphrase_{part}.txt") for part in ("train", "test"))
    else:
        train, dev = (_stsb(folder / f"sts-{part}.csv") for part in ("train", "dev"))
    fit_rows, valid_rows = split_by_hash(train.ids, (1 - VALID_SHARE, VALID_SHARE))
    return Task(name, train.select(fit_rows), train.select(valid_rows), dev)


def _mrpc(path: Path) -> TextData:
    rows = _cells(path)[1:]  # below a header: quality, two ids, two sentences
    first, second = [row[3] for row in rows], [row[4] for row in rows]
    return TextData(first, second, [int(row[0]) for row in rows], [f"{row[1]}-{row[2]}" for row in rows])


def _stsb(path: Path) -> TextData:
    rows = _cells(path)  # genre, file, year, id, score, two sentences; no header
    first, second = [row[5] for row in rows], [row[6] for row in rows]
    return TextData(first, second, [float(row[4]) for row in rows], ["-".join(row[:4]) for row in rows])


def _cells(path: Path) -> list[list[str]]:
    """Tab-separated, quote characters literal."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
