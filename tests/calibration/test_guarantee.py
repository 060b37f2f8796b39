"""The guarantee holds as often as it says, and the search stops where it must."""

from __future__ import annotations

import math

import pytest
import torch

import ragged_exit as rx
from ragged_exit.calibration.exit_table import Exit, ExitTable
from ragged_exit.calibration.guarantee import guaranteed_threshold

RULE = rx.MaxProb(1.0)


def table_of(confidence: torch.Tensor, early_right: torch.Tensor, rule: rx.ExitRule = RULE) -> ExitTable:
    """Two exits, binary; the label is 1, the last exit is always right, the first as told."""
    p = torch.where(early_right, confidence, 1 - confidence)
    early = torch.stack([(1 - p).log(), p.log()], 1)
    last = torch.tensor([[0.0, 9.0]]).expand(len(p), 2)
    scores = torch.stack([confidence, torch.ones_like(p)])
    return ExitTable(scores, torch.stack([early, last]), [Exit(rule, 0, 1, 1), Exit(rule, 1, 2, 2)])


def drawn(rows: int, generator: torch.Generator) -> ExitTable:
    """First exits whose confidence is .5 to 1, and right exactly as often."""
    confidence = 0.5 + 0.5 * torch.rand(rows, generator=generator, dtype=torch.float64).float()
    return table_of(confidence, torch.rand(rows, generator=generator) < confidence)


def true_loss(threshold: float) -> float:
    """P(leaves early and is wrong) = integral of (1 - c) over c > threshold, with density 2 on (.5, 1)."""
    return (1 - max(threshold, 0.5)) ** 2


def test_it_holds_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    broken, speeds = 0, []
    for _ in range(300):
        table = drawn(400, generator)
        found = guaranteed_threshold(table, torch.ones(400, dtype=torch.int64), max_loss=0.05, confidence=0.9)
        assert found.threshold is not None
        broken += true_loss(found.threshold) > 0.05
        speeds.append(found.mean_executed_layers)
    # 10 % may break it; a binomial of 300 at .1 exceeds 43 once in 100 times
    assert broken <= 43
    assert sum(speeds) / len(speeds) < 1.75  # and it is not kept by never leaving: the best threshold reaches 1.55


def test_it_is_a_share_of_the_right_answers():
    """Of rows that full depth has wrong there is nothing to lose: they must not make the share look smaller."""
    table = drawn(400, torch.Generator().manual_seed(2))
    ones = torch.ones(400, dtype=torch.int64)
    alone = guaranteed_threshold(table, ones, max_loss=0.05)
    nowhere = table_of(torch.full((600,), 0.5), torch.zeros(600, dtype=torch.bool))  # they never leave early
    both = ExitTable(
        torch.cat([table.scores, nowhere.scores], 1), torch.cat([table.logits, nowhere.logits], 1), table.exits
    )
    found = guaranteed_threshold(both, torch.cat([ones, torch.zeros(600, dtype=torch.int64)]), max_loss=0.05)
    assert (found.threshold, found.lost) == (alone.threshold, alone.lost)


def test_without_labels_it_counts_changed_answers():
    table = drawn(400, torch.Generator().manual_seed(1))
    labels = torch.ones(400, dtype=torch.int64)  # what the last exit says
    assert guaranteed_threshold(table, None) == guaranteed_threshold(table, labels)


def test_too_few_rows_promise_nothing():
    table = table_of(torch.full((50,), 0.99), torch.ones(50, dtype=torch.bool))
    found = guaranteed_threshold(table, None, max_loss=0.01, confidence=0.95)
    assert found.threshold is None and found.mean_executed_layers == 2
    enough = math.ceil(math.log(0.05) / math.log(0.99))  # rows without a loss that prove 1 % at 95 %
    table = table_of(torch.full((enough,), 0.99), torch.ones(enough, dtype=torch.bool))
    assert guaranteed_threshold(table, None, max_loss=0.01, confidence=0.95).threshold is not None


def test_the_first_failure_ends_the_search():
    """Wrong at the top, right below: a looser threshold would look fine again by share, and must not be reached."""
    confidence = torch.cat([torch.full((100,), 0.999), torch.full((3000,), 0.7)])
    right = torch.cat([torch.zeros(100, dtype=torch.bool), torch.ones(3000, dtype=torch.bool)])
    found = guaranteed_threshold(table_of(confidence, right), None, max_loss=0.02)
    assert found.threshold is not None and found.threshold >= 0.999


def test_patience_is_tried_from_the_longest():
    rule = rx.Patience(1)
    scores = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    logits = torch.tensor([[[5.0, 0.0]] * 2, [[5.0, 0.0]] * 2, [[5.0, 0.0]] * 2]).repeat(1, 300, 1)
    table = ExitTable(scores.repeat(1, 300), logits, [Exit(rule, i, i + 1, i + 1) for i in range(3)])
    found = guaranteed_threshold(table, None)
    assert found.threshold == 1.0 and found.mean_executed_layers == 2


@pytest.mark.parametrize(("options", "name"), [({"max_loss": 0.0}, "max_loss"), ({"confidence": 1.0}, "confidence")])
def test_bad_arguments(options, name):
    with pytest.raises(ValueError, match=name):
        guaranteed_threshold(drawn(10, torch.Generator()), None, **options)
