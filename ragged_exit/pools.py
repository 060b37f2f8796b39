"""SurvivorPools: rows of many batches that wait before the same stage, merged until they fill a token budget."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ragged_exit.arguments import whole_number
from ragged_exit.batch import RaggedBatch
from ragged_exit.buffers import Buffers
from ragged_exit.executor import Departure, ExitRecord, Launched, Lesson, RaggedExecutor, Survivors, conclude

MAX_WAIT = 64  # batches that may enter before a row that waits is run, full pool or not
MAX_BUDGET = 65_535 * 16  # tokens a launch, and so rows: the exit kernels' grid has no more blocks of 16
IN_FLIGHT = 2  # stages queued on a device: one is running while the host reads the other's outcome


class Finished(NamedTuple):
    """A batch whose last row has left: its number in the order of entry, and what became of its rows."""

    number: int
    record: ExitRecord


@dataclass
class _Cohort:
    """One batch that entered. Its rows bear the ids ``first`` ... ``first + rows - 1`` while they are in the pools."""

    first: int
    rows: int
    left: int = 0
    departures: list[Departure] = field(default_factory=list)


@dataclass
class _Filling:
    """A launch in the making: its rows, one after the other in ``hidden`` ``[capacity, H]``.

    entered: when the first of them did, which is the oldest.
    """

    entered: int
    hidden: Tensor
    parts: list[RaggedBatch]
    tokens: int

    def batch(self) -> RaggedBatch:
        """Its rows, of at most the budget's tokens, or one row."""
        if len(self.parts) == 1:
            return self.parts[0]
        return RaggedBatch.merge(self.parts, self.hidden[: self.tokens])


class _Pool:
    """What waits before one stage, oldest first, where it will run: survivors are gathered into launches."""

    def __init__(self, budget: int, buffers: Buffers) -> None:
        self.budget, self.buffers = budget, buffers
        self.fillings: deque[_Filling] = deque()  # all but the last have no room for the row that came next

    def put(self, entered: int, survivors: Survivors, buffer: Tensor) -> None:
        """``buffer``: where the hidden states of ``survivors.batch`` are, from its beginning; it is used up."""
        whole = survivors.all_of_them()
        fits = survivors.batch.tokens <= self.budget <= len(buffer)
        if whole is not None and not self.fillings and fits:  # it can go on as it is
            self.fillings.append(_Filling(entered, buffer, [whole], whole.tokens))
            return
        ends = survivors.seqlens.cumsum(0)
        start, done = 0, 0  # rows and tokens that have found their place
        while start < len(ends):
            room = max(0, self.budget - self.fillings[-1].tokens) if self.fillings else 0
            stop = int(torch.searchsorted(ends, done + room, right=True))
            if stop == start:  # not one fits; a row beyond the budget runs alone
                stop = max(start + 1, int(torch.searchsorted(ends, done + self.budget, right=True)))
                self.fillings.append(
                    _Filling(entered, self.buffers.take(max(int(ends[stop - 1]) - done, self.budget), buffer), [], 0)
                )
            filling, tokens = self.fillings[-1], int(ends[stop - 1]) - done
            place = filling.hidden[filling.tokens : filling.tokens + tokens]
            filling.parts.append(survivors.part(start, stop, place))
            filling.tokens += tokens
            start, done = stop, done + tokens
        self.buffers.give_back(buffer)

    @property
    def full(self) -> bool:
        return len(self.fillings) > 1 or (bool(self.fillings) and self.fillings[0].tokens >= self.budget)

    def oldest(self) -> int:
        return self.fillings[0].entered  # rows never overtake each other


