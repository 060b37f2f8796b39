"""The main job: score real text with a fitted DeeBERT, fast; what `ragged-exit bench` runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import ragged_exit.embedded as embedded
from ragged_exit.accelerate import accelerate
from ragged_exit.backbones import backbone_weights
from ragged_exit.bench.compare import compare
from ragged_exit.bench.report import Report
from ragged_exit.bench.workload import Workload
from ragged_exit.calibration.exit_table import exit_table
from ragged_exit.calibration.threshold import choose_threshold, point_at, quality_curve
from ragged_exit.data import count_outputs, read_text_data, split_by_hash
from ragged_exit.examples import Examples, read_tokenizer, token_limit, tokenise
from ragged_exit.models.deebert import DeeBert
from ragged_exit.models.loading import class_names, is_early_exit, load
from ragged_exit.training.fit import fit

Say = Callable[[str], None]
TIMED_ROWS = 768  # a repeat
_SEED = 42  # of fitted heads
_REVISION = 4  # of how heads are fitted: part of every cached name


@dataclass(frozen=True)
class Prepared:
    """A fitted model and its data, tokenised: what remains is to choose a threshold and to measure."""

    title: str
    model: DeeBert
    valid: Workload
    test: Workload


def prepare(model_source: str | None, data_source: Path | None, *, say: Say) -> Prepared:
    """Load data and model, fit heads where the model has none (cached), and tokenise.

    model_source: a directory of ours or a published one, or a Hugging Face directory or id; default the embedded
    bge-small. data_source: a labelled csv, tsv, jsonl or parquet file; default the embedded movie snippets.

    Raises ValueError for data that do not fit: numbers for labels, classes that the model does not have, too few rows.
    """
    if data_source is None:
        data = embedded.binary_sentiment(embedded.movie_snippets(say=say))
        data_name = "VADER movie snippets"
    else:
        names = class_names(model_source) if model_source is not None and is_early_exit(model_source) else None
        data = read_text_data(data_source, label_names=names)
        data_name = data_source.name
    if data.is_regression:
        raise ValueError("data: expected class labels; the entropy exits of this benchmark need classes, got numbers")
    source = str(embedded.encoder_dir("bge-small", say=say)) if model_source is None else model_source
    model_name = "bge-small L12" if model_source is None else Path(model_source).name
    tokenizer = read_tokenizer(source)
    parts = [data.select(rows) for rows in split_by_hash(data.ids)]
    if not all(len(part) for part in parts):
        raise ValueError(f"data: {len(data)} rows are too few for training, validation and test parts; give more")
    fitted = is_early_exit(source)
    if fitted:
        model = _checkpoint(source)
    else:
        model = DeeBert.from_backbone(source, num_labels=count_outputs(data, len(parts[0])), pooling="mean")
    limit = token_limit(tokenizer, None, [backbone_weights(model.backbone)])
    train, valid, test = (tokenise(tokenizer, part, max_length=limit) for part in parts)
    if not fitted:
        model = _with_heads(model, source, train, valid, say=say)
    workloads = (
        Workload(part.sequences, part.label_tensor(model.config.num_labels), part.token_type_ids)
        for part in (valid, test)
    )
    return Prepared(f"{model_name}, {data_name}, {len(test):,} test rows", model, *workloads)


def run_bench(
    prepared: Prepared,
    *,
    threshold: float | None = None,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    repeats: int = 3,
    say: Say,
) -> Report:
    """Choose the threshold on validation data, then check and time every contender on test rows."""
    model, valid, test = prepared.model, prepared.valid, prepared.test
    assert valid.labels is not None
    say("choosing the threshold on validation rows")
    table = exit_table(accelerate(model), valid.sequences, valid.token_type_ids)
    curve = quality_curve(table, valid.labels)
    chosen = choose_threshold(table, valid.labels) if threshold is None else point_at(table, valid.labels, threshold)
    say(f"threshold {chosen.threshold:.4f}: validation accuracy {100 * chosen.quality:.2f} %")
    return compare(
        prepared.title,
        model,
        model.rule.with_threshold(chosen.threshold),
        test,
        lambda number: test.sample(TIMED_ROWS, seed=1000 + number),
        batch_size=batch_size,
        dtype=dtype,
        repeats=repeats,
        say=say,
        curve=curve,
        chosen=chosen,
    )


def _heads_key(source: str, train: Examples, num_labels: int) -> str:
    """Of all that fitted heads depend on: the encoder's files, every row and label, the settings."""
    files = sorted(Path(source).resolve().glob("*")) if Path(source).is_dir() else []
    encoder = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files] or source
    key = hashlib.sha256(repr((_REVISION, encoder, num_labels, _SEED, train.labels)).encode())
    for row in zip(train.sequences, train.token_type_ids or train.sequences, strict=True):
        key.update(repr(row).encode())
    return key.hexdigest()[:16]


def _checkpoint(source: str) -> DeeBert:
    model = load(source)
    if not isinstance(model, DeeBert):
        raise ValueError(f"model: expected a DeeBERT checkpoint or a plain encoder, got {model.system}")
    if model.rule.initial_state(1, model.device):
        raise ValueError(f"model: expected a rule that counts nothing from exit to exit, got {model.rule}")
    return model


def _with_heads(model: DeeBert, source: str, train: Examples, valid: Examples, *, say: Say) -> DeeBert:
    """``model`` fitted, or as it was fitted before on the same rows."""
    cached = embedded.cache_dir() / "heads" / _heads_key(source, train, model.config.num_labels)
    if (cached / "model.safetensors").is_file():
        say(f"heads from {cached}")
        return DeeBert.from_pretrained(cached)  # type: ignore[return-value]
    say(f"fitting heads on {len(train):,} rows, the backbone frozen")
    fit(model, train, valid, freeze_backbone=True, seed=_SEED)
    model.save_pretrained(cached)
    return model
