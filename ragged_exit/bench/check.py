"""What contenders must answer, and whether they do."""

from __future__ import annotations

import statistics
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
OWN_ERRORS = 4  # where PyTorch's own error is known, the margin in such errors
FEW = 0.01  # share of rows, or one, that may differ: in fp32 inside the margin, in less outside it and in their label
MAX_ACCURACY_LOSS = 0.003  # bf16, or one row
MAX_DEPTH_CHANGE = 0.05  # bf16: of the mean exit layer


@dataclass(frozen=True)
class References:
    """What contenders must match on a workload's first N rows: full depth, and the early-exit model run row by row.

    may_leave: bool ``[N, layers + 1]``, the layers where a row may leave: several where scores are within the margin.
    """

    full: Answers
    exits: Answers
    may_leave: Tensor

    @property
    def close(self) -> int:
        """How many rows may leave at one layer or another."""
        return int((self.may_leave.sum(1) > 1).sum())


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
def references(model: DeeBert, rule: ExitRule, workload: Workload, lower: DeeBert | None = None) -> References:
    """Run the plain reference model one row at a time: every exit of every row, and which of them answers.

    lower: the same model in the dtype and on the device that contenders compute in, where that is not ``model``'s. It
    runs too: a row's margin is four times the largest difference between its two scores at an exit.
    """
    full, logits, layers, may_leave = [], [], [], []
    for row in range(len(workload)):
        points = _exit_points(model, rule, workload, row)
        output: Any = answer(points)  # all its fields are set
        full.append(points[-1].output.logits)
        logits.append(output.logits)
        layers.append(output.exit_layer)
        scores, margin = _scores(points), MARGIN
        if lower is not None:
            own = (scores - _scores(_exit_points(lower, rule, workload, row))).abs()
            margin = max(margin, OWN_ERRORS * float(own.max()) if len(own) else 0.0)
        may_leave.append(_may_leave(points, scores, margin))
    depth = model.config.num_hidden_layers
    return References(
        Answers(torch.cat(full).float(), torch.full((len(full),), depth)),
        Answers(torch.cat(logits).float(), torch.cat(layers)),
        torch.stack(may_leave),
    )


def _exit_points(model: DeeBert, rule: ExitRule, workload: Workload, row: int) -> list[ExitPoint]:
    part, device = workload.select([row]), model.device
    ids = torch.tensor(part.sequences, device=device)
    types = None if part.token_type_ids is None else torch.tensor(part.token_type_ids, device=device)
    return [replace(point, rule=rule) for point in model.exit_points(ids, torch.ones_like(ids), types)]


def _scores(points: list[ExitPoint]) -> Tensor:
    """Of every exit but the last, which asks nobody: ``[exits - 1]`` on the CPU, of one row."""
    found = [exit_score(point.output.logits.float().cpu(), point.rule) for point in points[:-1]]
    return torch.cat(found) if found else torch.empty(0)


def _may_leave(points: list[ExitPoint], scores: Tensor, margin: float) -> Tensor:
    """bool ``[layers + 1]``: where a row may leave that may stay at all exits before."""
    layers = torch.zeros(points[-1].exit_layer + 1, dtype=torch.bool)
    for point, score in zip(points[:-1], scores.tolist(), strict=True):
        inside = point.rule.threshold_at(point.exit_index) - score  # how far
        if point.rule.compare.startswith(">"):
            inside = -inside
        if inside >= -margin:
            layers[point.exit_layer] = True
        if inside > margin:
            return layers
    layers[points[-1].exit_layer] = True
    return layers


def check(measured: Measured, workload: Workload, expected: References, dtype: torch.dtype) -> None:
    """Fill in accuracy (of contenders that answer every row) and whether the answers match their reference.

    All logits are finite. fp32: labels equal, |logit difference| <= 1e-3 and exit layers equal; excused are rows that
    left elsewhere, where a score inside the margin allows it, at most 1 % of them (or one). bf16: 1 % of the labels (or
    one) may differ, and as many rows leave where their scores do not allow it; accuracy is within 0.3 points (or one
    row) and the mean exit layer within 5 %.
    """
    answers, wanted = measured.answers, expected.exits if measured.contender.exits else expected.full
    if workload.labels is not None and len(answers.logits) == len(workload):
        measured.accuracy = float((answers.logits.argmax(1) == workload.labels).double().mean())
    rows = min(len(answers.logits), len(wanted.logits))
    answers = Answers(answers.logits[:rows], answers.exit_layer[:rows])
    wanted = Answers(wanted.logits[:rows], wanted.exit_layer[:rows])
    elsewhere = answers.exit_layer != wanted.exit_layer
    excused = elsewhere & expected.may_leave[torch.arange(rows), answers.exit_layer] & measured.contender.exits
    labels, wanted_labels = answers.logits.argmax(1), wanted.logits.argmax(1)
    measured.agreement = float((labels == wanted_labels).double().mean())
    measured.wrong_exits = int((elsewhere & ~excused).sum())
    errors = (answers.logits - wanted.logits)[~excused].abs()
    measured.max_logit_error = float(errors.max()) if len(errors) else 0.0
    few = max(1, FEW * rows)
    if dtype == torch.float32:
        same_labels = bool((labels == wanted_labels)[~excused].all())
        exact = measured.max_logit_error <= MAX_LOGIT_ERROR and measured.wrong_exits == 0
        matches = same_labels and exact and int(excused.sum()) <= few
    else:
        lost = 0
        if workload.labels is not None:
            truth = workload.labels[:rows]
            lost = int((wanted_labels == truth).sum() - (labels == truth).sum())
        depth, wanted_depth = (layers.double().mean() for layers in (answers.exit_layer, wanted.exit_layer))
        as_deep = bool((depth - wanted_depth).abs() <= MAX_DEPTH_CHANGE * wanted_depth)
        few_differ = max(int((labels != wanted_labels).sum()), measured.wrong_exits) <= few
        matches = few_differ and lost <= max(1, MAX_ACCURACY_LOSS * rows) and as_deep
    measured.matches = matches and bool(answers.logits.isfinite().all())
