"""RaggedExecutor: run layers, ask the exit, keep the survivors, until nobody is left. Knows stages, not systems."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ragged_exit.batch import RaggedBatch, token_bucket
from ragged_exit.encoder import PackedEncoder
from ragged_exit.heads import MlpHead, TokenHead
from ragged_exit.ops import ExitDecision, compact, exit_decide, exit_step
from ragged_exit.rules import ExitRule


@dataclass(frozen=True)
class Stage:
    """Run ``layers`` (perhaps none) of ``encoder`` on the live rows, then ask ``head`` and ``rule`` who leaves.

    exit_index: which of the rule's thresholds. exit_layer, member: what a row that leaves here reports.
    executed_layers: layers that such a row has run in all, restarts included. restart: begin from the token ids (a
    model's first stage).
    """

    encoder: PackedEncoder
    layers: Sequence[int]
    head: MlpHead | TokenHead
    rule: ExitRule
    exit_index: int
    exit_layer: int
    executed_layers: int
    member: int = 1
    restart: bool = False


class ExitRecord(NamedTuple):
    """What became of every row, in the caller's order.

    logits: f32 ``[N, C]``; score: f32 ``[N]``, at the exit that answered; exit_layer, exit_member, executed_layers:
    int64 ``[N]``.
    """

    logits: Tensor
    score: Tensor
    exit_layer: Tensor
    exit_member: Tensor
    executed_layers: Tensor


class Departure(NamedTuple):
    """The rows that left at a stage: their places int64 ``[n]``, logits f32 ``[n, C]`` and scores f32 ``[n]``."""

    stage: Stage
    sample_ids: Tensor
    logits: Tensor
    score: Tensor


class Asked(NamedTuple):
    """A stage's decision on the rows ``sample_ids`` int64 ``[Bcap]``."""

    stage: Stage
    sample_ids: Tensor
    decision: ExitDecision

    def departure(self) -> Departure:
        """Who leaves. The host waits for the decision."""
        left = self.decision.exits.nonzero()[:, 0]
        return Departure(self.stage, self.sample_ids[left], self.decision.logits[left], self.decision.score[left])


class Waiting(NamedTuple):
    """A batch before a stage, and how many of its rows live (its capacity may be larger)."""

    batch: RaggedBatch
    rows: int


class RaggedExecutor:
    """Runs a list of stages on batches; the last stage answers for everybody who is left.

    Neighbouring stages with the same rule object share its row state; a stage with another rule starts that rule anew.
    Raises ValueError for an empty list, or a first stage that does not start from token ids.
    """

    def __init__(self, stages: Sequence[Stage], *, impl: str | None = None) -> None:
        if not stages or not stages[0].restart:
            raise ValueError("stages: expected at least one, the first with restart=True")
        self.stages = list(stages)
        self.impl = impl
        last_restart = max(number for number, stage in enumerate(stages) if stage.restart)
        self._keeps_ids = [number < last_restart for number in range(len(stages))]

    def run(self, batch: RaggedBatch, on_decision: Callable[[ExitDecision], None] | None = None) -> ExitRecord:
        """Run ``batch`` (before its embeddings) to the end. ``sample_ids`` must be 0 ... B - 1 in some order.

        on_decision sees each stage's decision as it is made (calibration's view).
        """
        rows = batch.rows
        asked: list[Asked] = []
        lessons: list[Lesson] = []
        waiting: Waiting | None = Waiting(batch, rows)
        for number in range(len(self.stages)):
            if waiting is None:
                break
            answer, waiting = self.step(number, waiting, lessons, on_decision)
            asked.append(answer)
        return conclude(rows, [answer.departure() for answer in asked], lessons)

    def step(
        self,
        number: int,
        waiting: Waiting,
        lessons: list[Lesson],
        on_decision: Callable[[ExitDecision], None] | None = None,
    ) -> tuple[Asked, Waiting | None]:
        """Run stage ``number`` on the rows that wait before it: its decision, and who waits before the next (or None).

        lessons: of the rows' rules so far; a rule that starts here and learns adds one.
        """
        stage, (batch, rows) = self.stages[number], waiting
        if number == 0 or stage.rule is not self.stages[number - 1].rule:
            batch = _adopt(stage.rule, batch, rows, lessons, keep_thresholds=number == 0)
        if stage.restart:
            batch = stage.encoder.embed(batch)
        if not self._keeps_ids[number]:
            batch = replace(batch, input_ids=None, token_type_ids=None, position_ids=None)
        for layer in stage.layers:
            batch = stage.encoder.layer(layer, batch)
        batch, decision = self._ask(stage, batch, number == len(self.stages) - 1)
        for lesson in lessons:
            if lesson.rule is stage.rule:
                lesson.note(stage.exit_index, batch.sample_ids[:rows], decision.score[:rows])
        if on_decision is not None:
            on_decision(decision)
        asked = Asked(stage, batch.sample_ids, decision)
        survivors, tokens = decision.live.tolist()  # on a GPU the one wait of a stage
        if survivors == 0:
            return asked, None
        if survivors < rows:
            batch = compact(batch, decision, token_bucket(tokens), impl=self.impl)
        else:  # nobody left: only the rule's state moves on
            batch = replace(batch, state={**batch.state, **decision.state})
        return asked, Waiting(batch, survivors)

    def _ask(self, stage: Stage, batch: RaggedBatch, final: bool) -> tuple[RaggedBatch, ExitDecision]:
        if isinstance(stage.head, MlpHead):
            return batch, exit_step(batch, stage.head, stage.rule, final, exit_index=stage.exit_index, impl=self.impl)
        batch = replace(batch, state=dict(batch.state))  # the head may replace entries; the caller's dict stays
        output = stage.head(batch)
        return batch, exit_decide(
            batch, output.logits, stage.rule, final, signal=output.signal, exit_index=stage.exit_index, impl=self.impl
        )


class Lesson:
    """Collects what an online rule learns from: the rows that it gave thresholds to, and their scores at every exit."""

    def __init__(self, rule: ExitRule, sample_ids: Tensor, thresholds: Tensor) -> None:
        self.rule = rule
        self.sample_ids, order = sample_ids.sort()
        self.thresholds = thresholds[order]
        self.waiting = len(sample_ids)  # rows that have not left yet, for whoever runs them in several batches
        self.asked: list[tuple[int, Tensor, Tensor]] = []  # (exit index, places of the rows, their scores)

    def note(self, exit_index: int, sample_ids: Tensor, scores: Tensor) -> None:
        """These rows, and perhaps others', were asked at this exit and got these scores f32 ``[rows]``."""
        ours = torch.isin(sample_ids, self.sample_ids)
        self.asked.append((exit_index, torch.searchsorted(self.sample_ids, sample_ids[ours]), scores[ours]))

    def teach(self) -> None:
        """Every row has left: tell the rule."""
        rows, exits = len(self.sample_ids), 1 + max(index for index, _, _ in self.asked)
        scores = self.thresholds.new_full((rows, exits), math.nan)
        last = torch.zeros(rows, dtype=torch.int64, device=scores.device)
        for index, places, score in self.asked:
            scores[places, index] = score.to(scores.dtype)
            last[places] = index
        self.rule.learn(self.thresholds, scores, last)


def _adopt(
    rule: ExitRule, batch: RaggedBatch, rows: int, lessons: list[Lesson], *, keep_thresholds: bool
) -> RaggedBatch:
    """Give the ``rows`` live rows what ``rule`` starts with: state, and thresholds unless the caller brought some."""
    state = batch.state | rule.initial_state(batch.row_capacity, batch.device)
    if not keep_thresholds:
        state.pop("threshold", None)
    if "threshold" not in state:
        sample_ids = batch.sample_ids[:rows]
        thresholds = rule.start(sample_ids)
        if thresholds is not None:
            thresholds = thresholds.to(device=batch.device, dtype=torch.float32)
            state["threshold"] = F.pad(thresholds, (0, batch.row_capacity - rows))
            if rule.learns:
                lessons.append(Lesson(rule, sample_ids, thresholds))
    return replace(batch, state=state)


def conclude(rows: int, departures: Sequence[Departure], lessons: Sequence[Lesson]) -> ExitRecord:
    """All ``rows`` of a batch have left: their record. Lessons are taught; all rules that were asked hear the end."""
    record = _gather(rows, departures)
    for lesson in lessons:
        lesson.teach()
    for rule in {id(departure.stage.rule): departure.stage.rule for departure in departures}.values():
        rule.finish(torch.arange(rows, device=record.score.device), record.score, record.exit_layer)
    return record


def _gather(rows: int, departures: Sequence[Departure]) -> ExitRecord:
    """What ``departures`` say of the rows 0 ... rows - 1, each of which left once."""
    ids = torch.cat([departure.sample_ids for departure in departures])
    order = torch.empty_like(ids)
    order[ids] = torch.arange(rows, device=ids.device)
    counts = torch.tensor([len(departure.sample_ids) for departure in departures], device="cpu")

    def repeat(values: list[int]) -> Tensor:
        return torch.repeat_interleave(torch.tensor(values, device="cpu"), counts).to(ids.device)[order]

    stages = [departure.stage for departure in departures]
    return ExitRecord(
        logits=torch.cat([departure.logits for departure in departures])[order],
        score=torch.cat([departure.score for departure in departures])[order],
        exit_layer=repeat([stage.exit_layer for stage in stages]),
        exit_member=repeat([stage.member for stage in stages]),
        executed_layers=repeat([stage.executed_layers for stage in stages]),
    )
