"""Measure contenders: decisions first, then interleaved timing on fresh batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PretrainedConfig

from ragged_exit.bench.check import Measured, References, check, check_timed
from ragged_exit.bench.contenders import Answers, Contender
from ragged_exit.bench.workload import Workload, padded_work

NEAR = 1.25  # sizes that took so many times the fastest one's seconds are timed again


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
    config: PretrainedConfig,
    on_step: Callable[[str], None] = lambda step: None,
    on_known: Callable[[list[Measured]], None] = lambda results: None,
    on_error: Callable[[Contender, Exception, list[float]], None] = _raise,
) -> list[Measured]:
    """Check every contender on ``check_on``, choose its batch size, then time all of them in turns.

    What they answer when they are timed is compared too, with the first that matches the same reference.

    draw(number) gives workload ``number``: other rows in another order each time, so that each batch is seen once.
    Numbers below 0 are for choosing sizes. config: the model's, to count the work by which a sample's seconds are
    scaled; where its other rows leave is told by a contender of the same kind that answers all of them.
    on_known: told what is known after every check and every repeat. on_error: told of a contender that raised, with its
    seconds till then; unless that raises, the others go on without it.
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
        timed: dict[str, tuple[float, Answers]] = {}
        shift = repeat % max(1, len(results))  # nobody always runs first
        for measured in results[shift:] + results[:shift]:
            on_step(f"timing {measured.contender.name}, repeat {repeat + 1} of {repeats}")
            part = _limited(workload, measured.contender)
            try:
                timed[measured.contender.name] = _timed(measured.contender, part, measured.size)
            except Exception as error:
                on_error(measured.contender, error, measured.seconds)
                results = [item for item in results if item is not measured]
                continue
        _add(results, timed, workload, dtype, config)
        on_known(results)
    return results


def _add(
    results: Sequence[Measured],
    timed: Mapping[str, tuple[float, Answers]],
    workload: Workload,
    dtype: torch.dtype,
    config: PretrainedConfig,
) -> None:
    """Add a repeat's exits and seconds, a sample's by all rows' work over its own; compare the answers."""
    all_rows: dict[bool, Answers] = {}  # of each kind's first, better one that matches
    for measured in sorted(results, key=lambda item: not item.matches):
        answers = timed[measured.contender.name][1]
        if len(answers.logits) == len(workload):
            all_rows.setdefault(measured.contender.exits, answers)
    for measured in results:
        seconds, answers = timed[measured.contender.name]
        part = _limited(workload, measured.contender)
        if len(part) < len(workload):
            layers = all_rows[measured.contender.exits].exit_layer
            seconds *= padded_work(config, workload, measured.size, layers)
            seconds /= padded_work(config, part, measured.size, answers.exit_layer)
        measured.seconds.append(seconds)
        measured.exit_layers.append(answers.exit_layer)
        if measured.matches and measured.contender.exits in all_rows:
            check_timed(measured, answers, all_rows[measured.contender.exits], workload.labels, dtype)


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
    threads = torch.get_num_threads()
    answers = contender.run(workload, size)
    if torch.get_num_threads() != threads:  # all who come after it would run on others
        raise RuntimeError(f"{contender.name}: expected {threads} threads after it, got {torch.get_num_threads()}")
    if not len(answers.logits) == len(answers.exit_layer) == len(workload):  # lost rows would look like speed
        raise RuntimeError(f"{contender.name}: expected {len(workload)} answers, got {len(answers.logits)}")
    return answers


def _limited(workload: Workload, contender: Contender) -> Workload:
    return workload if contender.rows is None else workload.select(range(min(contender.rows, len(workload))))
