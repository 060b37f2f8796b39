"""Scorer: a checkpoint and its tokenizer, from a table of texts to a table of answers. Every engine uses it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch

from ragged_exit.accelerate import RowResult, accelerate
from ragged_exit.examples import read_tokenizer, token_limit
from ragged_exit.models.loading import load
from ragged_exit.scheduler import TOKEN_BUDGET

_NO_TEXT = "expected a string, got null, a list, an object or bytes that are not UTF-8"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ScoreOptions:
    """What decides the answers: plain values, so that they travel to other machines. None is the model's own."""

    model: str
    threshold: float | None = None
    patience: int | None = None
    dtype: str = "fp32"
    max_length: int | None = None
    token_budget: int = TOKEN_BUDGET

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Scorer:
    """Holds the accelerated model. Raises ValueError for options that do not fit it, and for a rule that learns."""

    def __init__(self, options: ScoreOptions, device: str | None = None) -> None:
        self.options = options
        if options.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {options.dtype!r}")
        model = load(options.model)
        self.tokenizer = read_tokenizer(options.model)
        self.fast = accelerate(
            model,
            threshold=options.threshold,
            patience=options.patience,
            dtype=DTYPES[options.dtype],
            device=device,
        )
        for stage in self.fast.executor.stages:
            if stage.rule.learns:  # a shard's answers would depend on the shards that this process answered before
                raise ValueError(
                    f"model: the rule {type(stage.rule).__name__} learns as it answers, and answers would depend on "
                    "where a run stopped; calibrate the model first, which puts a fixed threshold in its place"
                )
        self.limit = token_limit(self.tokenizer, options.max_length, self.fast.encoders)
        self.regression = model.config.num_labels == 1

    def score(self, texts: pa.Table) -> pa.Table:
        """id, text[, text2] in; id, label (or value), score, exit_layer, exit_member, executed_layers, logits, error.

        A row that cannot be answered has an ``error`` and nulls; the others are answered all the same.
        """
        missing = _missing(texts)
        encoded = self._encode(texts, missing)
        rows = [_checked(row) for row in self.fast.stream(encoded, self.options.token_budget)]
        logits = [None if row.logits is None else row.logits.tolist() for row in rows]
        answer = pa.array(
            [_answer(row, self.regression) for row in rows], pa.float32() if self.regression else pa.int64()
        )
        return pa.table(
            {
                "id": texts.column("id").combine_chunks(),
                "value" if self.regression else "label": answer,
                "score": pa.array([row.score for row in rows], pa.float32()),
                "exit_layer": pa.array([row.exit_layer for row in rows], pa.int32()),
                "exit_member": pa.array([row.exit_member for row in rows], pa.int32()),
                "executed_layers": pa.array([row.executed_layers for row in rows], pa.int32()),
                "logits": pa.array(logits, pa.list_(pa.float32())),
                "error": pa.array([told or row.error for told, row in zip(missing, rows, strict=True)], pa.string()),
            }
        )

    def _encode(self, texts: pa.Table, missing: list[str | None]) -> list[dict[str, list[int]]]:
        """Token ids a row; none where a text is missing."""
        first = texts.column("text").to_pylist()
        second = texts.column("text2").to_pylist() if "text2" in texts.column_names else None
        good = [row for row, told in enumerate(missing) if told is None]
        rows: list[dict[str, list[int]]] = [{"input_ids": []} for _ in first]
        if good:
            pairs = None if second is None else [second[row] for row in good]
            encoded = self.tokenizer([first[row] for row in good], pairs, truncation=True, max_length=self.limit)
            for place, row in enumerate(good):
                rows[row] = {"input_ids": encoded["input_ids"][place]}
                if second is not None and "token_type_ids" in encoded:
                    rows[row]["token_type_ids"] = encoded["token_type_ids"][place]
        return rows


def _missing(texts: pa.Table) -> list[str | None]:
    """What is wrong with the rows that have no text: ``split`` makes null of what is none."""
    names = [name for name in ("text", "text2") if name in texts.column_names]
    rows = zip(*(texts.column(name).is_valid().to_pylist() for name in names), strict=True)
    return [None if all(row) else f"{names[row.index(False)]}: {_NO_TEXT}" for row in rows]


def _checked(row: RowResult) -> RowResult:
    """An answer that is no number is none: NaN has no class."""
    if row.logits is None or bool(row.logits.isfinite().all()):
        return row
    return RowResult(row.index, error=f"the model answered {row.logits.tolist()}, expected finite numbers")


def _answer(row: RowResult, regression: bool) -> float | int | None:
    if row.logits is None:
        return None
    return float(row.logits[0]) if regression else int(row.logits.argmax())
