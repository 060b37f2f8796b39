"""Thresholds from validation data: the curve of quality against depth, and the points to pick on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ragged_exit.calibration.exit_table import ExitTable
from ragged_exit.calibration.metrics import accuracy

Quality = Callable[[Tensor, Tensor], float]  # (logits [N, C], labels [N]) -> larger is better


class Point(NamedTuple):
    """One threshold (or patience) on validation data: its quality, and the mean of ``executed_layers``."""

    threshold: float
    quality: float
    mean_executed_layers: float


def point_at(table: ExitTable, labels: Tensor, threshold: float, quality: Quality = accuracy) -> Point:
    """What this threshold (or patience) gives."""
    replay = table.at(threshold)
    return Point(threshold, quality(replay.logits, labels), float(replay.executed_layers.double().mean()))


def quality_curve(table: ExitTable, labels: Tensor, *, quality: Quality = accuracy, points: int = 64) -> list[Point]:
    """Quality and mean executed layers at each of ``ExitTable.candidates``: from nobody to all at the first exit."""
    return [point_at(table, labels, threshold, quality) for threshold in table.candidates(points)]


def choose_threshold(
    table: ExitTable, labels: Tensor, *, max_drop: float = 0.005, quality: Quality = accuracy, points: int = 64
) -> Point:
    """The point with the fewest executed layers among those whose quality is within ``max_drop`` of the last exit's.

    Ties in depth go to the higher quality; where no point qualifies, nobody leaves early. Choose on validation data,
    report on other data.
    """
    full = quality(table.logits[-1], labels)
    curve = quality_curve(table, labels, quality=quality, points=points)
    allowed = [point for point in curve if point.quality >= full - max_drop]
    return min(allowed, key=lambda point: (point.mean_executed_layers, -point.quality)) if allowed else curve[0]


def threshold_for_layers(table: ExitTable, mean_layers: float, *, points: int = 512) -> float | None:
    """The threshold (or patience) that runs the most layers on average, but not more than ``mean_layers``.

    None where even leaving at the first exit runs more.
    """
    depths = {
        threshold: float(table.at(threshold).executed_layers.double().mean()) for threshold in table.candidates(points)
    }
    allowed = [threshold for threshold, depth in depths.items() if depth <= mean_layers]
    return max(allowed, key=depths.__getitem__) if allowed else None
