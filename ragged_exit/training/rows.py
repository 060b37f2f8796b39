"""Examples as Trainer sees them: rows, of token ids or of features, and their batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ragged_exit.examples import Examples


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
