"""Every figure of merit against numbers worked out by hand, or by counting pairs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ragged_exit.calibration.metrics import (
    accuracy,
    calibration_error,
    difficulty_inversion,
    f1,
    layer_speedup,
    layers_saved,
    pearson,
    remaining_cost,
    spearman,
)


def logits_of(*probabilities: float) -> torch.Tensor:
    """Rows whose probability of class 1 is given."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([(1 - p).log(), p.log()], 1)


def test_accuracy_and_f1():
    logits, labels = logits_of(0.9, 0.8, 0.3, 0.6, 0.2), torch.tensor([1, 0, 1, 1, 0])
    assert accuracy(logits, labels) == pytest.approx(3 / 5)
    assert f1(logits, labels) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))  # 2 true, 1 false positive, 1 false negative
    assert f1(logits_of(0.1, 0.2), torch.tensor([0, 0])) == 0.0


def test_one_row_has_no_correlation():
    one = torch.tensor([0.5])
    assert math.isnan(pearson(one, one)) and math.isnan(spearman(one, one))


def test_correlations():
    values, targets = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    assert spearman(values, targets) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    x, y = values - values.mean(), targets - targets.mean()
    assert pearson(values, targets) == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), rel=1e-6)
    assert spearman(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(math.sqrt(3) / 2)


def test_calibration_error():
    # confidences .95 .92 | .62 | .85, right: yes no | yes | no
    logits, labels = logits_of(0.95, 0.92, 0.38, 0.85), torch.tensor([1, 0, 0, 0])
    wanted = (abs(0.95 + 0.92 - 1) + abs(1 - 0.62) + abs(0 - 0.85)) / 4
    assert calibration_error(logits, labels) == pytest.approx(wanted)


def test_a_confidence_on_a_bin_edge_belongs_below():
    logits = torch.tensor([[0.0, math.log(4.0)]], dtype=torch.float64)  # .8 or a rounding error beside it
    assert calibration_error(logits, torch.tensor([1])) == pytest.approx(0.2)
    certain = torch.tensor([[0.0, 1000.0]])
    assert calibration_error(certain, torch.tensor([1])) == 0.0


@given(
    st.lists(
        st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.booleans()),  # few values: ties are common
        min_size=1,
        max_size=30,
    )
)
def test_difficulty_inversion_counts_pairs(rows):
    confidence = torch.tensor([value for value, _ in rows])
    hard = torch.tensor([is_hard for _, is_hard in rows])
    easy_rows = [value for value, is_hard in rows if not is_hard]
    hard_rows = [value for value, is_hard in rows if is_hard]
    found = difficulty_inversion(confidence, hard)
    if not easy_rows or not hard_rows:
        assert math.isnan(found)
        return
    inverted = sum(other > own for own in easy_rows for other in hard_rows)
    assert found == pytest.approx(1 - inverted / (len(easy_rows) * len(hard_rows)))


def test_speedups():
    executed = torch.tensor([2, 2, 14, 6])  # a cascade of 2 and 12 layers, and one that left at layer 6
    assert layer_speedup(executed, 12) == pytest.approx(12 / 6)
    assert remaining_cost(executed, 12) == pytest.approx(0.5)
    assert layers_saved(executed, 12) == pytest.approx(0.5)
