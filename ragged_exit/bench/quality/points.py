"""The quality study's measuring: thresholds from validation rows, then quality and wall-clock time on the dev rows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ragged_exit.accelerate import AcceleratedModel, accelerate
from ragged_exit.bench.check import MARGIN, MAX_LOGIT_ERROR
from ragged_exit.bench.quality.models import Study
from ragged_exit.calibration.exit_table import ExitTable, exit_table
from ragged_exit.calibration.metrics import (
    accuracy,
    calibration_error,
    difficulty_inversion,
    f1,
    layer_speedup,
    pearson,
    spearman,
)
from ragged_exit.calibration.threshold import Quality, threshold_for_layers
from ragged_exit.examples import Examples
from ragged_exit.executor import ExitRecord
from ragged_exit.models.base import EarlyExitModel, answer
from ragged_exit.rules import ExitRule, Patience
from ragged_exit.scheduler import token_budget_batches
from ragged_exit.training.rows import TokenRows, collate

TARGETS = (1.5, 2.0, 3.0, 4.0)  # layer speed-ups
TOLERANCES = (0.05, 0.1, 0.2, 0.4)  # a regression's patience: the change that still counts as agreement, scores 0 to 5
TOKEN_BUDGET = 4096
CHECKED_ROWS = 128
VALID_ROWS = 2_000  # that thresholds are chosen on, at most
TIMED_SHARE = 0.8  # of the dev rows, others each repeat: every batch is seen once


def metrics(task: str) -> dict[str, Quality]:
    """The task's metrics by name, the one that counts first."""
    if task == "stsb":
        return {"pearson": _of_value(pearson), "spearman": _of_value(spearman)}
    return {"f1": f1, "accuracy": accuracy} if task == "mrpc" else {"accuracy": accuracy}


def _of_value(metric: Callable[[Tensor, Tensor], float]) -> Quality:
    return lambda logits, labels: metric(logits[:, 0], labels)


@dataclass
class Point:
    """One model at one operating point. target: the layer speed-up it was chosen for on validation, None for baselines.

    quality: by metric, on dev. seconds: of each repeat, all points on the same rows. ece, dis: of the answers,
    classification only; dis calls a row difficult when its answer is wrong.
    """

    name: str
    target: float | None
    rule: dict[str, Any]
    quality: dict[str, float]
    layer_speedup: float
    matches: bool
    ece: float | None = None
    dis: float | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class _Ready:
    """A point whose rule is settled, before dev is read."""

    name: str
    target: float | None
    model: EarlyExitModel
    fast: AcceleratedModel


def measure(study: Study, names: Sequence[str], *, repeats: int, say: Callable[[str], Any]) -> list[Point]:
    """Baselines and the systems ``names`` at every target that their exits reach: first all rules, then dev, once."""
    ready = []
    for name in study.baselines():
        model = study.model(name)
        ready.append(_Ready(name, None, model, accelerate(model)))
    for name in names:
        model = study.model(name)
        say(f"{study.task.name}: thresholds of {name}")
        ready += [_Ready(name, target, model, accelerate(model, rule=rule)) for target, rule in _rules(study, model)]
    points = []
    for item in ready:
        say(f"{study.task.name}: {item.name} on dev")
        points.append(_point(study, item))
    for repeat in range(repeats):
        say(f"{study.task.name}: timing, repeat {repeat + 1}")
        rows = _sample(study.dev, repeat)
        for item, point in zip(ready, points, strict=True):
            start = time.perf_counter()
            _answers(item.fast, rows)
            point.seconds.append(time.perf_counter() - start)
    return points


def _rules(study: Study, model: EarlyExitModel) -> list[tuple[float, ExitRule]]:
    """For every target in reach, the rule that meets its depth on validation; the best of them where several do."""
    valid = study.valid.select(range(min(VALID_ROWS, len(study.valid))))
    labels = valid.label_tensor(study.task.num_labels)
    quality = next(iter(metrics(study.task.name).values()))
    tables = [
        exit_table(accelerate(model, rule=rule), valid.sequences, valid.token_type_ids)
        for rule in _variants(study, model)
    ]
    found = []
    for target in TARGETS:
        options: list[tuple[float, ExitRule]] = []
        for table in tables:
            threshold = threshold_for_layers(table, study.num_layers / target)
            if threshold is None:
                continue
            rule = table.rule.with_threshold(threshold)
            options.append((quality(table.under(rule).logits, labels), rule))
        if options:
            found.append((target, _best(options)))
    return found


