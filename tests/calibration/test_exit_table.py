"""A replay of the exit table is what the accelerated model does, for every system and rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from system_cases import CASES, Case, batch_of, config_of, randomised
from tiny import random_rows

import ragged_exit as rx
from ragged_exit.calibration.exit_table import ExitTable, exit_table

FIELDS = ("exit_layer", "exit_member", "executed_layers")


def between(table: ExitTable, place: float) -> float:
    """A threshold in the middle of a gap between two scores, so that no row is near it; for patience, any."""
    if table.rule.spec.score.endswith("patience"):
        candidates = sorted(table.candidates())
        return candidates[int(place * len(candidates))]
    own = [row for row, exit in enumerate(table.exits[:-1]) if exit.own]
    scores = table.scores[own].flatten().double().sort().values
    wide = (scores.diff() > 1e-4).nonzero()[:, 0]
    index = int(wide[int(place * len(wide))])
    return float(scores[index : index + 2].mean())


def assert_replayed(model: rx.EarlyExitModel, table: ExitTable, threshold: float, rows: list) -> None:
    replay = table.at(threshold)
    fast = rx.accelerate(model, rule=model.rule.with_threshold(threshold))
    results = list(fast.stream(rows, token_budget=40))
    for name in FIELDS:
        assert getattr(replay, name).tolist() == [getattr(result, name) for result in results], name
    torch.testing.assert_close(replay.logits, torch.stack([result.logits for result in results]), rtol=0, atol=2e-5)
    torch.testing.assert_close(replay.score, torch.tensor([result.score for result in results]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@settings(max_examples=4)
@given(
    seed=st.integers(0, 10_000),
    exit_layers=st.sampled_from((None, [2, 4], [1, 3, 4])),
    place=st.floats(0, 1, exclude_max=True),
)
def test_a_replay_is_what_the_model_does(case: Case, seed: int, exit_layers: list[int] | None, place: float) -> None:
    model = case.build(case.backbones[0], seed, exit_layers)
    rows = random_rows(12, seed, longest=12)
    table = exit_table(rx.accelerate(model), rows, token_budget=30)
    assert_replayed(model, table, between(table, place), rows)


def test_replays_differ_from_threshold_to_threshold() -> None:
    """The property above is not about tables in which everybody leaves at once."""
    for case in CASES:
        rows = random_rows(24, 1, longest=12)
        table = exit_table(rx.accelerate(case.build(case.backbones[0], 1), impl="reference"), rows)
        depths = [float(table.at(threshold).executed_layers.double().mean()) for threshold in table.candidates()]
        assert len(set(depths)) > 1, case.name
        if not case.rule.spec.score.endswith("patience"):
            assert len(table.at(between(table, 0.4)).executed_layers.unique()) > 1, case.name


def test_an_online_rule_is_replayed_at_a_fixed_arm_and_learns_nothing() -> None:
    rule = rx.UcbMaxProb()
    model = randomised(rx.ElasticBert(config_of("bert"), rule))
    rows = random_rows(9)
    table = exit_table(rx.accelerate(model), rows)
    assert sum(rule.pulls) == 0
    assert_replayed(model, table, between(table, 0.5), rows)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_model_of_one_exit_has_one_candidate(labels: int) -> None:
    model = randomised(rx.FullDepth(config_of("bert", num_labels=labels)))
    table = exit_table(rx.accelerate(model), random_rows(3))
    (threshold,) = table.candidates()
    assert table.at(threshold).exit_layer.tolist() == [4] * 3


def test_token_types_reach_the_table() -> None:
    model = randomised(rx.DeeBert(config_of("bert")))
    rows = random_rows(6, longest=8)
    types = [[place % 2 for place in range(len(row))] for row in rows]
    table = exit_table(rx.accelerate(model, impl="reference"), rows, types, token_budget=10)
    ids, mask = batch_of(rows, "bert")
    with torch.no_grad():
        points = model.exit_points(ids, mask, batch_of(types, "bert")[0])
    expected = torch.stack([point.output.logits for point in points])
    torch.testing.assert_close(table.logits, expected, rtol=0, atol=2e-5)
    assert not torch.allclose(exit_table(rx.accelerate(model, impl="reference"), rows).logits, expected, atol=1e-2)
