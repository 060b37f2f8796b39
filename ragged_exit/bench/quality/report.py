"""The quality study's outcome of a task: retention, the truncated encoder at equal wall-clock; table, JSON, picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ragged_exit.bench.environment import environment, write_result
from ragged_exit.bench.quality.models import FULL
from ragged_exit.bench.quality.points import Point
from ragged_exit.bench.quality.published import BASELINE, retention


@dataclass(frozen=True)
class TaskReport:
    """points: the baselines (target None; the full encoder among them) and the systems' operating points."""

    task: str
    metric: str  # the one that counts
    rows: dict[str, int]
    training: dict[str, Any]
    points: Sequence[Point]

    @property
    def full(self) -> Point:
        return next(point for point in self.points if point.name == FULL)

    @property
    def baselines(self) -> list[Point]:
        """BERT-kL, fastest last."""
        return sorted((point for point in self.points if point.target is None), key=self.wallclock)

    def wallclock(self, point: Point) -> float:
        """Median seconds of the full encoder, ragged and without exits, over the point's."""
        return self.full.median / point.median

    def quality(self, point: Point) -> float:
        return point.quality[self.metric]

    def retention(self, point: Point) -> float:
        """Share of the full encoder's quality that is kept."""
        return self.quality(point) / self.quality(self.full)

    def baseline_at(self, speedup: float) -> float | None:
        """BERT-kL's quality at this wall-clock speed-up, linear between its depths; None beyond its fastest."""
        speeds = [self.wallclock(point) for point in self.baselines]
        if speedup > speeds[-1]:
            return None
        return float(np.interp(speedup, speeds, [self.quality(point) for point in self.baselines]))

    def as_dict(self) -> dict[str, Any]:
        """What the JSON says of this task. Speed-ups of points whose answers differ are None."""
        return {
            "metric": self.metric,
            "rows": self.rows,
            "training": self.training,
            "points": [
                {
                    **asdict(point),
                    "wallclock_speedup": self.wallclock(point) if point.matches else None,
                    "retention": self.retention(point),
                    "truncated_at_equal_wallclock": self.baseline_at(self.wallclock(point)) if point.matches else None,
                }
                for point in self.points
            ],
        }

    def print(self, console: Console) -> None:
        """The table: each system at each target, beside BERT-kL as fast and the published retention."""
        full = f"full depth {100 * self.quality(self.full):.2f}"
        table = Table(title=f"{self.task}: {self.metric} on {self.rows['dev']:,} dev rows, {full}")
        columns = (
            "model",
            "layers, x",
            "wall-clock, x",
            self.metric,
            "kept",
            "BERT-kL as fast",
            "published kept",
            "ECE",
        )
        for column in columns:
            table.add_column(column, justify="left" if column == "model" else "right")
        for point in self.points:
            speed = self.wallclock(point) if point.matches else None
            other = None if speed is None or point.target is None else self.baseline_at(speed)
            table.add_row(
                point.name,
                f"{point.layer_speedup:.2f}",
                "answers differ" if speed is None else f"{speed:.2f}",
                f"{100 * self.quality(point):.2f}",
                f"{100 * self.retention(point):.1f} %",
                "" if other is None else f"{100 * other:.2f}",
                _published(self.task, point),
                "" if point.ece is None else f"{point.ece:.3f}",
            )
        console.print(table)


def _published(task: str, point: Point) -> str:
    """The published retention nearest in layer speed-up, if it is near."""
    known = retention(task, BASELINE if point.target is None else point.name)
    near = [speed for speed in known if abs(speed - point.layer_speedup) <= 0.35]
    if not near:
        return ""
    speed = min(near, key=lambda speed: abs(speed - point.layer_speedup))
    return f"{100 * known[speed]:.1f} % at {speed:g}x"


def write_json(path: Path, reports: Sequence[TaskReport]) -> None:
    """All tasks in one file."""
    tasks = {report.task: report.as_dict() for report in reports}
    write_result(path, {"environment": environment(), "tasks": tasks})


def draw(path: Path, reports: Sequence[TaskReport]) -> None:
    """One panel a task: quality against wall-clock speed-up, every system a line, BERT-kL dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(reports), figsize=(6.5 * len(reports), 4.8), squeeze=False)
    for report, axis in zip(reports, axes[0], strict=True):
        lines: dict[str, list[Point]] = {"BERT-kL": report.baselines}
        for point in report.points:
            if point.target is not None and point.matches:
                lines.setdefault(point.name, []).append(point)
        for name, points in lines.items():
            speeds = [report.wallclock(point) for point in points]
            values = [100 * report.quality(point) for point in points]
            style = {"color": "black", "linestyle": "--"} if name == "BERT-kL" else {}
            axis.plot(speeds, values, marker="o", markersize=4, label=name, **style)
        axis.set(xlabel="wall-clock speed-up in batch", ylabel=f"{report.metric} x 100", title=report.task)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
