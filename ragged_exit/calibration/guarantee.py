"""A threshold with a guarantee: how many answers leaving early may spoil, with what confidence."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ragged_exit.calibration.exit_table import ExitTable
from ragged_exit.rules import ScoreSpec

GRID = 128  # thresholds that are tried


class Guarantee(NamedTuple):
    """With probability ``confidence`` over the rows it was chosen on, at most ``max_loss`` of the right answers to new
    rows are spoilt.

    threshold: or patience; None where nothing can be promised, so that nobody may leave early. lost: the share of the
    calibration rows' right answers that is spoilt. mean_executed_layers: on all of them.
    """

    threshold: float | None
    lost: float
    mean_executed_layers: float


def guaranteed_threshold(
    table: ExitTable, labels: Tensor | None, *, max_loss: float = 0.01, confidence: float = 0.95
) -> Guarantee:
    """The loosest threshold that provably spoils at most ``max_loss`` of the right answers. Classification.

    Of the N rows that the last exit has right, one is spoilt when the exit where it leaves has it wrong; without labels
    every answer of the last exit is taken for right. A fixed grid of thresholds is tested from strict to loose
    (fixed-sequence testing, as in "Learn then Test", Angelopoulos et al. 2021), each by the exact binomial tail P(at
    most k spoilt of N | max_loss) <= 1 - confidence; the first that fails ends the search, so that the error of the
    whole search is at most 1 - confidence.

    New rows must be drawn as the calibration rows were. Raises ValueError for a regression, or for max_loss or
    confidence outside (0, 1).
    """
    from scipy import stats  # here: nothing else that an accelerated model imports needs it

    for name, value in (("max_loss", max_loss), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: expected a number between 0 and 1, got {value}")
    classes = table.logits.shape[2]
    if classes == 1:
        raise ValueError("table: expected classes; a regression has no answer that is right or wrong")
    last = table.logits[-1].argmax(1)
    wanted = last if labels is None else labels
    right = last == wanted
    rows = int(right.sum())
    chosen: tuple[float | None, float, float] = (None, 0.0, float(table.exits[-1].executed_layers))
    for threshold in _grid(table.rule.spec, classes, len(table.exits)):
        replay = table.at(threshold)
        spoilt = int((right & (replay.logits.argmax(1) != wanted)).sum())
        if stats.binom.cdf(spoilt, rows, max_loss) > 1 - confidence:
            break
        chosen = (threshold, spoilt / rows, float(replay.executed_layers.double().mean()))
    return Guarantee(*chosen)


def _grid(spec: ScoreSpec, classes: int, exits: int) -> list[float]:
    """Thresholds of the score's whole range, strict to loose, dense where scores of sure rows crowd.

    It must not depend on the calibration rows: the tests would no longer be what they claim.
    """
    if spec.counts:
        return [float(patience) for patience in range(exits, 0, -1)]
    nats = spec.score.startswith("entropy") and spec.score.removeprefix("entropy_") in ("exact", "hf", "castorini")
    largest = math.log(classes) if nats else 1.0
    steps = (torch.logspace(-5, 0, GRID, dtype=torch.float64) * largest).tolist()
    return [1 - step for step in steps] if spec.compare.startswith(">") else steps