class SurvivorPools:
    """Keeps the stages' batches full: survivors wait until enough have come together, and run as one batch.

    A batch enters with ``put`` and comes back, as an ExitRecord, from a later ``put`` or from ``flush``, when its last
    row has left. A pool runs when it holds ``token_budget`` tokens, the deepest full one first, so that few rows wait;
    or when a row in it has seen ``max_wait`` batches enter, so that none waits for ever. An answer does not depend on
    who is merged with whom beyond what batching itself changes: on the native CPU path in fp32, nothing.

    Where the host would wait for a device, stages are read one late: the next is queued before the last is read. On a
    CPU each is read at once.

    Rules' hooks see the batches as they entered, each when all of its rows have left.
    """

    def __init__(self, executor: RaggedExecutor, token_budget: int, *, max_wait: int = MAX_WAIT) -> None:
        token_budget = whole_number("token_budget", token_budget)
        if not 1 <= token_budget <= MAX_BUDGET:  # a launch has memory for all of it
            raise ValueError(f"token_budget: expected 1 to {MAX_BUDGET:,}, got {token_budget:,}")
        if max_wait < 0:
            raise ValueError(f"max_wait: expected at least 0 batches, got {max_wait}")
        self.executor, self.token_budget, self.max_wait = executor, token_budget, max_wait
        # the first stays empty: batches run as they enter
        self._pools = [_Pool(token_budget, executor.buffers) for _ in executor.stages]
        self._cohorts: dict[int, _Cohort] = {}  # by number, in the order of entry
        # when the oldest row entered, the stage, and where its hidden states are
        self._flight: deque[tuple[int, Launched, Tensor]] = deque()
        self._lessons: list[Lesson] = []
        self._entered = 0
        self._rows = 0

    def put(self, batch: RaggedBatch) -> list[Finished]:
        """Run the first stage of ``batch`` (before its embeddings; sample_ids 0 ... B - 1), then every full pool."""
        self._cohorts[self._entered] = _Cohort(self._rows, batch.rows)
        entering = replace(batch, sample_ids=batch.sample_ids + self._rows)
        self._rows += batch.rows
        finished = self._run(0, self._entered, entering)
        self._entered += 1
        while True:
            if (stage := self._due()) is not None:
                finished += self._run_waiting(stage)
            elif self._flight and self._overdue(self._flight[0][0]):
                finished += self._read()
            else:
                return finished

    def flush(self) -> list[Finished]:
        """Run all that waits, shallow to deep."""
        finished = []
        while True:
            waiting = next((stage for stage, pool in enumerate(self._pools) if pool.fillings), None)
            if waiting is not None:
                finished += self._run_waiting(waiting)
            elif self._flight:
                finished += self._read()
            else:
                return finished

    def _due(self) -> int | None:
        """The next stage to run: the deepest full pool, else the shallowest with a row that has waited too long."""
        for stage in reversed(range(len(self._pools))):
            if self._pools[stage].full:
                return stage
        for stage, pool in enumerate(self._pools):
            if pool.fillings and self._overdue(pool.oldest()):
                return stage
        return None

    def _overdue(self, entered: int) -> bool:
        """Whether rows that came with batch number ``entered`` have seen too many others enter."""
        return self._entered - entered > self.max_wait

    def _run_waiting(self, number: int) -> list[Finished]:
        """Queue the next launch of a stage where rows wait."""
        filling = self._pools[number].fillings.popleft()
        return self._run(number, filling.entered, filling.batch(), filling.hidden)

    def _run(self, number: int, entered: int, batch: RaggedBatch, buffer: Tensor | None = None) -> list[Finished]:
        """Queue one stage on a batch whose oldest row came with batch number ``entered``; read what is due.

        buffer: where the batch's hidden states are, from its beginning, if it has any.
        """
        firsts = torch.tensor([cohort.first for cohort in self._cohorts.values()], device="cpu")
        launched = self.executor.launch(number, batch, firsts=firsts)
        if buffer is None or self.executor.stages[number].restart:  # then they are fresh from the embeddings
            assert launched.batch.hidden is not None
            buffer = launched.batch.hidden
        self._flight.append((entered, launched, buffer))
        finished = []
        while len(self._flight) >= (1 if batch.live_on_host else IN_FLIGHT):
            finished += self._read()
        return finished

    def _read(self) -> list[Finished]:
        """Read the oldest stage in flight: its survivors wait before the next."""
        entered, launched, buffer = self._flight.popleft()
        departure, survivors = self.executor.settle(launched, self._lessons)
        if survivors is None:
            self.executor.buffers.give_back(buffer)
        else:
            self._pools[launched.number + 1].put(entered, survivors, buffer)
        if len(departure.sample_ids) == 0:
            return []
        self._teach(departure)
        return self._credit(departure)

    def _credit(self, departure: Departure) -> list[Finished]:
        """Credit the rows that left to the batches they came with; those that are complete."""
        cohorts = list(self._cohorts.items())
        firsts = np.array([cohort.first for _, cohort in cohorts])
        places = firsts.searchsorted(departure.sample_ids.numpy(), side="right") - 1
        finished, start = [], 0
        for (number, cohort), size in zip(cohorts, np.bincount(places, minlength=len(cohorts)).tolist(), strict=True):
            if size == 0:
                continue
            rows = slice(start, start + size)  # places rise: pools are queues, survivors keep order
            share = Departure(
                departure.stage,
                departure.sample_ids[rows] - cohort.first,
                departure.logits[rows],
                departure.score[rows],
            )
            start += size
            cohort.departures.append(share)
            cohort.left += size
            if cohort.left == cohort.rows:
                del self._cohorts[number]
                finished.append(Finished(number, conclude(cohort.rows, cohort.departures, ())))
        return finished

    def _teach(self, departure: Departure) -> None:
        """Rules that learn: a lesson is over when all of its rows have left."""
        for lesson in list(self._lessons):
            lesson.waiting -= int(torch.isin(departure.sample_ids, lesson.sample_ids).sum())
            if lesson.waiting == 0:
                lesson.teach()
                self._lessons.remove(lesson)
