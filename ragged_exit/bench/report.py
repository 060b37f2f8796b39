"""A benchmark's outcome: derived figures, JSON, the printed table and the picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ragged_exit.bench.check import Measured
from ragged_exit.bench.environment import environment, write_result
from ragged_exit.bench.workload import Workload, work
from ragged_exit.calibration.threshold import Point
from ragged_exit.models.deebert import DeeBert


@dataclass(frozen=True)
class Report:
    """Everything that the table, the picture and the JSON say.

    workload: ``workload_facts`` of what was timed, and the threshold. linear_seconds: of each repeat, the executed
    linears alone.
    """

    title: str
    measured: list[Measured]
    workload: dict[str, Any]
    linear_seconds: Sequence[float]
    curve: Sequence[Point] = ()
    chosen: Point | None = None
    peers: Sequence[str] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    def of(self, name: str) -> Measured:
        return next(item for item in self.measured if item.contender.name == name)

    def ratio(self, slow: str, fast: str) -> float | None:
        """seconds of ``slow`` over seconds of ``fast``; None unless both match their reference."""
        first, second = self.of(slow), self.of(fast)
        return first.median / second.median if first.matches and second.matches else None

    @property
    def realised_over_ideal(self) -> list[float] | None:
        """Of each repeat."""
        full, ragged = self.of("ragged_full"), self.of("ragged")
        if not (full.matches and ragged.matches):
            return None
        return realised_over_ideal(full, ragged, self.workload["work_fractions"])

    @property
    def roofline_fraction(self) -> float | None:
        ragged = self.of("ragged")
        if not ragged.matches:
            return None
        return statistics.median(a / b for a, b in zip(self.linear_seconds, ragged.seconds, strict=True))

    @property
    def best_peer(self) -> str | None:
        """The fastest full-depth runtime among the sorted ones that match: the peers, and PyTorch itself."""
        names = [name for name in ("padded_sorted", *self.peers) if self.of(name).matches]
        return min(names, key=lambda name: self.of(name).median) if names else None

    @property
    def factors(self) -> dict[str, float | None]:
        """padded / ragged = GEMM library x padding x depth."""
        padding = self.ratio("padded", "padded_sorted")
        packing = self.ratio("padded_sorted_prepacked", "ragged_full")
        return {
            "gemm_library": self.ratio("padded_sorted", "padded_sorted_prepacked"),
            "padding": None if padding is None or packing is None else padding * packing,
            "depth": self.ratio("ragged_full", "ragged"),
        }

    def to_dict(self) -> dict[str, Any]:
        rows, realised = self.workload["sequences"], self.realised_over_ideal
        contenders = [contender_row(item, rows, self.ratio("padded", item.contender.name)) for item in self.measured]
        return {
            "environment": environment(),
            "title": self.title,
            "workload": self.workload,
            "contenders": contenders,
            "factors": self.factors,
            "best_peer": self.best_peer,
            "missing_peers": dict(self.missing),
            "realised_over_ideal": None if realised is None else statistics.median(realised),
            "realised_over_ideal_of_repeats": realised,
            "roofline_fraction": self.roofline_fraction,
        }

    def write_json(self, path: Path) -> None:
        write_result(path, self.to_dict())

    def print(self, console: Console) -> None:
        table = Table(title=self.title)
        for column in ("contender", "seq/s", "vs padded", "accuracy", "batch", "answers"):
            table.add_column(column, justify="left" if column in ("contender", "answers") else "right")
        rows = self.workload["sequences"]
        for item in self.measured:
            speedup = self.ratio("padded", item.contender.name)
            table.add_row(
                item.contender.name,
                f"{rows / item.median:,.0f}",
                "-" if speedup is None else f"{speedup:.2f}x",
                "-" if item.accuracy is None else f"{100 * item.accuracy:.2f} %",
                str(item.size),
                self._verdict(item),
            )
        console.print(table)
        factors = self.factors
        if all(value is not None for value in factors.values()):
            product = factors["gemm_library"] * factors["padding"] * factors["depth"]  # type: ignore[operator]
            console.print(
                f"gain over padded {product:.2f}x = GEMM library {factors['gemm_library']:.2f} x padding "
                f"{factors['padding']:.2f} x depth {factors['depth']:.2f}"
            )
        if self.peers and self.best_peer is not None:
            ratios = {name: self.ratio(self.best_peer, name) for name in ("ragged", "ragged_full")}
            gains = [f"{name} {ratio:.2f}x" for name, ratio in ratios.items() if ratio is not None]
            console.print(f"over the best peer, {self.best_peer}: {', '.join(gains)}")
        for name, reason in self.missing.items():
            console.print(f"not measured: {name} ({reason})", highlight=False)
        if self.realised_over_ideal is not None:
            console.print(
                f"realised / ideal {with_range(self.realised_over_ideal)}   "
                f"(work fraction {self.workload['work_fraction']:.3f}, "
                f"mean exit layer {self.workload['mean_exit_layer']:.2f} of {self.workload['num_layers']})"
            )
        if self.roofline_fraction is not None:
            console.print(f"roofline fraction {self.roofline_fraction:.3f}   (linears alone / ragged)")
        machine = environment()
        console.print(f"{machine['cpu']}, {machine['threads']} threads, {machine['versions']}", style="dim")

    def _verdict(self, item: Measured) -> str:
        reference = "row-by-row exits" if item.contender.exits else "full depth"
        if item.matches:
            others = f", {item.wrong_exits} other exits" if item.wrong_exits else ""  # bf16 alone may have some
            return f"= {reference}, logits within {item.max_logit_error:.0e}{others}"
        if item.differs_when_timed:
            return "[red]DIFFER from the other contenders' when timed[/red]"
        return f"[red]DIFFER from {reference}: {item.wrong_exits} exits, logits by {item.max_logit_error:.0e}[/red]"

    def plot(self, path: Path) -> None:
        """The exit-layer histogram beside accuracy against mean exit layer (or throughput, where there is no curve)."""
        from ragged_exit.bench.plot import draw_report

        draw_report(self, path)


def contender_row(item: Measured, rows: int, speedup_vs_padded: float | None) -> dict[str, Any]:
    """A contender's entry in the JSON; ``rows`` were timed a repeat."""
    return {
        "name": item.contender.name,
        "seconds": item.median,
        "seconds_of_repeats": item.seconds,
        "sequences_per_second": rows / item.median,
        "accuracy": item.accuracy,
        "speedup_vs_padded": speedup_vs_padded,
        "decisions_match": item.matches,
        "max_logit_error": item.max_logit_error,
        "wrong_exits": item.wrong_exits,
        "label_agreement": item.agreement,
        "batch_size": item.size,
    }


