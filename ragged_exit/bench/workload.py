"""A benchmark's workload: the sequences, their labels, and how many FLOPs they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Workload:
    """Token id sequences in arrival order, where known their labels (int64 ``[N]``), of pairs their token types."""

    sequences: Sequence[Sequence[int]]
    labels: Tensor | None = None
    token_type_ids: Sequence[Sequence[int]] | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.sequences]

    def select(self, rows: Sequence[int]) -> Workload:
        """These rows, in this order; row numbers past the end are left out."""
        rows = [row for row in rows if row < len(self)]
        labels = None if self.labels is None else self.labels[rows]
        types = None if self.token_type_ids is None else [self.token_type_ids[row] for row in rows]
        return Workload([self.sequences[row] for row in rows], labels, types)

    def sample(self, count: int, seed: int) -> Workload:
        """``count`` rows (all, shuffled, if there are fewer), drawn by ``seed``."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.select(order[:count].tolist())

    def token_layers(self, executed_layers: Tensor) -> float:
        """Layers that tokens ran through in all; executed_layers int64 ``[N]``."""
        return float((torch.tensor(self.lengths, dtype=torch.float64) * executed_layers).sum())

    def padded_lengths(self, batch_size: int) -> list[int]:
        """Of each row, the longest of its batch of ``batch_size`` in arrival order."""
        lengths = self.lengths
        batches = (lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size))
        return [max(batch) for batch in batches for _ in batch]

    def padding_rate(self, batch_size: int = 32) -> float:
        """Share of padding in batches of ``batch_size`` in arrival order, each padded to its longest."""
        return 1 - sum(self.lengths) / sum(self.padded_lengths(batch_size))


def layer_sizes(config: PretrainedConfig) -> tuple[int, int]:
    """(H, F) of a transformers configuration; DistilBERT calls F hidden_dim."""
    return config.hidden_size, config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size


def layer_flops(config: PretrainedConfig, tokens: Tensor) -> Tensor:
    """FLOPs of one layer per row: 2 t (4 H^2 + 2 H F) + 4 t^2 H; tokens float64 ``[N]``."""
    hidden, inner = layer_sizes(config)
    return 2 * tokens * (4 * hidden**2 + 2 * hidden * inner) + 4 * tokens**2 * hidden


def padded_work(config: PretrainedConfig, workload: Workload, batch_size: int, executed_layers: Tensor) -> float:
    """FLOPs of the executed layers (int64 ``[N]``) in batches of ``batch_size`` in arrival order, padding included."""
    tokens = torch.tensor(workload.padded_lengths(batch_size), dtype=torch.float64)
    return float((layer_flops(config, tokens) * executed_layers).sum())


def work(config: PretrainedConfig, lengths: Sequence[int], executed_layers: Tensor, evaluated_exits: Tensor) -> float:
    """FLOPs on unrounded tokens: the executed layers, plus 2 (H^2 + H C) per evaluated exit. Both int64 ``[N]``."""
    tokens = torch.tensor(lengths, dtype=torch.float64)
    head = 2 * (config.hidden_size**2 + config.hidden_size * config.num_labels)
    return float((layer_flops(config, tokens) * executed_layers + head * evaluated_exits).sum())
