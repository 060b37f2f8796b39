"""CeeBERT's online thresholds: equal to a sequential replay with the same feedback order, and saved with the rule."""

from __future__ import annotations

import json
import math

import pytest
import torch
from system_cases import Reference, batch_of, config_of, randomised
from tiny import random_rows

import ragged_exit as rx
from ragged_exit.rules import rule_from_dict

ARMS = (0.4, 0.55, 0.7, 0.9)
LAYERS = [1, 2, 4]


class Replay:
    """The published bandit on a table of confidences, one sample after the other; rewards come when ``feed`` says."""

    def __init__(self, arms: tuple[float, ...], beta: float, overheads: list[float]) -> None:
        self.arms, self.beta, self.overheads = arms, beta, overheads
        self.history: list[tuple[int, float | None]] = []  # (arm, reward once it is known)

    def choose(self) -> int:
        pulls = [sum(chosen == arm for chosen, _ in self.history) for arm in range(len(self.arms))]
        untried = [arm for arm, count in enumerate(pulls) if count == 0]
        if untried:
            arm = untried[0]
        else:
            exploration = [self.beta * math.sqrt(math.log(len(self.history)) / count) for count in pulls]
            values = [self.value(arm) + exploration[arm] for arm in range(len(self.arms))]
            arm = max(range(len(values)), key=values.__getitem__)
        self.history.append((arm, None))
        return arm

    def value(self, arm: int) -> float:
        rewards = [reward for chosen, reward in self.history if chosen == arm and reward is not None]
        return sum(rewards) / len(rewards) if rewards else 0.0

    def leave(self, arm: int, confidences: list[float]) -> int:
        early = (index for index, value in enumerate(confidences[:-1]) if value >= self.arms[arm])
        return next(early, len(confidences) - 1)

    def feed(self, place: int, confidences: list[float], left: int) -> None:
        reward = 0.0 if left == 0 else confidences[left] - confidences[0] - sum(self.overheads[:left])
        self.history[place] = (self.history[place][0], reward)


@pytest.mark.parametrize("callee", ["model", "reference"])
@pytest.mark.parametrize("batch_size", [1, 5, 16])
@pytest.mark.parametrize("overhead", [0.05, [0.06, 0.04]])
def test_equal_to_a_sequential_replay(callee: str, batch_size: int, overhead: float | list[float]) -> None:
    rule = rx.UcbMaxProb(ARMS, beta=0.3, overhead=overhead)
    model = randomised(rx.ElasticBert(config_of("bert"), rule, exit_layers=LAYERS), seed=4)
    rows = random_rows(60, seed=4, longest=8)
    table = [
        [float(point.output.logits.softmax(1).max()) for point in points] for points in Reference(model, rows).points
    ]
    assert min(abs(value - arm) for line in table for value in line for arm in ARMS) > 1e-5
    replay = Replay(ARMS, 0.3, overhead if isinstance(overhead, list) else [overhead] * 2)
    fast = model if callee == "model" else rx.accelerate(model, impl=callee)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        arms = [replay.choose() for _ in part]
        left = [replay.leave(arm, table[start + row]) for row, arm in enumerate(arms)]
        with torch.no_grad():
            output = fast(*batch_of(part, "bert"))
        assert output.exit_layer.tolist() == [LAYERS[index] for index in left]
        for row, index in enumerate(left):
            replay.feed(start + row, table[start + row], index)
    assert len(set(replay.history)) > len(ARMS)
    for arm in range(len(ARMS)):
        chosen = [reward for other, reward in replay.history if other == arm]
        assert (rule.pulls[arm], rule.rewarded[arm]) == (len(chosen), len(chosen))
        assert rule.reward_sum[arm] == pytest.approx(sum(chosen), abs=1e-4)  # confidences differ in the last digits
    assert rule.threshold == ARMS[max(range(len(ARMS)), key=replay.value)]


def test_an_accelerated_copy_shares_what_it_learns_and_saving_keeps_it(tmp_path) -> None:
    model = randomised(rx.ElasticBert(config_of("bert"), rx.UcbMaxProb(ARMS), exit_layers=LAYERS), seed=1)
    fast = rx.accelerate(model, impl="reference")
    fast(*batch_of(random_rows(9), "bert"))
    assert sum(model.rule.pulls) == sum(model.rule.rewarded) == 9
    assert rule_from_dict(json.loads(json.dumps(model.rule.to_dict()))).state_dict() == model.rule.state_dict()
    model.save_pretrained(tmp_path)
    loaded = rx.load(tmp_path)
    assert loaded.rule.state_dict() == model.rule.state_dict() and loaded.exit_layers == (1, 2, 4)
    fresh = rx.UcbMaxProb(ARMS)
    fresh.load_state_dict(json.loads(json.dumps(model.rule.state_dict())))
    assert [fresh._choose() for _ in range(5)] == [loaded.rule._choose() for _ in range(5)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_learns_on_the_host_whatever_torchs_default_device_is(device: str) -> None:
    rule = rx.UcbMaxProb(ARMS)
    with torch.device(device):
        thresholds = rule.start(torch.arange(5, device="cpu"))
        assert thresholds.device.type == "cpu"
        scores = torch.full((5, 4), 0.5, device="cpu")
        rule.learn(thresholds, scores, torch.zeros(5, dtype=torch.int64, device="cpu"))
    assert sum(rule.rewarded) == 5


def test_thresholds_of_the_caller_win_and_teach_nothing() -> None:
    model = randomised(rx.ElasticBert(config_of("bert"), rx.UcbMaxProb(ARMS), exit_layers=LAYERS))
    fast = rx.accelerate(model, impl="reference")
    batch = fast.encoder.pack_sequences(random_rows(3))
    batch.state["threshold"] = torch.tensor([0.0, 2.0, 2.0])
    assert fast.executor.run(batch).exit_layer.tolist() == [1, 4, 4]
    assert model.rule.pulls == [0] * 4


def test_a_row_without_a_confidence_teaches_nothing() -> None:
    rule = rx.UcbMaxProb([0.5, 0.9], overhead=0.0)
    thresholds = rule.start(torch.arange(2))
    rule.learn(thresholds, torch.tensor([[math.nan, 0.8], [0.6, 0.8]]), torch.tensor([1, 1]))
    assert rule.pulls == [1, 1] and rule.rewarded == [0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rx.UcbMaxProb([]), "arms"),
        (lambda: rx.UcbMaxProb([0.5, math.nan]), "arms"),
        (lambda: rx.UcbMaxProb(beta=-1.0), "beta"),
        (lambda: rx.UcbMaxProb([0.5], pulls=[1, 2]), "pulls: expected 1 values"),
        (lambda: rx.UcbMaxProb([0.5]).load_state_dict({"pulls": [1, 2]}), "pulls: expected 1 values"),
        (lambda: rx.UcbMaxProb(overhead=[0.1]).check(3), "overhead: expected one number or 2"),
        (lambda: rx.UcbMaxProb().check_labels(1), "at least 2 classes"),
        (lambda: rx.accelerate(rx.Pabee(config_of("bert"), rx.UcbMaxProb()), threshold=0.9), "no such field"),
    ],
)
def test_mistakes_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
