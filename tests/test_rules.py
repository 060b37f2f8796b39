"""Exit rules: thresholds, refusals, what the kernels are told, and the way through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ragged_exit.online import UcbMaxProb
from ragged_exit.rules import (
    COMPARISONS,
    DR_ORDERS,
    ENTROPY_DIALECTS,
    RULES,
    SCORES,
    ConfidentPatience,
    DistanceEntropy,
    Energy,
    Entropy,
    ExitRule,
    LearnedUncertainty,
    MaxProb,
    Patience,
    ScoreSpec,
    rule_from_dict,
)
from ragged_exit.testing import every_rule

numbers = st.floats(allow_nan=False, allow_infinity=False)
thresholds = st.one_of(numbers, st.lists(numbers, min_size=1, max_size=5), st.lists(numbers, min_size=2).map(tuple))
patiences = st.one_of(st.integers(0, 12), st.lists(st.integers(0, 12), min_size=1, max_size=5))
comparisons = st.sampled_from(COMPARISONS)
positive = st.floats(0.01, 100)

any_rule = st.one_of(
    st.builds(Entropy, thresholds, compare=comparisons, dialect=st.sampled_from(ENTROPY_DIALECTS)),
    st.builds(MaxProb, thresholds, compare=comparisons, temperature=positive),
    st.builds(Energy, thresholds, compare=comparisons, temperature=positive),
    st.builds(LearnedUncertainty, thresholds, compare=comparisons),
    st.builds(Patience, patiences, tolerance=numbers),
    st.builds(ConfidentPatience, patiences, tolerance=numbers),
    st.builds(
        DistanceEntropy, thresholds, compare=comparisons, lam=st.floats(0, 100), dr_order=st.sampled_from(DR_ORDERS)
    ),
)


def as_lists(rule: ExitRule) -> dict:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(rule).items()}


@given(any_rule)
def test_through_json(rule):
    """What config.json holds is read back as the same rule: same class, fields, spec and thresholds."""
    read = rule_from_dict(json.loads(json.dumps(rule.to_dict())))
    assert type(read) is type(rule) and as_lists(read) == as_lists(rule) and read.spec == rule.spec
    exits = len(rule.threshold) if isinstance(rule.threshold, list | tuple) else 3
    assert [read.threshold_at(index) for index in range(exits)] == [rule.threshold_at(index) for index in range(exits)]


@given(any_rule)
def test_every_spec_is_one_that_kernels_know(rule):
    spec = rule.spec
    assert spec.score in SCORES and spec.compare in COMPARISONS and spec.dr_order in DR_ORDERS
    assert isinstance(spec, ScoreSpec) and all(isinstance(value, str | float) for value in spec)


@pytest.mark.parametrize(
    ("rule", "spec"),
    [
        (Entropy(0.1), ScoreSpec("entropy_exact", "<")),
        (Entropy(0.1, dialect="hf", compare="<="), ScoreSpec("entropy_hf", "<=")),
        (MaxProb(0.9), ScoreSpec("max_prob", ">")),
        (MaxProb(0.9, compare=">=", temperature=2.0), ScoreSpec("max_prob", ">=", temperature=2.0)),
        (Energy(0.1, temperature=3.0), ScoreSpec("energy", "<", temperature=3.0)),
        (LearnedUncertainty(0.2), ScoreSpec("uncertainty", "<")),
        (Patience(6, 0.5), ScoreSpec("patience", ">=", tolerance=0.5)),
        (ConfidentPatience(2, 0.3), ScoreSpec("confident_patience", ">=", tolerance=0.3)),
        (DistanceEntropy(0.4), ScoreSpec("distance_entropy", "<", lam=1.0, dr_order="prob")),
        (
            DistanceEntropy(0.4, lam=2, dr_order="distance", compare="<="),
            ScoreSpec("distance_entropy", "<=", lam=2.0, dr_order="distance"),
        ),
    ],
)
def test_what_the_kernels_are_told(rule, spec):
    assert rule.spec == spec


def test_the_op_suite_has_a_rule_of_every_score():
    assert {rule.spec.score for rule in every_rule()} == set(SCORES)


def test_what_a_rule_needs_of_the_head():
    needs = {name: rule.needs for name, rule in RULES.items() if rule.needs}
    assert needs == {"LearnedUncertainty": "uncertainty", "DistanceEntropy": "prototypes"}


def test_thresholds_per_exit():
    rule = Entropy([0.1, 0.2, 0.3])
    assert [rule.threshold_at(index) for index in range(3)] == [0.1, 0.2, 0.3]
    assert [Entropy(0.5).threshold_at(index) for index in (0, 7)] == [0.5, 0.5]
    rule.check(3)
    Entropy(0.5).check(12)
    with pytest.raises(ValueError, match=r"threshold: expected one number or 12 \(one per exit\), got 3"):
        rule.check(12)
    with pytest.raises(ValueError, match="patience: expected one number or 2"):
        Patience([1, 2, 3]).check(2)


def test_patience_counts_and_zero_switches_it_off():
    assert Patience(3).threshold_at(0) == 3 and Patience([0, 2]).threshold_at(1) == 2
    assert Patience(0).threshold_at(0) == math.inf and Patience([0, 2]).threshold_at(0) == math.inf
    assert ConfidentPatience(0, 0.3).threshold_at(5) == math.inf


def test_row_state_at_the_start():
    for rule in (Patience(3), ConfidentPatience(2, 0.1)):
        state = rule.initial_state(4, torch.device("cpu"))
        assert state["counter"].tolist() == [0] * 4 and state["counter"].dtype == torch.int32
        assert state["previous"].isnan().tolist() == [True] * 4 and state["previous"].dtype == torch.float32
    for rule in (Entropy(0.1), MaxProb(0.9), DistanceEntropy(0.3)):
        assert rule.initial_state(4, torch.device("cpu")) == {}


def test_a_rule_keeps_the_numbers_that_it_was_given():
    given = [0.1, 0.2]
    rules = (Entropy(given), Patience([2, 3]), UcbMaxProb(given, overhead=given))
    given[0] = 9.0
    assert rules[0].threshold == rules[2].arms == rules[2].overhead == (0.1, 0.2) and rules[1].patience == (2, 3)


def test_rules_are_values():
    assert Entropy(0.1) == Entropy(0.1) != Entropy(0.2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Entropy(0.1).threshold = 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Entropy(math.nan), "threshold: expected numbers, got NaN"),
        (lambda: Entropy([0.1, math.nan]), "threshold: expected numbers, got NaN"),
        (lambda: Entropy([]), "threshold: .* got an empty sequence"),
        (lambda: MaxProb(()), "threshold: .* got an empty sequence"),
        (lambda: Entropy(0.1, compare="=="), "compare: expected one of .* got '=='"),
        (lambda: Entropy(0.1, dialect="bits"), "dialect: expected one of .* got 'bits'"),
        (lambda: MaxProb(0.9, temperature=0.0), "temperature: expected a finite number > 0, got 0.0"),
        (lambda: MaxProb(0.9, temperature=math.nan), "temperature: "),
        (lambda: MaxProb(0.9, compare="!"), "compare: "),
        (lambda: Energy(0.1, temperature=math.inf), "temperature: "),
        (lambda: Energy(0.1, temperature=-1.0), "temperature: "),
        (lambda: Energy(math.nan), "threshold: "),
        (lambda: LearnedUncertainty(math.nan), "threshold: "),
        (lambda: Patience(-1), "patience: expected whole numbers >= 0, got -1"),
        (lambda: Patience(1.5), "patience: expected whole numbers >= 0, got 1.5"),
        (lambda: Patience([2, -1]), "patience: "),
        (lambda: Patience(2, math.nan), "tolerance: expected a number, got NaN"),
        (lambda: Patience([]), "empty sequence"),
        (lambda: ConfidentPatience(2, math.nan), "tolerance: "),
        (lambda: DistanceEntropy(0.1, lam=-1.0), "lam: expected a finite number >= 0, got -1.0"),
        (lambda: DistanceEntropy(0.1, lam=math.nan), "lam: "),
        (lambda: DistanceEntropy(0.1, lam=math.inf), "lam: "),
        (lambda: DistanceEntropy(0.1, dr_order="size"), "dr_order: expected one of .* got 'size'"),
        (lambda: rule_from_dict({"name": "Entropies", "threshold": 0.1}), "rule: expected one of .* got 'Entropies'"),
        (lambda: rule_from_dict({"threshold": 0.1}), "rule: expected one of .* got None"),
        (lambda: rule_from_dict({"name": "Entropy"}), r"rule: Entropy needs \['threshold'\]"),
        (
            lambda: rule_from_dict({"name": "Entropy", "threshold": 0.1, "speed": 1}),
            r"Entropy has no field \['speed'\]",
        ),
        (lambda: rule_from_dict({"name": "Patience", "patience": 1, "compare": "<"}), r"no field \['compare'\]"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Entropy("abc"), "threshold: expected a number or a sequence .* got 'abc'"),
        (lambda: Entropy(None), "threshold: expected a number or a sequence .* got None"),
        (lambda: Entropy([0.1, "0.2"]), "threshold: expected a number or a sequence"),
        (lambda: Patience("3"), "patience: expected a number or a sequence .* got '3'"),
    ],
)
def test_what_is_no_number_is_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patience(2, tolerance=math.nan), "tolerance: expected a number, got NaN"),
        (lambda: Patience(math.inf), "patience: expected whole numbers >= 0, got inf"),
        (lambda: Patience(math.nan), "patience: expected numbers, got NaN"),
        (lambda: Patience([1, 2, 3]).check(4), r"patience: expected one number or 4 \(one per exit\), got 3"),
    ],
)
def test_what_a_patience_rule_refuses_is_named_as_the_user_did(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "threshold", [torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.2]).numpy(), [torch.tensor(0.1), 0.2]], ids=repr
)
def test_thresholds_of_tensors_and_arrays_are_plain_numbers(threshold):
    rule = Entropy(threshold)
    rule.check(2)
    assert rule.threshold == pytest.approx([0.1, 0.2])
    assert rule_from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert Patience(torch.tensor(3)) == Patience(3)


NUMBER_FIELDS = [
    (lambda value: MaxProb(0.9, temperature=value), "temperature"),
    (lambda value: Energy(0.9, temperature=value), "temperature"),
    (lambda value: Patience(2, value), "tolerance"),
    (lambda value: ConfidentPatience(2, tolerance=value), "tolerance"),
    (lambda value: DistanceEntropy(0.1, lam=value), "lam"),
    (lambda value: UcbMaxProb(beta=value), "beta"),
]


@pytest.mark.parametrize("number", [np.float32, np.int64, torch.tensor], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("make", "field"), NUMBER_FIELDS)
def test_every_field_is_a_plain_number(make, field, number):
    rule = make(number(2))
    assert type(getattr(rule, field)) in (int, float) and getattr(rule, field) == 2
    assert rule_from_dict(json.loads(json.dumps(rule.to_dict()))).spec == rule.spec


@pytest.mark.parametrize("value", ["2", None, [2.0]], ids=repr)
@pytest.mark.parametrize(
    ("make", "field"),
    [
        *NUMBER_FIELDS,
        (lambda value: UcbMaxProb(overhead=[value, 0.1]), "overhead"),
        (lambda value: UcbMaxProb(arms=(0.5, value)), "arms"),
    ],
)
def test_a_field_that_is_no_number_is_named(make, field, value):
    with pytest.raises(TypeError, match=f"^{field}: expected a number, got {re.escape(repr(value))}"):
        make(value)


def test_overheads_and_arms_that_are_no_numbers_are_named():
    with pytest.raises(TypeError, match=r"^overhead: expected a number, got '0.1'"):
        UcbMaxProb(overhead="0.1")
    for arms in (0.5, "0.5", None):
        with pytest.raises(TypeError, match=r"^arms: expected a list or tuple of thresholds, got"):
            UcbMaxProb(arms=arms)


@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
def test_infinite_thresholds_are_numbers(infinite):
    assert Entropy(infinite).threshold_at(0) == infinite
    assert MaxProb([infinite, 0.5]).threshold_at(0) == infinite