def _best(options: list[tuple[float, ExitRule]]) -> ExitRule:
    """The rule of the highest quality; NaN, a correlation of answers that are all the same, is the worst."""
    return max(options, key=lambda option: -math.inf if math.isnan(option[0]) else option[0])[1]


def _variants(study: Study, model: EarlyExitModel) -> list[ExitRule]:
    if study.task.num_labels == 1 and isinstance(model.rule, Patience):
        return [Patience(1, tolerance) for tolerance in TOLERANCES]
    return [model.rule]


def _point(study: Study, item: _Ready) -> Point:
    dev, task = study.dev, study.task
    labels = dev.label_tensor(task.num_labels)
    record = _answers(item.fast, dev)
    classes = task.num_labels > 1
    return Point(
        name=item.name,
        target=item.target,
        rule=item.fast.rule.to_dict(),
        quality={name: metric(record.logits, labels) for name, metric in metrics(task.name).items()},
        layer_speedup=layer_speedup(record.executed_layers, study.num_layers),
        matches=_matches(item, dev),
        ece=calibration_error(record.logits, labels) if classes else None,
        dis=_inversion(record.logits, labels) if classes else None,
    )


def _inversion(logits: Tensor, labels: Tensor) -> float:
    return difficulty_inversion(logits.softmax(1).amax(1), logits.argmax(1) != labels)


@torch.inference_mode()
def _answers(fast: AcceleratedModel, examples: Examples) -> ExitRecord:
    """All rows' answers in order, in packed batches."""
    parts = token_budget_batches([len(sequence) for sequence in examples.sequences], TOKEN_BUDGET)
    records = []
    for rows in parts:
        part = examples.select(rows)
        records.append(fast.executor.run(fast.pack_sequences(part.sequences, part.token_type_ids)))
    order = torch.tensor([row for rows in parts for row in rows]).argsort()
    return ExitRecord(*(torch.cat(column)[order] for column in zip(*records, strict=True)))


@torch.inference_mode()
def _matches(item: _Ready, dev: Examples) -> bool:
    """Whether the first dev rows get the padded reference's exits, outside the margin, and its logits."""
    rows = dev.select(range(min(CHECKED_ROWS, len(dev))))
    batch = collate(
        [TokenRows(rows, rows.label_tensor(item.model.config.num_labels), {})[row] for row in range(len(rows))]
    )
    points = item.model.exit_points(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
    rule = item.fast.rule
    wanted = answer([replace(point, rule=rule if point.rule is item.model.rule else point.rule) for point in points])
    found = _answers(item.fast, rows)
    same = found.executed_layers == wanted["executed_layers"]
    close = _close_calls(exit_table(item.fast, rows.sequences, rows.token_type_ids), rule)
    error = (found.logits - wanted["logits"]).abs().amax(1)
    return bool((same | close).all()) and float(error[same].max()) <= MAX_LOGIT_ERROR


def _close_calls(table: ExitTable, rule: ExitRule) -> Tensor:
    """bool ``[N]``: rows with some exit's score within the margin of its threshold; for patience, what it counts."""
    if isinstance(rule, Patience):
        if table.logits.shape[2] == 1:
            gaps = table.logits[..., 0].diff(dim=0).abs() - rule.tolerance
        else:
            gaps = table.logits.topk(2).values.diff()[..., 0]
    else:
        thresholds = torch.tensor([rule.threshold_at(exit_.exit_index) for exit_ in table.exits])
        gaps = table.scores - thresholds[:, None]
    return (gaps.abs() <= MARGIN).any(0)


def _sample(examples: Examples, repeat: int) -> Examples:
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1000 + repeat))
    return examples.select(order[: int(TIMED_SHARE * len(examples))].tolist())
