"""The loosest threshold that keeps accuracy, and the curve it was picked from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ragged_exit.calibration.exit_table import ExitTable


class Point(NamedTuple):
    """One threshold on validation data: accuracy in [0, 1] and the mean exit layer."""

    threshold: float
    accuracy: float
    mean_exit_layer: float


def accuracy_curve(table: ExitTable, labels: Tensor, *, points: int = 64) -> list[Point]:
    """Accuracy and mean exit layer at ``points`` quantiles of the scores, from never leaving early to always."""
    early = table.scores[:-1].flatten()
    early = early[early.isfinite()]
    quantiles = torch.quantile(early[:: max(1, len(early) // 100_000)].double(), torch.linspace(0, 1, points).double())
    if table.compare.startswith(">"):
        quantiles = quantiles.flip(0)
    return [_point(table, labels, threshold) for threshold in quantiles.unique_consecutive().tolist()]


def choose_threshold(table: ExitTable, labels: Tensor, *, max_drop: float = 0.005, points: int = 64) -> Point:
    """The point with the smallest mean exit layer among those whose accuracy is within ``max_drop`` of full depth.

    Ties in depth go to the higher accuracy. Choose on validation data, report on other data.
    """
    full = float((table.logits[-1].argmax(1) == labels).double().mean())
    allowed = [point for point in accuracy_curve(table, labels, points=points) if point.accuracy >= full - max_drop]
    if not allowed:
        never = -1.0 if table.compare.startswith("<") else 2.0
        return _point(table, labels, never)
    return min(allowed, key=lambda point: (point.mean_exit_layer, -point.accuracy))


def _point(table: ExitTable, labels: Tensor, threshold: float) -> Point:
    logits, exit_layer = table.answers_at(threshold)
    accuracy = float((logits.argmax(1) == labels).double().mean())
    return Point(threshold, accuracy, float(exit_layer.double().mean()))
