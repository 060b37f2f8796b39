"""Every exit of a model on some rows: how many of them leave there, and how good its answers are."""

from __future__ import annotations

from typing import NamedTuple

from ragged_exit.accelerate import AcceleratedModel, accelerate
from ragged_exit.calibration.exit_table import exit_table
from ragged_exit.calibration.metrics import accuracy, calibration_error, pearson, spearman
from ragged_exit.examples import Examples
from ragged_exit.models.base import EarlyExitModel


class ExitQuality(NamedTuple):
    """What one exit costs and how good its answers are."""

    member: int
    layer: int
    executed_layers: int
    metrics: dict[str, float]


def exit_counts(fast: AcceleratedModel, examples: Examples) -> list[tuple[int, int, int, int]]:
    """(member, layer, layers run, rows that leave there) of every exit, under the model's rule."""
    table = exit_table(fast, examples.sequences, examples.token_type_ids)
    counts = table.under(fast.rule).exit_index.bincount(minlength=len(table.exits)).tolist()
    return [
        (exit_.exit_member, exit_.exit_layer, exit_.executed_layers, count)
        for exit_, count in zip(table.exits, counts, strict=True)
    ]


def exit_qualities(model: EarlyExitModel, examples: Examples) -> list[ExitQuality]:
    """Every exit's answers to all of ``examples``: accuracy and ECE, or Pearson's and Spearman's correlation."""
    table = exit_table(accelerate(model), examples.sequences, examples.token_type_ids)
    labels = examples.label_tensor(model.config.num_labels)
    found = []
    for exit_, logits in zip(table.exits, table.logits, strict=True):
        if model.config.num_labels == 1:
            values = logits[:, 0]
            metrics = {"pearson": pearson(values, labels), "spearman": spearman(values, labels)}
        else:
            metrics = {"accuracy": accuracy(logits, labels), "ece": calibration_error(logits, labels)}
        found.append(ExitQuality(exit_.exit_member, exit_.exit_layer, exit_.executed_layers, metrics))
    return found
