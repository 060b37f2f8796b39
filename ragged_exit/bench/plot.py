"""The picture of a benchmark: who left where, and what it bought."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ragged_exit.bench.report import Report


def draw_report(report: Report, path: Path) -> None:
    """Write a PNG: exit-layer histogram | accuracy against mean exit layer | throughput of every contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3 if report.curve else 2, figsize=(15 if report.curve else 10, 4.2))
    layers = range(1, report.workload["num_layers"] + 1)
    left = report.of("ragged").answers.exit_layer  # [N], the rows that were checked
    counts = [int((left == layer).sum()) for layer in layers]
    axes[0].bar(layers, counts, color="#4477aa")
    mean = float(left.double().mean())
    axes[0].axvline(mean, color="#cc6677", linestyle="--", label=f"mean {mean:.2f}")
    axes[0].set(xlabel="exit layer", ylabel="rows", title="where rows leave", xticks=list(layers))
    axes[0].legend()
    if report.curve:
        depth = [point.mean_executed_layers for point in report.curve]
        axes[1].plot(depth, [100 * point.quality for point in report.curve], ".-", color="#4477aa", label="validation")
        if report.chosen is not None:
            chosen = report.chosen
            label = f"chosen threshold: {chosen.threshold:.3f}"
            axes[1].plot(chosen.mean_executed_layers, 100 * chosen.quality, "o", color="#cc6677", label=label)
        axes[1].set(xlabel="mean exit layer", ylabel="accuracy, %", title="accuracy against depth")
        axes[1].legend()
    rate = axes[-1]
    rows = report.workload["sequences"]
    names = [item.contender.name for item in report.measured]
    colours = ["#4477aa" if item.matches else "#bbbbbb" for item in report.measured]
    bars = rate.barh(names, [rows / item.median for item in report.measured], color=colours)
    rate.bar_label(bars, fmt="{:,.0f}", padding=3)
    rate.invert_yaxis()
    rate.set(xlabel="sequences per second", title="throughput (grey: answers differ)")
    rate.margins(x=0.15)
    figure.suptitle(report.title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
