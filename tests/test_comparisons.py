"""What the tests compare with can fail: a wrong value, place or length never passes."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import pytest
import torch

from ragged_exit.batch import RaggedBatch
from ragged_exit.ops import ExitDecision, compact, exit_step
from ragged_exit.rules import Entropy
from ragged_exit.testing import (
    MarginReport,
    MarginTally,
    assert_compacted,
    assert_error_budget,
    quiet_threshold,
    random_batch,
    random_head,
    seeded,
)


@pytest.mark.parametrize(
    ("actual", "plain", "oracle", "passes"),
    [
        (1.0, 1.0, 1.0, True),
        (1.1, 1.0, 1.0, False),
        (math.inf, math.inf, math.inf, True),
        (-math.inf, math.inf, math.inf, False),
        (1e9, math.inf, math.inf, False),
        (math.inf, 1.0, 1.0, False),
        (math.inf, math.inf, 1e39, True),  # plain PyTorch overflows, too
        (math.nan, math.nan, math.nan, True),
        (math.nan, math.nan, 1.0, False),
        (1.0, math.nan, math.nan, False),
    ],
)
def test_the_error_budget(actual: float, plain: float, oracle: float, passes: bool) -> None:
    values = [torch.tensor([value, 2.0]) for value in (actual, plain)]
    wanted = torch.tensor([oracle, 2.0], dtype=torch.float64)
    if passes:
        assert_error_budget(*values, wanted, torch.float32)
    else:
        with pytest.raises(AssertionError):
            assert_error_budget(*values, wanted, torch.float32)


@pytest.mark.parametrize(("rows", "inside", "passes"), [(400, 4, True), (400, 5, False), (399, 399, True)])
def test_the_share_of_rows_inside_the_margin(rows: int, inside: int, passes: bool) -> None:
    tally = MarginTally()
    tally.add(MarginReport(rows - 100, inside))
    tally.add(MarginReport(100, 0))
    with contextlib.nullcontext() if passes else pytest.raises(AssertionError, match="too many to mean anything"):
        tally.check()


def compacted() -> tuple[RaggedBatch, ExitDecision, RaggedBatch]:
    generator = seeded(3)
    batch, head = random_batch([3, 2, 4, 1], 8, generator), random_head(8, 3, generator)
    scores = exit_step(batch, head, Entropy(0.0), impl="reference").score
    decision = exit_step(batch, head, Entropy(quiet_threshold(scores, 0.4)), impl="reference")
    assert 0 < int(decision.exits.sum()) < 4
    return batch, decision, compact(batch, decision, impl="reference")


def test_a_compacted_batch() -> None:
    batch, decision, right = compacted()
    assert_compacted(batch, decision, right)
    for change in (
        {"cu_seqlens": right.cu_seqlens + 1},
        {"cu_seqlens": right.cu_seqlens.flip(0)},
        {"seqlens": right.seqlens + 1},
        {"live": right.live + 1},
        {"hidden": right.hidden + 1},
        {"hidden": right.hidden[:-1]},
        {"sample_ids": right.sample_ids.flip(0)},
    ):
        with pytest.raises(AssertionError):
            assert_compacted(batch, decision, replace(right, **change))
