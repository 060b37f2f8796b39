"""exit_decide under rules that read more than logits: DE3-BERT's distances, what patience remembers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import decide, state_of

from ragged_exit.rules import ConfidentPatience, DistanceEntropy, Patience
from ragged_exit.testing import assert_same_values

# DE3-BERT --------------------------------------------------------------------------------------------------------


def logits_with_entropy(entropy: float) -> list[float]:
    """Two logits [z, 0], z > 0, whose normalised entropy is this."""
    low, high = 0.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        p = 1 / (1 + math.exp(-middle))
        value = -(p * math.log(p) + (1 - p) * math.log1p(-p)) / math.log(2) if p < 1 else 0.0
        low, high = (middle, high) if value > entropy else (low, middle)
    return [low, 0.0]


def edr(logits: list[float], distances: list[float], impl: str, device: str, **rule) -> float:
    signal = torch.tensor([distances], device=device)
    return float(decide([logits], DistanceEntropy(0.5, **rule), impl, device, signal=signal).score[0])


def test_distance_entropy_check_rows(impl, device):
    """lam = 1, E = .3, r1 = .2, r2 = .6: DR .1666667, EDR .2142857; two zero distances: DR = 1/2."""
    logits = logits_with_entropy(0.3)
    assert edr(logits, [0.2, 0.6], impl, device) == pytest.approx(0.2142857, abs=2e-6)
    assert edr(logits, [0.2, 0.6], impl, device, lam=1e7) == pytest.approx(0.1666667, abs=2e-6)  # DR alone
    assert edr(logits, [0.2, 0.6], impl, device, lam=0.0) == pytest.approx(0.3, abs=2e-6)  # E alone
    assert edr(logits, [0.6, 0.2], impl, device, lam=1e7) == pytest.approx(0.8333333, abs=2e-6)
    assert edr(logits, [0.0, 0.0], impl, device) == pytest.approx(2 * 0.5 * 0.3 / 0.8, abs=2e-6)
    assert edr([200.0, 0.0], [0.0, 0.5], impl, device) == 0  # DR and E both 0: 0 by definition, not 0 / 0
    assert edr([200.0, 0.0], [0.5, 0.5], impl, device) == 0
    assert math.isnan(edr([math.nan, 0.0], [0.2, 0.6], impl, device))
    assert math.isnan(edr(logits, [math.nan, 0.6], impl, device))


def test_the_two_distance_orders(impl, device):
    """By "prob" the distances of the two likeliest classes in that order, by "distance" the two smallest."""
    kwargs = {"impl": impl, "device": device, "lam": 1e7}

    def ratio(first: float, second: float) -> float:
        return (1 + (first - second) / max(first, second)) / 2

    z, r = [0.1, 2.0, 1.0, -1.0], [0.3, 0.8, 0.5, 0.2]
    assert edr(z, r, **kwargs) == pytest.approx(ratio(0.8, 0.5), abs=2e-6)
    assert edr(z, r, dr_order="distance", **kwargs) == pytest.approx(ratio(0.2, 0.3), abs=2e-6)
    assert edr([1.0, 1.0, 1.0], [0.3, 0.6, 0.9], **kwargs) == pytest.approx(ratio(0.3, 0.6), abs=2e-6)  # lower index
    assert edr([0.0, 1.0, 1.0], [0.3, 0.6, 0.9], **kwargs) == pytest.approx(ratio(0.6, 0.9), abs=2e-6)
    assert edr([1.0, 0.0, 0.0], [0.3, 0.6, 0.9], **kwargs) == pytest.approx(ratio(0.3, 0.6), abs=2e-6)
    two = [2.0, 0.0]  # with two classes they differ only when the nearer prototype is not the likelier class's
    assert edr(two, [0.2, 0.7], **kwargs) == pytest.approx(
        edr(two, [0.2, 0.7], dr_order="distance", **kwargs), abs=1e-6
    )
    assert edr(two, [0.7, 0.2], **kwargs) == pytest.approx(ratio(0.7, 0.2), abs=2e-6)
    assert edr(two, [0.7, 0.2], dr_order="distance", **kwargs) == pytest.approx(ratio(0.2, 0.7), abs=2e-6)


# patience ---------------------------------------------------------------------------------------------------------


@given(
    answers=st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=5),
    patience=st.integers(0, 4),
)
def test_patience_is_pabee(impl, device, answers, patience):
    """Through the layers, against PABEE's own loop over one sample: a counter that restarts at 0, exit when equal."""
    rule = Patience(patience)
    state = rule.initial_state(len(answers), torch.device(device))
    left: dict[int, int] = {}
    for layer in range(6):
        logits = torch.eye(3)[[row[layer] for row in answers]] + 0.1 * layer
        decision = decide(logits, rule, impl, device, state=state, exit_index=layer)
        state = decision.state
        for row in decision.exits.nonzero()[:, 0].tolist():
            left.setdefault(row, layer)
    for row, given_answers in enumerate(answers):
        counter, previous, expected = 0, None, None
        for layer, answer in enumerate(given_answers):
            counter = counter + 1 if previous is not None and answer == previous else 0
            previous = answer
            if counter == patience and patience > 0:
                expected = layer
                break
        assert left.get(row) == expected


