"""Examples: labelled token id sequences, what a tokenizer makes of text data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import LARGE_INTEGER

from ragged_exit.backbones import BackboneWeights
from ragged_exit.data import TextData
from ragged_exit.encoder import PackedEncoder

Sequences = Sequence[Sequence[int]]
# one of these holds a vocabulary, whatever the kind of tokenizer
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class Examples:
    """N rows. labels: integers are classes, floats are regression targets, None is unlabelled.

    Raises ValueError when a list has another length.
    """

    sequences: Sequences
    labels: Sequence[int] | Sequence[float] | None = None
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
        labels = None if self.labels is None else [self.labels[row] for row in rows]
        return Examples([self.sequences[row] for row in rows], labels, types)

    def label_tensor(self, num_labels: int) -> Tensor:
        """``[N]``: f32 targets for one output, else int64 classes.

        Raises ValueError without labels, for targets that are not finite, and for other classes.
        """
        if self.labels is None:
            raise ValueError("labels: expected one a row, got none")
        if num_labels == 1:
            targets = torch.tensor(self.labels, dtype=torch.float32)
            if not targets.isfinite().all():
                row = int(targets.isfinite().logical_not().nonzero()[0])
                raise ValueError(f"labels: expected finite numbers, got {self.labels[row]} in row {row}")
            return targets
        labels = torch.tensor(self.labels)
        if labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
            raise ValueError(f"labels: expected classes 0 to {num_labels - 1}, got {labels.min()} to {labels.max()}")
        return labels


def tokenise(tokenizer: Any, data: TextData, *, max_length: int) -> Examples:
    """Text or text pairs as the model reads them, cut at ``max_length`` tokens; see ``token_limit``."""
    encoded = tokenizer(data.texts, data.text_pairs, truncation=True, max_length=max_length)
    types = encoded.get("token_type_ids") if data.text_pairs is not None else None
    return Examples(encoded["input_ids"], data.labels, types)


def read_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a directory or a Hugging Face id.

    Raises FileNotFoundError for a directory without one, since transformers would invent one that knows no word, and
    ValueError for one that cannot be read.
    """
    path = Path(source)
    if path.is_dir() and not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{path}: expected a tokenizer beside the model, found none of {', '.join(TOKENIZER_FILES)}; "
            "AutoTokenizer.from_pretrained(ENCODER).save_pretrained(...) puts the encoder's there"
        )
    try:
        return AutoTokenizer.from_pretrained(source)
    except OSError:  # says what it did not find
        raise
    except Exception as error:  # whatever a broken file makes of its reader
        raise ValueError(f"{source}: its tokenizer cannot be read: {type(error).__name__}: {error}") from error


def token_limit(tokenizer: Any, max_length: int | None, encoders: Iterable[PackedEncoder | BackboneWeights]) -> int:
    """Where texts are cut: at ``max_length``, or where they were in training, and at what the position tables hold.

    ``fit`` tells the tokenizer where texts were cut; for a tokenizer that was told nothing it is 512. Raises ValueError
    where a pair's special tokens alone are more: tokenizers do not cut at all then.
    """
    if max_length is None:
        told = tokenizer.model_max_length
        max_length = 512 if told > LARGE_INTEGER else told  # transformers' way to say: unknown
    limit = min(max_length, *(encoder.max_positions for encoder in encoders))
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if limit < special:
        raise ValueError(
            f"max_length: expected at least {special} tokens, as many as a pair has without words, got {limit}"
        )
    return limit
