"""What every exit would say of every row: the table from which any threshold or patience can be replayed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ragged_exit.accelerate import AcceleratedModel
from ragged_exit.executor import RaggedExecutor, Stage
from ragged_exit.ops import ExitDecision
from ragged_exit.rules import ExitRule, ScoreSpec
from ragged_exit.scheduler import token_budget_batches

COMPARES = {"<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge}


class Exit(NamedTuple):
    """One exit of a table. own: does the model's rule decide here, or that of a cascade's early-exit member?"""

    rule: ExitRule
    exit_index: int
    exit_layer: int
    executed_layers: int
    exit_member: int = 1
    own: bool = True


class Replay(NamedTuple):
    """The answers under some threshold, N rows. exit_index: the place in ``ExitTable.exits``.

    logits f32 ``[N, C]``, score f32 ``[N]``; exit_index, exit_layer, exit_member, executed_layers int64 ``[N]``.
    """

    logits: Tensor
    score: Tensor
    exit_index: Tensor
    exit_layer: Tensor
    exit_member: Tensor
    executed_layers: Tensor


@dataclass(frozen=True)
class ExitTable:
    """E exits x N rows at full depth. scores: f32 ``[E, N]``; logits: f32 ``[E, N, C]``; exits: E of them.

    The scores of a patience rule are its counters, which do not depend on the patience.
    """

    scores: Tensor
    logits: Tensor
    exits: list[Exit]

    @property
    def rule(self) -> ExitRule:
        """The rule whose threshold is to be chosen."""
        return self.exits[-1].rule

    def at(self, threshold: float | Sequence[float]) -> Replay:
        """The answers with this threshold, or one per exit of the rule; for patience rules, with this patience."""
        return self.under(self.rule.with_threshold(threshold))

    def under(self, rule: ExitRule) -> Replay:
        """The answers under ``rule``, which must score as the table's does. Raises ValueError where it does not."""
        if rule.spec._replace(compare="") != self.rule.spec._replace(compare=""):
            raise ValueError(f"rule: the table has the scores of {self.rule.spec}, got {rule.spec}")
        leaves = torch.ones(self.scores.shape, dtype=torch.bool)  # at the last exit everybody does
        for row, exit in zip(range(len(self.exits) - 1), self.exits, strict=False):
            asked = rule if exit.own else exit.rule
            threshold = torch.tensor(asked.threshold_at(exit.exit_index), dtype=torch.float32)  # as the kernels see it
            leaves[row] = COMPARES[asked.compare](self.scores[row], threshold)
        chosen = leaves.int().argmax(0)  # the first True
        rows = torch.arange(len(chosen))

        def pick(values: list[int]) -> Tensor:
            return torch.tensor(values)[chosen]

        return Replay(
            logits=self.logits[chosen, rows],
            score=self.scores[chosen, rows],
            exit_index=chosen,
            exit_layer=pick([exit.exit_layer for exit in self.exits]),
            exit_member=pick([exit.exit_member for exit in self.exits]),
            executed_layers=pick([exit.executed_layers for exit in self.exits]),
        )

    def candidates(self, points: int = 64) -> list[float]:
        """Thresholds from never leaving early to all at the first exit, or patiences.

        They are ``points`` quantiles of the scores, and the next float past all scores: where the comparison is strict,
        a row stays at a threshold that is its own score.
        """
        early = self.scores[[row for row, exit in enumerate(self.exits[:-1]) if exit.own]].flatten()
        early = early[early.isfinite()]
        if self.rule.spec.counts:
            most = int(early.max()) if len(early) else 0
            return [float(patience) for patience in range(most + 1, 0, -1)]
        smaller_leaves = self.rule.compare.startswith("<")
        never, always = (-1.0, math.inf) if smaller_leaves else (2.0, -math.inf)
        if not len(early):
            return [never]
        sample = early[:: max(1, len(early) // 100_000)].double()
        quantiles = torch.quantile(sample, torch.linspace(0, 1, points).double())
        loosest = early.max() if smaller_leaves else early.min()
        past = float(torch.nextafter(loosest.float(), torch.tensor(always)))
        return [never, *(quantiles if smaller_leaves else quantiles.flip(0)).unique_consecutive().tolist(), past]


@torch.inference_mode()
def exit_table(
    fast: AcceleratedModel,
    sequences: Sequence[Sequence[int]],
    token_type_ids: Sequence[Sequence[int]] | None = None,
    *,
    token_budget: int = 4096,
) -> ExitTable:
    """Run every exit of ``fast`` on every row (nobody leaves), of any system and rule; online rules learn nothing.

    sequences, token_type_ids: lists of ids without padding, as ``stream`` takes them.
    """
    stages = fast.executor.stages
    executor = RaggedExecutor(_without_exits(stages), impl=fast.impl)
    parts: list[tuple[list[int], list[ExitDecision]]] = []
    for rows in token_budget_batches([len(sequence) for sequence in sequences], token_budget):
        seen: list[ExitDecision] = []
        types = None if token_type_ids is None else [token_type_ids[row] for row in rows]
        executor.run(fast.pack_sequences([sequences[row] for row in rows], types), on_decision=seen.append)
        parts.append((rows, seen))
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    scores = torch.stack([torch.cat([seen[exit].score for _, seen in parts]) for exit in range(len(stages))])
    logits = torch.stack([torch.cat([seen[exit].logits for _, seen in parts]) for exit in range(len(stages))])
    return ExitTable(
        scores=scores.cpu()[:, order],
        logits=logits.cpu()[:, order],
        exits=[
            Exit(
                stage.rule,
                stage.exit_index,
                stage.exit_layer,
                stage.executed_layers,
                stage.member,
                own=stage.rule is fast.rule,
            )
            for stage in stages
        ],
    )


def _without_exits(stages: Sequence[Stage]) -> list[Stage]:
    nobody = {id(stage.rule): _Nobody(stage.rule) for stage in stages}  # stages that share a rule share its row state
    return [replace(stage, rule=nobody[id(stage.rule)]) for stage in stages]


@dataclass(frozen=True)
class _Nobody(ExitRule):
    """Scores every row as another rule does, and lets nobody go."""

    like: ExitRule

    @property
    def threshold(self) -> float:  # type: ignore[override]
        return -math.inf if self.compare.startswith("<") else math.inf

    @property
    def compare(self) -> str:  # type: ignore[override]
        return self.like.compare

    @property
    def needs(self) -> str:  # type: ignore[override]
        return self.like.needs

    @property
    def spec(self) -> ScoreSpec:
        return self.like.spec

    def initial_state(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        return self.like.initial_state(rows, device)