def realised_over_ideal(full: Measured, ragged: Measured, work_fractions: Sequence[float]) -> list[float]:
    """seconds of ``full`` over seconds of ``ragged`` times the work fraction, of each repeat."""
    repeats = zip(full.seconds, ragged.seconds, work_fractions, strict=True)
    return [a / b * fraction for a, b, fraction in repeats]


def with_range(repeats: Sequence[float]) -> str:
    """The median, and how far the repeats scatter."""
    return f"{statistics.median(repeats):.3f} ({min(repeats):.3f} to {max(repeats):.3f})"


def workload_facts(timed: Sequence[Workload], exit_layers: Sequence[Tensor], model: DeeBert) -> dict[str, Any]:
    """The ``workload`` section of the JSON: means over the repeats, and of each its work fraction.

    exit_layers: where the rows of each workload left, int64 ``[N]``; all exits of ``model`` up to there were evaluated.
    """
    repeats, config = len(timed), model.config
    num_layers = config.num_hidden_layers
    asked = torch.tensor([layer for _, layer in model.exits()])
    done = [
        work(config, rows.lengths, exits, torch.searchsorted(asked, exits, right=True))
        for rows, exits in zip(timed, exit_layers, strict=True)
    ]
    full = [
        work(config, rows.lengths, exits * 0 + num_layers, exits * 0 + 1)
        for rows, exits in zip(timed, exit_layers, strict=True)
    ]
    fractions = [some / everything for some, everything in zip(done, full, strict=True)]
    return {
        "sequences": len(timed[0]),
        "tokens": sum(sum(rows.lengths) for rows in timed) / repeats,
        "padding_rate": sum(rows.padding_rate() for rows in timed) / repeats,
        "mean_exit_layer": sum(float(exits.double().mean()) for exits in exit_layers) / repeats,
        "num_layers": num_layers,
        "flops": sum(done) / repeats,
        "full_flops": sum(full) / repeats,
        "work_fraction": sum(fractions) / repeats,
        "work_fractions": fractions,
    }
