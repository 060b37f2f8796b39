"""SurvivorPools: rows of many batches that wait before the same stage, merged until they fill a token budget."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ragged_exit.batch import RaggedBatch
from ragged_exit.executor import Departure, ExitRecord, Launched, Lesson, RaggedExecutor, conclude

MAX_WAIT = 64  # batches that may enter before a row that waits is run, full pool or not
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


class _Pool:
    """What waits before one stage, oldest first."""

    def __init__(self) -> None:
        self.parts: deque[tuple[int, RaggedBatch]] = deque()  # (when the oldest of its rows entered, rows)
        self.tokens = 0

    def put(self, entered: int, part: RaggedBatch) -> None:
        self.parts.append((entered, part))
        self.tokens += part.tokens

    def oldest(self) -> int:
        return min(entered for entered, _ in self.parts)

    def take(self, budget: int) -> tuple[int, RaggedBatch]:
        """Rows of at most ``budget`` tokens, or one row; a part that does not fit whole is cut."""
        since, part = self.parts[0]
        if part.tokens == self.tokens <= budget:  # all there is: no copy
            self.parts.clear()
            self.tokens = 0
            return since, part
        taken: list[RaggedBatch] = []
        entered, room = since, budget
        while self.parts:
            since, part = self.parts.popleft()
            rows = int(torch.searchsorted(part.seqlens.cumsum(0), room, right=True))  # that fit
            if rows == 0 and not taken:
                rows = 1
            if rows < part.rows:
                self.parts.appendleft((since, part.part(rows, part.rows)))
                if rows == 0:
                    break
                part = part.part(0, rows)
            taken.append(part)
            entered = min(entered, since)
            room -= taken[-1].tokens
            if room <= 0:
                break
        merged = RaggedBatch.merge(taken)
        self.tokens -= merged.tokens
        return entered, merged


class SurvivorPools:
    """Keeps the stages' batches full: survivors wait until enough have come together, and run as one batch.

    A batch enters with ``put`` and comes back, as an ExitRecord, from a later ``put`` or from ``flush``, when its last
    row has left. A pool runs when it holds ``token_budget`` tokens, the deepest full one first, so that few rows wait;
    or when a row in it has seen ``max_wait`` batches enter, so that none waits for ever. An answer does not depend on
    who is merged with whom beyond what batching itself changes (DESIGN: nothing on the native CPU path).

    Where the host would wait for a device, stages are read one late: the next is queued before the last is read. On a
    CPU each is read at once.

    Rules' hooks see the batches as they entered, each when all of its rows have left.
    """

    def __init__(self, executor: RaggedExecutor, token_budget: int, *, max_wait: int = MAX_WAIT) -> None:
        if token_budget < 1:
            raise ValueError(f"token_budget: expected at least 1, got {token_budget}")
        if max_wait < 0:
            raise ValueError(f"max_wait: expected at least 0 batches, got {max_wait}")
        self.executor, self.token_budget, self.max_wait = executor, token_budget, max_wait
        self._pools = [_Pool() for _ in executor.stages]  # the first stays empty: batches run as they enter
        self._cohorts: dict[int, _Cohort] = {}  # by number, in the order of entry
        self._flight: deque[tuple[int, Launched]] = deque()  # as in a pool, and the stage
        self._lessons: list[Lesson] = []
        self._entered = 0
        self._rows = 0

    def put(self, batch: RaggedBatch) -> list[Finished]:
        """Run the first stage of ``batch`` (before its embeddings; sample_ids 0 ... B - 1), then every full pool."""
        self._cohorts[self._entered] = _Cohort(self._rows, batch.rows)
        batch = replace(batch, sample_ids=batch.sample_ids + self._rows)
        self._rows += batch.rows
        finished = self._run(0, self._entered, batch)
        self._entered += 1
        while True:
            if (stage := self._due()) is not None:
                finished += self._run(stage, *self._pools[stage].take(self.token_budget))
            elif self._flight and self._overdue(self._flight[0][0]):
                finished += self._read()
            else:
                return finished

    def flush(self) -> list[Finished]:
        """Run all that waits, shallow to deep."""
        finished = []
        while True:
            waiting = next((stage for stage, pool in enumerate(self._pools) if pool.parts), None)
            if waiting is not None:
                finished += self._run(waiting, *self._pools[waiting].take(self.token_budget))
            elif self._flight:
                finished += self._read()
            else:
                return finished

    def _due(self) -> int | None:
        """The next stage to run: the deepest full pool, else the shallowest with a row that has waited too long."""
        for stage in reversed(range(len(self._pools))):
            if self._pools[stage].tokens >= self.token_budget:
                return stage
        for stage, pool in enumerate(self._pools):
            if pool.parts and self._overdue(pool.oldest()):
                return stage
        return None

    def _overdue(self, entered: int) -> bool:
        """Whether rows that came with batch number ``entered`` have seen too many others enter."""
        return self._entered - entered > self.max_wait

    def _run(self, number: int, entered: int, batch: RaggedBatch) -> list[Finished]:
        """Queue one stage on a batch whose oldest row came with batch number ``entered``; read what is due."""
        self._flight.append((entered, self.executor.launch(number, batch)))
        finished = []
        while len(self._flight) >= (1 if batch.live_on_host else IN_FLIGHT):
            finished += self._read()
        return finished

    def _read(self) -> list[Finished]:
        """Read the oldest stage in flight: its survivors wait before the next."""
        entered, launched = self._flight.popleft()
        departure, survivors = self.executor.settle(launched, self._lessons)
        if survivors is not None:
            self._pools[launched.number + 1].put(entered, survivors)
        if len(departure.sample_ids) == 0:
            return []
        self._teach(departure)
        return self._settle(departure)

    def _settle(self, departure: Departure) -> list[Finished]:
        """Credit the rows that left to the batches they came with; those that are complete."""
        numbers = list(self._cohorts)
        firsts = torch.tensor([cohort.first for cohort in self._cohorts.values()])
        places = torch.searchsorted(firsts, departure.sample_ids, right=True) - 1
        sizes = places.bincount(minlength=len(numbers)).tolist()  # places rise: pools are queues, survivors keep order
        values = (departure.sample_ids, departure.logits, departure.score)
        shares = zip(*(value.split(sizes) for value in values), strict=True)
        finished = []
        for number, size, (ids, logits, score) in zip(numbers, sizes, shares, strict=True):
            if size == 0:
                continue
            cohort = self._cohorts[number]
            cohort.departures.append(Departure(departure.stage, ids - cohort.first, logits, score))
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
