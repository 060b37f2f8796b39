"""What the tests of the drop-in share: batches, thresholds that let some rows go, comparisons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import padded, random_rows, spread_threshold, tiny_deebert
from torch import Tensor

import ragged_exit as rx

CLOSE = {"rtol": 0, "atol": 2e-5}
FIELDS = ("logits", "score", "exit_layer", "exit_member", "executed_layers")


def inputs(rows: int = 12, side: str = "right", seed: int = 0, fill: int = 0) -> dict[str, Tensor]:
    ids, mask = padded(random_rows(rows, seed), side, fill)
    return {"input_ids": ids, "attention_mask": mask}


def exiting(model: rx.DeeBert, share: float = 0.5, **changes: Any) -> rx.DeeBert:
    """``model`` with an entropy threshold that lets about ``share`` of the rows of ``inputs()`` leave at an exit."""
    batch = inputs(fill=model.config.pad_token_id or 0)
    model.rule = rx.Entropy(spread_threshold(model, **batch, share=share), **changes)
    return model


def assert_same_answers(got: rx.ExitOutput, expected: rx.ExitOutput) -> None:
    assert torch.equal(got.exit_layer, expected.exit_layer)
    assert torch.equal(got.exit_member, expected.exit_member)
    assert torch.equal(got.executed_layers, expected.executed_layers)
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(got.score, expected.score, **CLOSE)


@torch.no_grad()
def reference(model: rx.DeeBert, **batch: Tensor) -> rx.ExitOutput:
    return model(**batch)


def fast_model(**settings: Any) -> rx.AcceleratedModel:
    return rx.accelerate(tiny_deebert(), impl="reference", **settings)


def assert_results(results: list[rx.RowResult], expected: rx.ExitOutput, first: int = 0) -> None:
    for place, result in enumerate(results):
        assert result.index == first + place and result.error is None
        torch.testing.assert_close(result.logits, expected.logits[place], **CLOSE)
        assert result.score == pytest.approx(float(expected.score[place]), abs=2e-5)
        for name in ("exit_layer", "exit_member", "executed_layers"):
            assert getattr(result, name) == int(expected[name][place])
            assert type(getattr(result, name)) is int
