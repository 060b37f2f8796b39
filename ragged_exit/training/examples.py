"""Labelled token id sequences, and how Trainer sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ragged_exit.data import TextData

Sequences = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Examples:
    """N rows. labels: integers are classes, floats are regression targets.

    Raises ValueError when a list has another length.
    """

    sequences: Sequences
    labels: Sequence[int] | Sequence[float]
    token_type_ids: Sequences | None = None

    def __post_init__(self) -> None:
        for name in ("labels", "token_type_ids"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.sequences):
                raise ValueError(f"{name}: expected {len(self.sequences)} values, one per sequence, got {len(values)}")

    def __len__(self) -> int:
        return len(self.sequences)

    def select(self, rows: Sequence[int]) -> Examples:
        """These rows, in this order."""
        types = None if self.token_type_ids is None else [self.token_type_ids[row] for row in rows]
        return Examples([self.sequences[row] for row in rows], [self.labels[row] for row in rows], types)

    def label_tensor(self, num_labels: int) -> Tensor:
        """``[N]``: f32 targets for one output, else int64 classes. ValueError for a class the model has not."""
        if num_labels == 1:
            return torch.tensor(self.labels, dtype=torch.float32)
        labels = torch.tensor(self.labels)
        if labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
            raise ValueError(f"labels: expected classes 0 to {num_labels - 1}, got {labels.min()} to {labels.max()}")
        return labels


def tokenise(tokenizer: Any, data: TextData, *, max_length: int = 128) -> Examples:
    """Text or text pairs as the model reads them, cut at ``max_length`` tokens. ValueError without labels."""
    if data.labels is None:
        raise ValueError("data: expected labels")
    encoded = tokenizer(data.texts, data.text_pairs, truncation=True, max_length=max_length)
    types = encoded.get("token_type_ids") if data.text_pairs is not None else None
    return Examples(encoded["input_ids"], data.labels, types)


class TokenRows(Dataset):
    """Rows of token ids for Trainer; ``extra`` adds tensors ``[N]`` to the batches by name."""

    def __init__(self, examples: Examples, labels: Tensor, extra: dict[str, Tensor]) -> None:
        self.examples, self.columns = examples, {"labels": labels, **extra}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> dict[str, Any]:
        values: dict[str, Any] = {name: column[row] for name, column in self.columns.items()}
        if self.examples.token_type_ids is not None:
            values["token_type_ids"] = self.examples.token_type_ids[row]
        return values | {"input_ids": self.examples.sequences[row]}  # Trainer groups rows by the length of this


class FeatureRows(Dataset):
    """Rows of features ``[N, L, H]`` that a frozen backbone gave."""

    def __init__(self, features: Tensor, labels: Tensor, extra: dict[str, Tensor]) -> None:
        self.columns = {"features": features, "labels": labels, **extra}

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[row] for name, column in self.columns.items()}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch: tensors stacked, token lists padded on the right with 0 beside an ``attention_mask`` ``[B, S]``."""
    batch: dict[str, Tensor] = {
        name: torch.stack([row[name] for row in rows]) for name, value in rows[0].items() if isinstance(value, Tensor)
    }
    if "input_ids" not in rows[0]:
        return batch
    width = max(len(row["input_ids"]) for row in rows)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    for name in rows[0].keys() & {"input_ids", "token_type_ids"}:
        batch[name] = torch.tensor([[*row[name], *[0] * (width - len(row[name]))] for row in rows])
    return batch
