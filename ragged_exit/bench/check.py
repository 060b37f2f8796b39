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
ELSEWHERE = 0.5  # bf16: share of timed rows that leave elsewhere than another contender's; measured: up to a quarter


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
    differs_when_timed: bool = False

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
    wanted, labels = expected.exits if measured.contender.exits else expected.full, workload.labels
    if labels is not None and len(measured.answers.logits) == len(workload):
        measured.accuracy = float((measured.answers.logits.argmax(1) == labels).double().mean())
    answers, wanted = _common_rows(measured.answers, wanted)
    may_leave = expected.may_leave[torch.arange(len(answers.logits)), answers.exit_layer] & measured.contender.exits
    found = _compare(answers, wanted, may_leave, labels, dtype)
    measured.agreement, measured.wrong_exits = found.agreement, found.wrong_exits
    measured.max_logit_error, measured.matches = found.max_logit_error, found.matches


def check_timed(
    measured: Measured, answers: Answers, wanted: Answers, labels: Tensor | None, dtype: torch.dtype
) -> None:
    """``measured`` matches no more where ``answers``, which were timed, differ from another contender's to all rows.

    As ``check``, but no scores are known: in fp32 1 % of the rows (or one) may leave elsewhere, in bf16 half of them.
    """
    answers, wanted = _common_rows(answers, wanted)
    may_leave = torch.full((len(answers.logits),), measured.contender.exits)
    elsewhere = int((answers.exit_layer != wanted.exit_layer).sum())
    few = elsewhere <= max(1, ELSEWHERE * len(may_leave))
    if not (few and _compare(answers, wanted, may_leave, labels, dtype).matches):
        measured.matches, measured.differs_when_timed = False, True


def _common_rows(answers: Answers, wanted: Answers) -> tuple[Answers, Answers]:
    rows = min(len(answers.logits), len(wanted.logits))
    first, second = (Answers(each.logits[:rows], each.exit_layer[:rows]) for each in (answers, wanted))
    return first, second


@dataclass(frozen=True)
class _Comparison:
    agreement: float
    wrong_exits: int
    max_logit_error: float
    matches: bool


def _compare(
    answers: Answers, wanted: Answers, may_leave: Tensor, labels: Tensor | None, dtype: torch.dtype
) -> _Comparison:
    """Of equally many rows. may_leave: bool ``[N]``, rows that may leave where they did though ``wanted`` did not."""
    rows = len(answers.logits)
    elsewhere = answers.exit_layer != wanted.exit_layer
    excused = elsewhere & may_leave
    wrong_exits = int((elsewhere & ~excused).sum())
    chosen, wanted_labels = answers.logits.argmax(1), wanted.logits.argmax(1)
    errors = (answers.logits - wanted.logits)[~excused].abs()
    max_logit_error = float(errors.max()) if len(errors) else 0.0
    few = max(1, FEW * rows)
    if dtype == torch.float32:
        same_labels = bool((chosen == wanted_labels)[~excused].all())
        exact = max_logit_error <= MAX_LOGIT_ERROR and wrong_exits == 0
        matches = same_labels and exact and int(excused.sum()) <= few
    else:
        lost = 0
        if labels is not None:
            lost = int((wanted_labels == labels[:rows]).sum() - (chosen == labels[:rows]).sum())
        depth, wanted_depth = (each.exit_layer.double().mean() for each in (answers, wanted))
        as_deep = bool((depth - wanted_depth).abs() <= MAX_DEPTH_CHANGE * wanted_depth)
        few_differ = max(int((chosen != wanted_labels).sum()), wrong_exits) <= few
        matches = few_differ and lost <= max(1, MAX_ACCURACY_LOSS * rows) and as_deep
    agreement = float((chosen == wanted_labels).double().mean())
    return _Comparison(agreement, wrong_exits, max_logit_error, matches and bool(answers.logits.isfinite().all()))
