"""The exit table equals the model's own exits, and thresholds are chosen as documented."""

import pytest
import torch
from transformers import BertConfig

import ragged_exit as rx
from ragged_exit.calibration.exit_table import ExitTable, exit_table
from ragged_exit.calibration.threshold import accuracy_curve, choose_threshold

# 3 exits x 4 rows; the shallow exits are sure of rows 0 and 1, and wrong about row 3
SCORES = torch.tensor([[0.1, 0.2, 0.6, 0.3], [0.1, 0.1, 0.2, 0.3], [0.0, 0.0, 0.0, 0.0]])
ANSWERS = torch.tensor([[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]])
LABELS = torch.tensor([0, 1, 1, 1])


def table(compare: str = "<", scores: torch.Tensor = SCORES) -> ExitTable:
    return ExitTable(scores, torch.nn.functional.one_hot(ANSWERS, 2).float(), [4, 8, 12], compare)


@pytest.mark.parametrize(
    ("threshold", "layers", "accuracy"),
    [(0.05, [12, 12, 12, 12], 1.0), (0.25, [4, 4, 8, 12], 1.0), (0.5, [4, 4, 8, 4], 0.75), (0.9, [4, 4, 4, 4], 0.5)],
)
def test_answers_by_hand(threshold, layers, accuracy):
    logits, exit_layer = table().answers_at(threshold)
    assert exit_layer.tolist() == layers
    assert (logits.argmax(1) == LABELS).float().mean() == accuracy


def test_larger_is_surer_for_probabilities():
    _, exit_layer = table(">", 1 - SCORES).answers_at(0.75)
    assert exit_layer.tolist() == [4, 4, 8, 12]


def test_chooses_the_shallowest_point_that_keeps_accuracy():
    chosen = choose_threshold(table(), LABELS, max_drop=0.0)
    assert chosen.accuracy == 1.0 and chosen.mean_exit_layer == (4 + 4 + 8 + 12) / 4
    loose = choose_threshold(table(), LABELS, max_drop=0.3)
    assert loose.accuracy == 0.75 and loose.mean_exit_layer < chosen.mean_exit_layer
    for point in accuracy_curve(table(), LABELS):
        assert point.mean_exit_layer >= loose.mean_exit_layer or point.accuracy < 0.7


def test_never_leaves_early_when_every_early_answer_costs_accuracy():
    wrong = ExitTable(torch.zeros(2, 4), torch.tensor([[[1.0, 0]] * 4, [[0, 1.0]] * 4]), [1, 2], "<")
    chosen = choose_threshold(wrong, torch.ones(4, dtype=torch.long), max_drop=0.0)
    assert chosen.accuracy == 1.0 and chosen.mean_exit_layer == 2


@pytest.mark.parametrize("rule", [rx.Entropy(0.0), rx.MaxProb(0.0)])
def test_table_predicts_what_the_model_does(rule):
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, num_labels=3
    )
    model = rx.DeeBert(config, rule).eval()
    for head in (*model.highways, model.final):
        torch.nn.init.normal_(head.classifier.weight, std=3.0)
    sequences = [torch.randint(1, 50, (length,)).tolist() for length in (1, 9, 3, 12, 5, 7, 2, 2, 30, 11)]
    found = exit_table(rx.accelerate(model), sequences, token_budget=20)
    early = found.scores[:-1].flatten().sort().values
    threshold = float(early[[9, 10]].mean())  # between two scores, so that no row is near it
    logits, exit_layer = found.answers_at(threshold)
    rows = list(rx.accelerate(model, threshold=threshold).stream(sequences))
    assert exit_layer.tolist() == [row.exit_layer for row in rows]
    assert 1 < exit_layer.double().mean() < 4
    torch.testing.assert_close(logits, torch.stack([row.logits for row in rows]), atol=1e-5, rtol=0)


def test_refuses_rules_with_row_state():
    model = rx.DeeBert(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4), rx.Patience(1)
    )
    with pytest.raises(ValueError, match="stateless"):
        exit_table(rx.accelerate(model), [[1, 2]])
