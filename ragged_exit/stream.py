"""Any number of sequences in, their answers out in order: windows sorted by length, run through survivor pools."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from ragged_exit.batch import RaggedBatch
from ragged_exit.executor import ExitRecord
from ragged_exit.pools import Finished, SurvivorPools
from ragged_exit.scheduler import token_budget_batches

WINDOW_BATCHES = 8  # so many token budgets are read ahead and sorted by length


@dataclass(frozen=True)
class RowResult:
    """One sequence's answer from ``stream``. ``error`` is set, and the rest None, where the sequence was bad.

    index: its place in the input. logits: f32 ``[C]``.
    """

    index: int
    logits: Tensor | None = None
    score: float | None = None
    exit_layer: int | None = None
    exit_member: int | None = None
    executed_layers: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class StreamRow:
    """One sequence of the input; ``error`` says what is wrong with it."""

    index: int
    input_ids: Sequence[int]
    token_type_ids: Sequence[int] | None
    error: str | None


@dataclass
class _Window:
    """Rows that were read together. places: of each batch number, where its rows go; empty when all are answered."""

    results: list[RowResult]
    places: dict[int, list[int]] = field(default_factory=dict)


def answer_in_order(
    rows: Iterable[StreamRow], pack: Callable[[list[StreamRow]], RaggedBatch], pools: SurvivorPools
) -> Iterator[RowResult]:
    """Answers in the order of ``rows``; bad rows get their error. ``pack`` makes a batch of good rows.

    What the source of ``rows`` raises is raised when all that came before is answered. What ``pack`` and ``pools``
    raise is the error of all rows that were read and have no answer, and is raised when they have been told.
    """
    waiting: deque[_Window] = deque()
    failures: list[Exception] = []  # of the source
    breakdown: list[Exception] = []
    batches = 0
    for chunk in _chunks(_until_failure(rows, failures), WINDOW_BATCHES * pools.token_budget):
        window = _Window([RowResult(row.index, error=row.error) for row in chunk])
        waiting.append(window)
        good = [place for place, row in enumerate(chunk) if row.error is None]
        parts = token_budget_batches([len(chunk[place].input_ids) for place in good], pools.token_budget)
        for part in parts:
            window.places[batches] = [good[number] for number in part]
            batches += 1
        with _breakdown_told(waiting, breakdown):
            for places in list(window.places.values()):
                with torch.inference_mode():
                    finished = pools.put(pack([chunk[place] for place in places]))
                _fill(waiting, finished)
        while waiting and not waiting[0].places:
            yield from waiting.popleft().results
        if breakdown:
            raise breakdown[0]
    with _breakdown_told(waiting, breakdown):
        with torch.inference_mode():
            finished = pools.flush()
        _fill(waiting, finished)
    for window in waiting:
        yield from window.results
    for error in (*breakdown, *failures):
        raise error


@contextmanager
def _breakdown_told(waiting: Iterable[_Window], breakdown: list[Exception]) -> Iterator[None]:
    """What is raised within goes into ``breakdown``, and is the answer of every row that has none."""
    try:
        yield
    except Exception as error:
        breakdown.append(error)
        for window in waiting:
            for place in chain.from_iterable(window.places.values()):
                window.results[place] = replace(window.results[place], error=f"{type(error).__name__}: {error}")
            window.places.clear()


def _until_failure(rows: Iterable[StreamRow], failures: list[Exception]) -> Iterator[StreamRow]:
    """``rows`` up to where their source raises; what it raised goes into ``failures``."""
    try:
        yield from rows
    except Exception as error:
        failures.append(error)


def _chunks(rows: Iterable[StreamRow], tokens: int) -> Iterator[list[StreamRow]]:
    chunk: list[StreamRow] = []
    count = 0
    for row in rows:
        chunk.append(row)
        count += max(1, len(row.input_ids))  # bad rows have none, and must not pile up either
        if count >= tokens:
            yield chunk
            chunk, count = [], 0
    if chunk:
        yield chunk


def _fill(waiting: Iterable[_Window], finished: Iterable[Finished]) -> None:
    """Write finished batches' answers to where their rows came from."""
    for number, record in finished:
        window = next(window for window in waiting if number in window.places)
        for place, result in zip(window.places.pop(number), _rows(record), strict=True):
            window.results[place] = replace(result, index=window.results[place].index)


def _rows(record: ExitRecord) -> Iterator[RowResult]:
    columns = (record.score, record.exit_layer, record.exit_member, record.executed_layers)
    lists = [column.tolist() for column in columns]
    for logits, score, layer, member, executed in zip(record.logits.to("cpu", copy=True).unbind(), *lists, strict=True):
        yield RowResult(-1, logits, score, layer, member, executed)
