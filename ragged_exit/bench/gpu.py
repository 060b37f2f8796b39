"""One card: padded peers and ours, with and without CUDA graphs, beside the rate at which it multiplies matrices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ragged_exit.accelerate import AcceleratedModel
from ragged_exit.bench.check import Measured
from ragged_exit.bench.contenders import (
    Answers,
    Contender,
    PaddedForward,
    Run,
    full_depth,
    full_depth_stage,
    padded_by,
    ragged,
)
from ragged_exit.bench.environment import environment, write_result
from ragged_exit.bench.report import contender_row, realised_over_ideal, with_range
from ragged_exit.bench.workload import Workload
from ragged_exit.executor import RaggedExecutor
from ragged_exit.graphs import LayerGraphs
from ragged_exit.models.deebert import DeeBert
from ragged_exit.transfer import to_device

ROW_BATCHES = (64, 256, 1024)
TOKEN_BUDGETS = (8_192, 32_768, 131_072)
PEERS = ("padded_sorted", "compiled_sorted")
PAIRS = {"ragged": "ragged_full", "ragged_graphs": "ragged_full_graphs"}  # exits on: the same with exits off


def card_contenders(model: DeeBert, fast: AcceleratedModel, *, compiled: bool) -> list[Contender]:
    """``model``: the plain one, on the device and in the dtype of ``fast``. compiled: measure torch.compile too.

    Graphs only where there are any: on CUDA. torch.compile comes last: it takes longest to check.
    """
    layers, device = model.config.num_hidden_layers, fast.device
    plain = _on(device, partial(full_depth, model))
    found = [
        Contender("padded", padded_by(plain, layers, by_length=False), (32,), exits=False),
        Contender("padded_sorted", padded_by(plain, layers, by_length=True), ROW_BATCHES, exits=False),
    ]
    for suffix in ("", "_graphs") if device.type == "cuda" else ("",):
        for name, stages in (("ragged_full", [full_depth_stage(fast)]), ("ragged", fast.executor.stages)):
            executor = RaggedExecutor(stages, impl=fast.impl, graphs=LayerGraphs() if suffix else None)
            exits = name == "ragged"
            found.append(Contender(name + suffix, ragged(fast, executor), TOKEN_BUDGETS, exits=exits))
    if compiled:
        graph = _on(device, torch.compile(partial(full_depth, model), dynamic=True))
        found.append(Contender("compiled_sorted", padded_by(graph, layers, by_length=True), ROW_BATCHES, exits=False))
    return [replace(contender, run=_to_the_end(contender.run), tuning_rows=None) for contender in found]


def _on(device: torch.device, forward: PaddedForward) -> PaddedForward:
    def run(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        types = None if token_type_ids is None else to_device(token_type_ids, device)
        return forward(to_device(input_ids, device), to_device(attention_mask, device), types)

    return run


def _to_the_end(run: Run) -> Run:
    """``run`` until its answers are in host memory, so that whoever times it times all of it."""

    def whole(workload: Workload, size: int) -> Answers:
        answers = run(workload, size)
        return Answers(answers.logits.cpu(), answers.exit_layer.cpu())

    return whole


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of a plain product of ``size`` x ``size`` matrices, the median of 15 rounds."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(15):
        _synchronise(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        _synchronise(device)
        times.append((time.perf_counter() - start) / 4)
    return 2 * size**3 / statistics.median(times)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class CardReport:
    """What was measured, and what follows from it.

    workload: ``workload_facts`` of what was timed, or no more than "sequences". rate: FLOP/s of the card's matrix
    product. failed: {"name", "error", ...} of the contenders that raised.
    """

    title: str
    measured: list[Measured]
    workload: dict[str, Any]
    rate: float
    close: int  # rows that may leave elsewhere, of those that were checked
    failed: Sequence[dict[str, Any]] = ()

    def of(self, name: str) -> Measured | None:
        """The contender of this name, if it was timed and answered as its reference."""
        found = (item for item in self.measured if item.contender.name == name)
        return next((item for item in found if item.matches and item.seconds), None)

    def ratio(self, slow: str, fast: str) -> float | None:
        """seconds of ``slow`` over seconds of ``fast``; None unless both match their reference."""
        first, second = self.of(slow), self.of(fast)
        return None if first is None or second is None else first.median / second.median

    @property
    def best_peer(self) -> str | None:
        found = [item for item in map(self.of, PEERS) if item is not None]
        return min(found, key=lambda item: item.median).contender.name if found else None

    def realised_over_ideal(self, name: str) -> list[float] | None:
        """Of each repeat."""
        full, ragged = self.of(PAIRS[name]), self.of(name)
        if full is None or ragged is None:
            return None
        return realised_over_ideal(full, ragged, self.workload["work_fractions"])

    def share_of_matrix_rate(self, item: Measured) -> float | None:
        """FLOPs on the tokens that there are and the layers that must run, a second, of ``rate``."""
        needed = self.workload.get("flops" if item.contender.exits else "full_flops")
        return needed / item.median / self.rate if item.matches and needed is not None else None

    def to_dict(self) -> dict[str, Any]:
        names = [name for name in PAIRS if self.of(name) is not None]
        return {
            "environment": environment(),
            "title": self.title,
            "workload": self.workload,
            "matrix_tflop_s": self.rate / 1e12,
            "rows_inside_the_margin": self.close,
            "contenders": [*map(self._row, self.measured), *self.failed],
            "best_peer": self.best_peer,
            "full_over_best_peer": {
                name: self.ratio(self.best_peer, PAIRS[name]) for name in names if self.best_peer is not None
            },
            "realised_over_ideal": {
                name: statistics.median(realised) for name in names if (realised := self.realised_over_ideal(name))
            },
            "realised_over_ideal_of_repeats": {name: self.realised_over_ideal(name) for name in names},
        }

    def _row(self, item: Measured) -> dict[str, Any]:
        if not item.seconds:
            return {"name": item.contender.name, "decisions_match": item.matches, "batch_size": item.size}
        row = contender_row(item, self.workload["sequences"], self.ratio("padded", item.contender.name))
        return row | {"share_of_matrix_rate": self.share_of_matrix_rate(item)}

    def write_json(self, path: Path) -> None:
        write_result(path, self.to_dict())

    def progress(self) -> str:
        """A line on what is known so far."""
        found = [
            item.contender.name
            + (f" {item.seconds[-1]:.3f} s" if item.seconds else " checked")
            + ("" if item.matches else " (DIFFERS)")
            for item in self.measured
        ]
        return "   " + ", ".join([*found, *(f"{row['name']} failed" for row in self.failed)])

    def print(self, console: Console) -> None:
        table = Table(title=f"{self.title}; matrices multiplied at {self.rate / 1e12:.3g} TFLOP/s")
        for column in ("contender", "seq/s", "vs padded", "of matrix rate", "accuracy", "batch", "answers"):
            table.add_column(column, justify="left" if column in ("contender", "answers") else "right")
        for item in self.measured:
            row = self._row(item)
            when = " when timed" if item.differs_when_timed else f": {item.wrong_exits} exits"
            verdict = "match" if item.matches else f"[red]DIFFER{when}[/red]"
            table.add_row(
                row["name"],
                _shown(row.get("sequences_per_second"), "{:,.0f}"),
                _shown(row.get("speedup_vs_padded"), "{:.2f}x"),
                _shown(row.get("share_of_matrix_rate"), "{:.1%}"),
                _shown(item.accuracy, "{:.2%}"),
                str(item.size),
                f"{verdict}, labels {item.agreement:.1%}, logits within {item.max_logit_error:.0e}",
            )
        console.print(table)
        for row in self.failed:
            console.print(f"{row['name']}: {row['error']}", style="red", markup=False, soft_wrap=True)
        for name, full in PAIRS.items():
            realised = self.realised_over_ideal(name)
            if realised is not None:
                fraction = self.workload["work_fraction"]
                console.print(f"{name}: realised / ideal {with_range(realised)} (work fraction {fraction:.3f})")
            if self.best_peer is not None and (gain := self.ratio(self.best_peer, full)) is not None:
                console.print(f"{full}: {gain:.2f}x the best peer, {self.best_peer}")
        console.print(f"{self.close} checked rows are too close to another exit to tell", style="dim")


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
