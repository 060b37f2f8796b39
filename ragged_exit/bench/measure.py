"""Measure contenders: decisions first, then interleaved timing on fresh batches, medians over repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ragged_exit.bench.contenders import Answers, Contender, exit_score
from ragged_exit.bench.workload import Workload
from ragged_exit.models.base import ExitPoint, answer
from ragged_exit.models.deebert import DeeBert
from ragged_exit.rules import ExitRule

MAX_LOGIT_ERROR = 1e-3  # fp32
MARGIN = 1e-5  # on the score, where a decision may fall either way
MIN_AGREEMENT = 0.99  # bf16: share of labels equal to the fp32 reference
MAX_ACCURACY_LOSS = 0.003  # bf16
MAX_DEPTH_CHANGE = 0.05  # bf16: of the mean exit layer
NEAR = 1.25  # sizes that took so many times the fastest one's seconds are timed again
MAX_EXCUSED = 0.01  # fp32: share of rows, or one, that left elsewhere and had a score inside the margin


@dataclass(frozen=True)
class References:
    """What contenders must match on a workload's first N rows: full depth, and the early-exit model run row by row.

    close: bool ``[N]``, rows with some score within the margin of its threshold, whose exit may differ.
    """

    full: Answers
    exits: Answers
    close: Tensor


@dataclass
class Measured:
    """A contender's best size, its answers and whether they match; of each repeat the seconds and the exits.

    exit_layers: int64 ``[N]`` a repeat, of the rows that were timed.
    """

    contender: Contender
    size: int
    answers: Answers  # to the rows that were checked
    seconds: list[float] = field(default_factory=list)
    exit_layers: list[Tensor] = field(default_factory=list)
    accuracy: float | None = None
    max_logit_error: float = 0.0
    wrong_exits: int = 0
    agreement: float = 1.0
    matches: bool = True

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@torch.inference_mode()
def references(model: DeeBert, rule: ExitRule, workload: Workload) -> References:
    """Run the plain reference model one row at a time: every exit of every row, and which of them answers."""
    full, logits, layers, close = [], [], [], []
    for row, sequence in enumerate(workload.sequences):
        ids = torch.tensor([list(sequence)])
        types = None if workload.token_type_ids is None else torch.tensor([list(workload.token_type_ids[row])])
        points = [replace(point, rule=rule) for point in model.exit_points(ids, torch.ones_like(ids), types)]
        output: Any = answer(points)  # all its fields are set
        full.append(points[-1].output.logits)
        logits.append(output.logits)
        layers.append(output.exit_layer)
        asked = [point for point in points[:-1] if point.exit_layer <= int(output.exit_layer)]  # till it left
        close.append(any(_is_close(point) for point in asked))
    depth = model.config.num_hidden_layers
    return References(
        Answers(torch.cat(full).float(), torch.full((len(full),), depth)),
        Answers(torch.cat(logits).float(), torch.cat(layers)),
        torch.tensor(close),
    )


def _is_close(point: ExitPoint) -> bool:
    score = exit_score(point.output.logits, point.rule)
    return bool((score - point.rule.threshold_at(point.exit_index)).abs() <= MARGIN)


def check(measured: Measured, workload: Workload, expected: References, dtype: torch.dtype) -> None:
    """Fill in accuracy (of contenders that answer every row) and whether the answers match their reference.

    fp32: labels equal, |logit difference| <= 1e-3 and exit layers equal; excused are rows that left elsewhere with a
    score inside the margin, at most 1 % of them (or one). bf16: labels agree for 99 % of the rows, accuracy is within
    0.3 points and the mean exit layer within 5 %.
    """
    answers, wanted = measured.answers, expected.exits if measured.contender.exits else expected.full
    if workload.labels is not None and len(answers.logits) == len(workload):
        measured.accuracy = float((answers.logits.argmax(1) == workload.labels).double().mean())
    rows = min(len(answers.logits), len(wanted.logits))
    answers = Answers(answers.logits[:rows], answers.exit_layer[:rows])
    elsewhere = answers.exit_layer != wanted.exit_layer[:rows]
    excused = elsewhere & expected.close[:rows] if measured.contender.exits else torch.zeros(rows, dtype=torch.bool)
    certain = ~excused
    labels, wanted_labels = answers.logits.argmax(1), wanted.logits[:rows].argmax(1)
    measured.agreement = float((labels == wanted_labels).double().mean())
    measured.wrong_exits = int(elsewhere[certain].sum())
    errors = (answers.logits - wanted.logits[:rows])[certain].abs()
    measured.max_logit_error = float(errors.max()) if len(errors) else 0.0
    if dtype == torch.float32:
        same_labels = bool((labels == wanted_labels)[certain].all())
        exact = measured.max_logit_error <= MAX_LOGIT_ERROR and measured.wrong_exits == 0
        few_excused = int(excused.sum()) <= max(1, MAX_EXCUSED * rows)
        measured.matches = same_labels and exact and few_excused and bool(answers.logits.isfinite().all())
    else:
        loss = 0.0
        if workload.labels is not None:
            truth = workload.labels[:rows]
            loss = float((wanted_labels == truth).double().mean() - (labels == truth).double().mean())
        depth, wanted_depth = (layers.double().mean() for layers in (answers.exit_layer, wanted.exit_layer[:rows]))
        as_deep = bool((depth - wanted_depth).abs() <= MAX_DEPTH_CHANGE * wanted_depth)
        measured.matches = measured.agreement >= MIN_AGREEMENT and loss <= MAX_ACCURACY_LOSS and as_deep


def _raise(contender: Contender, error: Exception, seconds: list[float]) -> None:
    raise error


def measure(
    contenders: Sequence[Contender],
    check_on: Workload,
    expected: References,
    draw: Callable[[int], Workload],
    *,
    repeats: int,
    dtype: torch.dtype,
    on_step: Callable[[str], None] = lambda step: None,
    on_known: Callable[[list[Measured]], None] = lambda results: None,
    on_error: Callable[[Contender, Exception, list[float]], None] = _raise,
) -> list[Measured]:
    """Check every contender on ``check_on``, choose its batch size, then time all of them in turns.

    draw(number) gives workload ``number``: other rows in another order each time, so that each batch is seen once.
    Numbers below 0 are for choosing sizes. on_known: told what is known after every check and every repeat. on_error:
    told of a contender that raised, with its seconds till then; unless that raises, the others go on without it.
    """
    results: list[Measured] = []
    for contender in contenders:
        on_step(f"checking {contender.name}")
        try:
            size = _best_size(contender, draw)
            measured = Measured(contender, size, _run(contender, _limited(check_on, contender), size))
            check(measured, check_on, expected, dtype)
            results.append(measured)
        except Exception as error:
            on_error(contender, error, [])
        on_known(results)
    for repeat in range(repeats):
        workload = draw(repeat)
        shift = repeat % max(1, len(results))  # nobody always runs first
        for measured in results[shift:] + results[:shift]:
            on_step(f"timing {measured.contender.name}, repeat {repeat + 1} of {repeats}")
            part = _limited(workload, measured.contender)
            try:
                seconds, answers = _timed(measured.contender, part, measured.size)
            except Exception as error:
                on_error(measured.contender, error, measured.seconds)
                results = [item for item in results if item is not measured]
                continue
            measured.seconds.append(seconds * len(workload) / len(part))
            measured.exit_layers.append(answers.exit_layer)
        on_known(results)
    return results


def _best_size(contender: Contender, draw: Callable[[int], Workload]) -> int:
    """By one timing each, and a second of those that come near the fastest: the better of the two counts."""
    if len(contender.sizes) == 1:
        return contender.sizes[0]
    times = {}
    *warm, timed = (_tuning_rows(contender, draw(-1 - number)) for number in range(len(contender.sizes) + 1))
    for size, rows in zip(contender.sizes, warm, strict=True):
        contender.run(rows, size)  # kernels for this size's shapes are built here, not in the next line
        times[size] = _timed(contender, timed, size)[0]
    limit = NEAR * min(times.values())
    for size, seconds in times.items():
        if seconds <= limit:
            times[size] = min(seconds, _timed(contender, timed, size)[0])
    return min(times, key=lambda size: times[size])


def _tuning_rows(contender: Contender, workload: Workload) -> Workload:
    return workload if contender.tuning_rows is None else workload.select(range(contender.tuning_rows))


def _timed(contender: Contender, workload: Workload, size: int) -> tuple[float, Answers]:
    start = time.perf_counter()
    answers = _run(contender, workload, size)
    return time.perf_counter() - start, answers


def _run(contender: Contender, workload: Workload, size: int) -> Answers:
    answers = contender.run(workload, size)
    if not len(answers.logits) == len(answers.exit_layer) == len(workload):  # lost rows would look like speed
        raise RuntimeError(f"{contender.name}: expected {len(workload)} answers, got {len(answers.logits)}")
    return answers


def _limited(workload: Workload, contender: Contender) -> Workload:
    return workload if contender.rows is None else workload.select(range(min(contender.rows, len(workload))))