def test_patience_answers(impl, device):
    """Equal logits: the lower class answers. NaN agrees with nothing, before and after. Patience 0 never exits."""
    logits = [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 2.0]]
    broken = [[math.nan, 0.0, 0.0], [0.0, 1.0, math.nan]]
    logits += [row for row in broken for _ in range(3)]
    state = state_of([1] * 9, [0, 1, math.nan, 0, 1, 2, 0, 1, 2], device)  # a NaN row after each possible answer
    decision = decide(logits, Patience(2), impl, device, state=state)
    assert decision.state["counter"].tolist() == [2, 2] + [0] * 7
    assert decision.score.tolist() == [2, 2] + [0] * 7
    assert decision.exits.tolist() == [True, True] + [False] * 7
    expected = torch.tensor([0, 1, 2] + [math.nan] * 6)
    assert_same_values(decision.state["previous"].cpu(), expected)
    assert state["counter"].tolist() == [1] * 9  # the input's state is not written
    assert not decide(logits, Patience(0), impl, device, state=state).exits.any()
    assert decide(logits, Patience((1, 9)), impl, device, state=state, exit_index=0).exits.any()
    assert not decide(logits, Patience((1, 9)), impl, device, state=state, exit_index=1).exits.any()


def test_patience_of_a_regression(impl, device):
    """Agreement is a change below the tolerance, not at it; the first exit has nothing to agree with."""
    logits = [[1.5], [1.5], [1.5], [math.nan], [1.5]]
    state = state_of([1, 1, 1, 1, 0], [1.25, 1.0, 2.0, 1.5, math.nan], device)
    decision = decide(logits, Patience(2, tolerance=0.5), impl, device, state=state)
    assert decision.state["counter"].tolist() == [2, 0, 0, 0, 0]
    assert decision.exits.tolist() == [True, False, False, False, False]
    assert_same_values(decision.state["previous"].cpu(), torch.tensor([1.5, 1.5, 1.5, math.nan, 1.5]))


def test_confident_patience(impl, device):
    """Counts layers of categorical entropy below the tolerance; the answer may change from layer to layer."""
    confident, doubtful = [4.0, 0.0], [0.5, 0.0]
    state = state_of([1, 1, 0, 3], [0, 0, 0, 0], device)
    rule = ConfidentPatience(2, tolerance=0.2)
    decision = decide([confident, doubtful, confident[::-1], [math.nan, 0.0]], rule, impl, device, state=state)
    assert decision.state["counter"].tolist() == [2, 0, 1, 0]
    assert decision.exits.tolist() == [True, False, False, False]
    # 0.5 nats are 0.72 of ln 2: a tolerance between the two tells normalised from plain entropy
    between = logits_with_entropy(0.72)
    state = state_of([0], [0], device)
    counted = [
        decide([between], ConfidentPatience(1, tolerance=tolerance), impl, device, state=state).exits[0]
        for tolerance in (0.6, 0.8)
    ]
    assert [bool(value) for value in counted] == [False, True]
