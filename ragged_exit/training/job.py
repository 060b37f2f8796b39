"""The fit command's work: an encoder and labelled text in, a trained early-exit checkpoint out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import set_seed

from ragged_exit.backbones import backbone_weights
from ragged_exit.claims import end_claim, read_claim, read_outcome, write_claim
from ragged_exit.data import count_outputs, read_text_data, split_by_hash
from ragged_exit.examples import Examples, read_tokenizer, token_limit, tokenise
from ragged_exit.models.base import SYSTEMS, EarlyExitModel
from ragged_exit.models.cascade import CascadeBert
from ragged_exit.models.full_depth import FullDepth
from ragged_exit.models.layered import LayeredModel
from ragged_exit.training.cascade import fit_cascade
from ragged_exit.training.fit import fit, has_progress
from ragged_exit.training.recipes import RECIPES

SYSTEM_NAMES = (*RECIPES, CascadeBert.system)
VALID_SHARE = 0.15  # of the training rows, where there is no validation file
RUN_FOLDER = "unfinished"


class Fitted(NamedTuple):
    """What ``run_fit`` trained, and the validation rows that it left out."""

    model: EarlyExitModel
    valid: Examples


def run_fit(
    system: str,
    source: str,
    data: Path,
    out: Path,
    *,
    members: Sequence[str] = (),
    pooling: str = "cls",
    valid_data: Path | None = None,
    max_length: int = 128,
    folds: int = 8,
    seed: int = 42,
    say: Callable[[str], Any],
    **options: Any,
) -> Fitted:
    """Train ``system`` on the encoder ``source`` and save it, with its tokenizer, in ``out``.

    source: a Hugging Face directory or id; for a cascade its largest member, with the smaller ones in ``members``.
    data: labelled csv, tsv, jsonl or parquet; floats are a regression's targets, and the names of string labels become
    the config's ``id2label``. valid_data: the same, with no other names, or None: 15 % of the rows, by a hash of their
    ids. max_length: tokens a row, at most, and at most what the encoder's position table holds. options: as ``fit``
    takes them. A run that was stopped goes on when called again.

    Raises ValueError for an unknown system, members without a cascade, data that do not fit, an ``out`` that holds a
    model already, or a folder ``out``/unfinished that holds another run's work or files of somebody else.
    """
    if system not in SYSTEM_NAMES:
        raise ValueError(f"system: expected one of {', '.join(SYSTEM_NAMES)}, got {system!r}")
    if (system == CascadeBert.system) != bool(members):
        raise ValueError("member: a cascade needs at least one smaller encoder, and no other system takes one")
    if system == "fastbert" and pooling != "cls":
        raise ValueError("pooling: fastbert's heads see all tokens, and are asked for none")
    run = out / RUN_FOLDER
    claim = {"command": "fit", "system": system}
    if read_claim(run, claim, "out") is not None and (outcome := read_outcome(run)) is not None:
        end_claim(run, outcome)  # the model is there, and only deleting the rest was cut short
    if (out / "config.json").exists() and not run.exists():  # with it the end of a run was cut short
        raise ValueError(f"out: {out} holds a model already; delete it or give another folder")
    text = read_text_data(data)
    if valid_data is None:
        rows = split_by_hash(text.ids, (1 - VALID_SHARE, VALID_SHARE))
        parts = [text.select(part) for part in rows]
    else:
        parts = [text, read_text_data(valid_data, label_names=text.label_names or ())]
    if not all(len(part) for part in parts):
        raise ValueError(f"data: {len(text)} rows are too few for a validation part; give more, or a validation file")
    num_labels = count_outputs(text, len(parts[0]))
    tokenizer = read_tokenizer(source)
    set_seed(seed)
    model = _build(system, source, members, num_labels, pooling)
    encoders: Any = model.members if isinstance(model, CascadeBert) else [model]
    limit = token_limit(tokenizer, max_length, [backbone_weights(encoder.backbone) for encoder in encoders])
    train, valid = (tokenise(tokenizer, part, max_length=limit) for part in parts)
    if text.label_names is not None:
        model.config.id2label = dict(enumerate(text.label_names))
        model.config.label2id = {name: label for label, name in enumerate(text.label_names)}
    say(f"{system}: {len(train):,} training rows, {len(valid):,} validation rows, of at most {limit} tokens")
    _claim(run, claim)
    if isinstance(model, CascadeBert):
        fit_cascade(model, train, valid, folds=folds, seed=seed, work_dir=run / "model", **options)
    else:
        assert isinstance(model, LayeredModel)
        fit(model, train, valid, seed=seed, work_dir=run / "model", **options)
    model.save_pretrained(out)
    tokenizer.model_max_length = limit  # what the exits were trained on is where texts are cut from now on
    tokenizer.save_pretrained(out)
    end_claim(run, True)
    return Fitted(model, valid)


def _claim(run: Path, claim: dict[str, Any]) -> None:
    """Make the folder ours: it is deleted in the end."""
    found = read_claim(run, claim, "out")
    if found not in (None, claim) and has_progress(run):
        raise ValueError(f"out: {run} holds an unfinished run of another system; delete it first")
    write_claim(run, claim)


def _build(system: str, source: str, members: Sequence[str], num_labels: int, pooling: str) -> EarlyExitModel:
    if system != CascadeBert.system:
        return new_model(system, source, num_labels, pooling)
    encoders = (*members, source)
    return CascadeBert.from_members(
        [FullDepth.from_backbone(encoder, num_labels=num_labels, pooling=pooling) for encoder in encoders]
    )


def new_model(system: str, source: str | Path, num_labels: int, pooling: str) -> LayeredModel:
    """Fresh heads of ``system``, which is no cascade, on the encoder ``source``."""
    factory = SYSTEMS[system]
    assert issubclass(factory, LayeredModel)
    pooled: dict[str, Any] = {} if system == "fastbert" else {"pooling": pooling}  # its heads see all tokens
    return factory.from_backbone(source, num_labels=num_labels, **pooled)
