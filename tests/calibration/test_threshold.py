"""Thresholds and patiences are chosen from an exit table as documented: rows and answers by hand."""

from __future__ import annotations

import math

import pytest
import torch

import ragged_exit as rx
from ragged_exit.calibration.exit_table import Exit, ExitTable
from ragged_exit.calibration.threshold import choose_threshold, quality_curve, threshold_for_layers

# 3 exits x 4 rows; the shallow exits are sure of rows 0 and 1, and wrong about row 3
SCORES = torch.tensor([[0.1, 0.2, 0.6, 0.3], [0.1, 0.1, 0.2, 0.3], [0.0, 0.0, 0.0, 0.0]])
ANSWERS = torch.tensor([[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]])
LABELS = torch.tensor([0, 1, 1, 1])


def table(rule: rx.ExitRule | None = None, scores: torch.Tensor = SCORES, answers: torch.Tensor = ANSWERS) -> ExitTable:
    rule = rx.Entropy(0.0) if rule is None else rule
    exits = [Exit(rule, index, 4 * (index + 1), 4 * (index + 1)) for index in range(len(scores))]
    return ExitTable(scores, torch.nn.functional.one_hot(answers, 2).float(), exits)


@pytest.mark.parametrize(
    ("threshold", "layers", "accuracy"),
    [
        (0.05, [12, 12, 12, 12], 1.0),
        (0.25, [4, 4, 8, 12], 1.0),
        (0.5, [4, 4, 8, 4], 0.75),
        (0.9, [4, 4, 4, 4], 0.5),
        ([0.15, 0.25, 0.0], [4, 8, 8, 12], 1.0),
    ],
)
def test_answers_by_hand(threshold, layers, accuracy):
    replay = table().at(threshold)
    assert replay.exit_layer.tolist() == replay.executed_layers.tolist() == layers
    assert replay.exit_index.tolist() == [layer // 4 - 1 for layer in layers]
    assert (replay.logits.argmax(1) == LABELS).float().mean() == accuracy


def test_larger_is_surer_for_probabilities():
    assert table(rx.MaxProb(1.0), 1 - SCORES).at(0.75).exit_layer.tolist() == [4, 4, 8, 12]


def test_comparisons_are_the_rules_in_fp32_and_nan_stays():
    scores = torch.tensor([[0.1, math.nan, 0.2], [0.0, 0.0, 0.0]])
    answers = torch.zeros(2, 3, dtype=torch.long)
    assert table(scores=scores, answers=answers).at(0.1).exit_index.tolist() == [1, 1, 1]
    at_most = rx.Entropy(0.0, compare="<=")
    assert table(at_most, scores, answers).at(0.1).exit_index.tolist() == [0, 1, 1]


def test_patience_counts_and_zero_never_leaves():
    counters = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 1.0], [3.0, 2.0]])
    found = table(rx.Patience(0), counters, torch.zeros(4, 2, dtype=torch.long))
    layers = {patience: found.at(patience).exit_layer.tolist() for patience in range(4)}
    assert layers == {0: [16, 16], 1: [8, 12], 2: [12, 16], 3: [16, 16]}
    assert found.candidates() == [3.0, 2.0, 1.0]
    assert threshold_for_layers(found, 14.0) == 2.0


def test_an_inner_exit_keeps_its_own_rule():
    inner, own = rx.Entropy(0.25), rx.MaxProb(1.0)
    exits = [Exit(inner, 0, 4, 4, own=False), Exit(own, 0, 8, 8), Exit(own, 1, 2, 10, exit_member=2)]
    scores = torch.tensor([[0.1, 0.3, 0.3], [0.9, 0.9, 0.6], [0.5, 0.5, 0.5]])
    found = ExitTable(scores, torch.zeros(3, 3, 2), exits)
    for threshold, members in ((0.95, [1, 2, 2]), (0.7, [1, 1, 2]), (0.1, [1, 1, 1])):
        assert found.at(threshold).exit_member.tolist() == members
    assert found.at(0.7).executed_layers.tolist() == [4, 8, 10]
    assert found.at(0.7).exit_layer.tolist() == [4, 8, 2]
    assert min(found.candidates()) == pytest.approx(0.6)  # of the cascade's own exit only


def test_another_score_is_refused():
    with pytest.raises(ValueError, match="rule: the table has the scores of"):
        table().under(rx.Entropy(0.1, dialect="hf"))
    assert table().under(rx.Entropy(0.3, compare="<=")).exit_index.tolist() == [0, 0, 1, 0]


def test_chooses_the_shallowest_point_that_keeps_accuracy():
    chosen = choose_threshold(table(), LABELS, max_drop=0.0)
    assert chosen.quality == 1.0 and chosen.mean_executed_layers == (4 + 4 + 8 + 12) / 4
    loose = choose_threshold(table(), LABELS, max_drop=0.3)
    assert loose.quality == 0.75 and loose.mean_executed_layers < chosen.mean_executed_layers
    for point in quality_curve(table(), LABELS):
        assert point.mean_executed_layers >= loose.mean_executed_layers or point.quality < 0.7


def test_the_deepest_threshold_within_a_mean_depth():
    for layers, executed in ((12.0, 12.0), (7.9, 7.0), (5.0, 5.0), (4.9, 4.0)):
        threshold = threshold_for_layers(table(), layers)
        assert threshold is not None and table().at(threshold).executed_layers.double().mean() == executed
    assert threshold_for_layers(table(), 3.9) is None


@pytest.mark.parametrize("rule", [rx.Entropy(0.0), rx.Entropy(0.0, compare="<="), rx.MaxProb(1.0)])
def test_the_loosest_candidate_lets_all_leave_at_the_first_exit(rule):
    """The row with the extreme score, too, which a strict comparison keeps; also where all scores are equal."""
    for scores in (SCORES, torch.full_like(SCORES, 1e-7)):
        found = table(rule, scores)
        assert found.at(found.candidates()[-1]).exit_layer.tolist() == [4] * 4


def test_never_leaves_early_when_every_early_answer_costs_accuracy():
    wrong = table(scores=torch.zeros(2, 4), answers=torch.tensor([[0] * 4, [1] * 4]))
    chosen = choose_threshold(wrong, torch.ones(4, dtype=torch.long), max_drop=0.0)
    assert chosen.quality == 1.0 and chosen.mean_executed_layers == 8
