"""What every exit would say of every row: the table that thresholds are chosen from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ragged_exit.accelerate import AcceleratedModel
from ragged_exit.executor import RaggedExecutor
from ragged_exit.ops import ExitDecision
from ragged_exit.rules import ExitRule
from ragged_exit.scheduler import token_budget_batches


@dataclass(frozen=True)
class ExitTable:
    """E exits x N rows at full depth. scores: f32 ``[E, N]``; logits: f32 ``[E, N, C]``; exit_layers: ``E`` ints.

    compare: the rule's comparison, which ``exits_at`` applies.
    """

    scores: Tensor
    logits: Tensor
    exit_layers: list[int]
    compare: str

    def exits_at(self, threshold: float) -> Tensor:
        """The exit (0-based) that each row leaves at with this threshold at every exit: int64 ``[N]``."""
        compares = {"<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge}
        leaves = compares[self.compare](self.scores, threshold)  # [E, N]
        leaves[-1] = True
        return leaves.int().argmax(0)  # the first True

    def answers_at(self, threshold: float) -> tuple[Tensor, Tensor]:
        """(logits ``[N, C]``, exit_layer int64 ``[N]``) with this threshold at every exit."""
        chosen = self.exits_at(threshold)
        return self.logits[chosen, torch.arange(len(chosen))], torch.tensor(self.exit_layers)[chosen]


@torch.inference_mode()
def exit_table(fast: AcceleratedModel, sequences: Sequence[Sequence[int]], *, token_budget: int = 4096) -> ExitTable:
    """Run every exit of ``fast`` on every row (nobody leaves). Rules without row state and single models only.

    Raises ValueError for a patience rule or a cascade, whose exits depend on more than the row's logits.
    """
    stages = fast.executor.stages
    if fast.rule.spec.score.endswith("patience") or any(stage.restart for stage in stages[1:]):
        raise ValueError(f"fast: expected one model with a stateless rule, got {type(fast.rule).__name__}")
    nobody = _never(fast.rule)
    parts: list[tuple[list[int], list[ExitDecision]]] = []
    for rows in token_budget_batches([len(sequence) for sequence in sequences], token_budget):
        seen: list[ExitDecision] = []
        executor = RaggedExecutor([replace(stage, rule=nobody) for stage in stages], impl=fast.impl)
        batch = fast.encoder.pack_sequences([sequences[row] for row in rows])
        executor.run(batch, on_decision=seen.append)
        parts.append((rows, seen))
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    scores = torch.stack([torch.cat([seen[exit].score for _, seen in parts]) for exit in range(len(stages))])
    logits = torch.stack([torch.cat([seen[exit].logits for _, seen in parts]) for exit in range(len(stages))])
    return ExitTable(
        scores=scores[:, order].cpu(),
        logits=logits[:, order].cpu(),
        exit_layers=[stage.exit_layer for stage in stages],
        compare=fast.rule.compare,
    )


def _never(rule: ExitRule) -> ExitRule:
    return replace(rule, threshold=-math.inf if rule.compare.startswith("<") else math.inf)  # type: ignore[type-var]
