"""CascadeBERT's training: every member on its own, the first with a margin between easy and difficult rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ragged_exit.accelerate import accelerate
from ragged_exit.examples import Examples
from ragged_exit.models.cascade import CascadeBert
from ragged_exit.models.layered import LayeredModel
from ragged_exit.training.fit import fit


def fit_cascade(
    model: CascadeBert,
    train: Examples,
    valid: Examples,
    *,
    folds: int = 8,
    seed: int = 42,
    work_dir: str | Path | None = None,
    **options: Any,
) -> None:
    """Train the members of ``model`` in place; options as ``fit`` takes them.

    The members share no weights, so the sum of their losses (Li et al., Findings of EMNLP 2021) is trained one member
    at a time. A first member that is a plain model learns difficulty from ``difficult_rows`` over ``folds`` (the
    paper: 8 folds, votes of 5 seeds; here one); 0 folds leave the margin out. To go on from ``work_dir``, call with
    members of the same weights, fresh heads included: those that had not begun have left no start there.
    """
    for number, member in enumerate(model.members):
        folder = None if work_dir is None else Path(work_dir) / f"member-{number + 1}"
        hard = None
        if number == 0 and folds and member.system == "full_depth":
            hard = difficult_rows(member, train, valid, folds=folds, seed=seed, work_dir=folder, **options)  # type: ignore[arg-type]
        fit(
            member,  # type: ignore[arg-type]
            train,
            valid,
            hard=hard,
            seed=seed,
            work_dir=None if folder is None else folder / "member",
            **options,
        )


def difficult_rows(
    model: LayeredModel,
    train: Examples,
    valid: Examples,
    *,
    folds: int,
    seed: int,
    work_dir: Path | None = None,
    **options: Any,
) -> Tensor:
    """bool ``[N]``: the rows that a copy of ``model`` gets wrong when it has been trained on the other folds.

    valid: of ``fit``, none of these rows: those held out judge a copy, and must not choose its epoch.
    """
    if not 2 <= folds <= len(train):
        raise ValueError(f"folds: expected 2 to {len(train)} (the training rows), got {folds}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    hard = torch.zeros(len(train), dtype=torch.bool)
    for fold in range(folds):
        held_out = sorted(order[fold::folds])
        rest = sorted(set(order) - set(held_out))
        other = copy.deepcopy(model)
        folder = None if work_dir is None else work_dir / f"fold-{fold + 1}-of-{folds}"
        fit(other, train.select(rest), valid, seed=seed, work_dir=folder, **options)
        hard[held_out] = _wrong(other, train.select(held_out))
    return hard


def _wrong(model: LayeredModel, examples: Examples) -> Tensor:
    types = examples.token_type_ids or [[0] * len(sequence) for sequence in examples.sequences]
    rows = accelerate(model).stream(
        {"input_ids": ids, "token_type_ids": kinds} for ids, kinds in zip(examples.sequences, types, strict=True)
    )
    answers = [row.logits for row in rows]
    if any(logits is None for logits in answers):
        raise ValueError("train: a sequence that the model cannot read")
    return torch.stack(answers).argmax(1) != examples.label_tensor(model.config.num_labels)  # type: ignore[arg-type]
