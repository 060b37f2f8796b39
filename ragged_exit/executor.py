"""RaggedExecutor: run layers, ask the exit, keep the survivors, until nobody is left. Knows stages, not systems."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ragged_exit.batch import RaggedBatch, token_bucket
from ragged_exit.buffers import Buffers
from ragged_exit.encoder import PackedEncoder, run_layers
from ragged_exit.graphs import LayerGraphs
from ragged_exit.heads import MlpHead, TokenHead
from ragged_exit.ops import ExitDecision, compact, exit_decide, exit_step
from ragged_exit.rules import ExitRule
from ragged_exit.transfer import ToHost, to_device

COHORT_TOKENS = 8192  # not measured yet: below this, two cohorts may keep the host busier than the device


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
    """What became of every row, in the caller's order, in host memory.

    logits: f32 ``[N, C]``; score: f32 ``[N]``, at the exit that answered; exit_layer, exit_member, executed_layers:
    int64 ``[N]``.
    """

    logits: Tensor
    score: Tensor
    exit_layer: Tensor
    exit_member: Tensor
    executed_layers: Tensor


class Departure(NamedTuple):
    """The rows that left at a stage: their places int64 ``[n]``, logits f32 ``[n, C]`` and scores f32 ``[n]``; host."""

    stage: Stage
    sample_ids: Tensor
    logits: Tensor
    score: Tensor


class Launched(NamedTuple):
    """Stage ``number``, queued on ``batch``: its decision, and what the host must know of it, on the way there.

    thresholds: those that a rule which learns gave the rows as the stage began, else None.
    """

    number: int
    batch: RaggedBatch
    decision: ExitDecision
    answers: ToHost  # sample_ids, logits, score, live, exits: of the live rows
    thresholds: Tensor | None


class Survivors(NamedTuple):
    """The rows that go on after a stage, still where it left them. seqlens: int32 ``[n]``, the truth, on the host."""

    batch: RaggedBatch
    decision: ExitDecision
    seqlens: Tensor
    impl: str | None

    def all_of_them(self) -> RaggedBatch | None:
        """The batch as it is, where nobody left."""
        if len(self.seqlens) < self.batch.rows:
            return None
        return replace(self.batch, state={**self.batch.state, **self.decision.state})

    def compacted(self) -> RaggedBatch:
        """A batch of them all."""
        whole = self.all_of_them()
        if whole is not None:
            return whole
        compacted = compact(self.batch, self.decision, token_bucket(int(self.seqlens.sum())), impl=self.impl)
        return compacted if self.batch.live_on_host else replace(compacted, seqlens=self.seqlens)

    def part(self, start: int, stop: int, out: Tensor) -> RaggedBatch:
        """A batch of the survivors ``start:stop``, their hidden states in ``out`` ``[tokens, H]``."""
        seqlens, ends = self.seqlens[start:stop], self.decision.cu_seqlens[start : stop + 1]
        some = self.decision._replace(
            survivors=self.decision.survivors[start:stop],
            cu_seqlens=ends - ends[0] if start else ends,
            live=to_device(seqlens.new_tensor([stop - start, len(out)]), self.batch.device),
        )
        compacted = compact(self.batch, some, len(out), out=out, impl=self.impl)
        return compacted if self.batch.live_on_host else replace(compacted, seqlens=seqlens)


class RaggedExecutor:
    """Runs a list of stages on batches; the last stage answers for everybody who is left.

    Neighbouring stages with the same rule object share its row state; a stage with another rule starts that rule anew.
    graphs: CUDA graphs to run layers with, which only a GPU has.

    Raises ValueError for an empty list, or a first stage that does not start from token ids.
    """

    def __init__(self, stages: Sequence[Stage], *, impl: str | None = None, graphs: LayerGraphs | None = None) -> None:
        if not stages or not stages[0].restart:
            raise ValueError("stages: expected at least one, the first with restart=True")
        self.stages = list(stages)
        self.impl = impl
        self._run_layers = run_layers if graphs is None else graphs.run
        self.buffers = Buffers(len(stages) + 2)  # a launch in the making before each stage, one that runs, a new one
        last_restart = max(number for number, stage in enumerate(stages) if stage.restart)
        self._keeps_ids = [number < last_restart for number in range(len(stages))]

    def run(self, batch: RaggedBatch, on_decision: Callable[[ExitDecision], None] | None = None) -> ExitRecord:
        """Run ``batch`` (before its embeddings) to the end. ``sample_ids`` must be 0 ... B - 1 in some order.

        on_decision sees each stage's decision as it is made (calibration's view).
        """
        cohorts = [batch] if on_decision is not None else self._cohorts(batch)
        flight = deque(self.launch(0, cohort) for cohort in cohorts)
        departures: list[Departure] = []
        lessons: list[Lesson] = []
        while flight:
            launched = flight.popleft()
            if on_decision is not None:
                on_decision(launched.decision)
            departure, survivors = self.settle(launched, lessons)
            departures.append(departure)
            if survivors is not None:
                flight.append(self.launch(launched.number + 1, survivors.compacted()))
        return conclude(batch.rows, departures, lessons)

    def _cohorts(self, batch: RaggedBatch) -> list[RaggedBatch]:
        """The batch, or where the host waits for a device its two halves, so that one runs while the other is read.

        Not for rules that choose thresholds: they see the batch as it came.
        """
        chooses = any(_chooses(stage.rule) for stage in self.stages)
        if batch.live_on_host or chooses or batch.rows == 1 or batch.tokens < 2 * COHORT_TOKENS:
            return [batch]
        half = min(batch.rows - 1, 1 + int(torch.searchsorted(batch.seqlens.cumsum(0), batch.tokens // 2)))  # rows
        return [batch.part(0, half), batch.part(half, batch.rows)]

    def launch(self, number: int, batch: RaggedBatch, *, firsts: Tensor | None = None) -> Launched:
        """Queue stage ``number`` on the rows that wait before it. Nothing is read from the device.

        firsts: int64, rising, where the rows came in several batches: the first of each one's ``sample_ids``, which
        rules see counted from there.
        """
        stage, thresholds = self.stages[number], None
        if number == 0 or stage.rule is not self.stages[number - 1].rule:
            batch, thresholds = _adopt(stage.rule, batch, keep_thresholds=number == 0, firsts=firsts)
        if stage.restart:
            batch = stage.encoder.embed(batch, self.buffers)
        if not self._keeps_ids[number] and batch.input_ids is not None:
            batch = replace(batch, input_ids=None, token_type_ids=None, position_ids=None)
        of_means = isinstance(stage.head, MlpHead) and stage.head.pooling == "mean"
        means = self._run_layers(stage.encoder, stage.layers, batch, with_means=of_means)
        batch, decision = self._ask(stage, batch, means, number == len(self.stages) - 1)
        of_rows = (batch.sample_ids, decision.logits, decision.score)
        answers = ToHost([*(value[: batch.rows] for value in of_rows), decision.live, decision.exits[: batch.rows]])
        return Launched(number, batch, decision, answers, thresholds)

    def settle(self, launched: Launched, lessons: list[Lesson]) -> tuple[Departure, Survivors | None]:
        """Who left at a stage, and who waits before the next (None: nobody). Waits for that stage alone.

        lessons: of the rows' rules so far; a rule that started with the stage and learns adds one.
        """
        stage, batch = self.stages[launched.number], launched.batch
        sample_ids, logits, score, live, exits = launched.answers.read()
        if launched.thresholds is not None:
            lessons.append(Lesson(stage.rule, sample_ids, launched.thresholds))
        for lesson in lessons:
            if lesson.rule is stage.rule:
                lesson.note(stage.exit_index, sample_ids, score)
        left = exits.nonzero()[:, 0]
        departure = Departure(stage, sample_ids[left], logits[left], score[left])
        if not int(live[0]):
            return departure, None
        return departure, Survivors(batch, launched.decision, batch.seqlens[~exits], self.impl)

    def _ask(
        self, stage: Stage, batch: RaggedBatch, means: Tensor | None, final: bool
    ) -> tuple[RaggedBatch, ExitDecision]:
        if isinstance(stage.head, MlpHead):
            index = stage.exit_index
            decision = exit_step(batch, stage.head, stage.rule, final, exit_index=index, means=means, impl=self.impl)
            return batch, decision
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


def _chooses(rule: ExitRule) -> bool:
    """Whether it has thresholds for single rows."""
    return type(rule).start is not ExitRule.start


def _adopt(
    rule: ExitRule, batch: RaggedBatch, *, keep_thresholds: bool, firsts: Tensor | None
) -> tuple[RaggedBatch, Tensor | None]:
    """Give the live rows what ``rule`` starts with: state, and thresholds unless the caller brought some.

    Also those thresholds f32 ``[rows]``, on the host, where the rule chose them and learns.
    """
    state = batch.state | rule.initial_state(batch.row_capacity, batch.device)
    if not keep_thresholds:
        state.pop("threshold", None)
    chosen = None
    if "threshold" not in state and _chooses(rule):
        ids = batch.sample_ids[: batch.rows]
        if firsts is not None:
            firsts = to_device(firsts, batch.device)
            ids = ids - firsts[torch.searchsorted(firsts, ids, right=True) - 1]
        chosen = rule.start(ids)
    if chosen is not None:
        chosen = chosen.to(device="cpu", dtype=torch.float32)
        state["threshold"] = to_device(F.pad(chosen, (0, batch.row_capacity - batch.rows)), batch.device)
    return replace(batch, state=state), chosen if rule.learns else None


def conclude(rows: int, departures: Sequence[Departure], lessons: Sequence[Lesson]) -> ExitRecord:
    """All ``rows`` of a batch have left: their record. Lessons are taught; all rules that were asked hear the end."""
    record = _gather(rows, departures)
    for lesson in lessons:
        lesson.teach()
    for rule in {id(departure.stage.rule): departure.stage.rule for departure in departures}.values():
        rule.finish(torch.arange(rows, device="cpu"), record.score, record.exit_layer)
    return record


def _gather(rows: int, departures: Sequence[Departure]) -> ExitRecord:
    """What ``departures`` say of the rows 0 ... rows - 1, each of which left once."""
    ids = torch.cat([departure.sample_ids for departure in departures])
    order = torch.empty_like(ids)
    order[ids] = torch.arange(rows, device="cpu")
    counts = torch.tensor([len(departure.sample_ids) for departure in departures], device="cpu")

    def repeat(values: list[int]) -> Tensor:
        return torch.repeat_interleave(torch.tensor(values, device="cpu"), counts)[order]

    stages = [departure.stage for departure in departures]
    return ExitRecord(
        logits=torch.cat([departure.logits for departure in departures])[order],
        score=torch.cat([departure.score for departure in departures])[order],
        exit_layer=repeat([stage.exit_layer for stage in stages]),
        exit_member=repeat([stage.member for stage in stages]),
        executed_layers=repeat([stage.executed_layers for stage in stages]),
    )
