"""Online rules: thresholds that are chosen while the model serves, from what leaving early has brought so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ragged_exit.arguments import check_number
from ragged_exit.rules import RULES, ExitRule, MaxProb, ScoreSpec


@dataclass(frozen=True)
class UcbMaxProb(ExitRule):
    """Exit when the largest class probability reaches a threshold that a bandit chooses per row (CeeBERT, UCBEE).

    The arms are thresholds. A row gets the arm a with the largest Q(a) + beta sqrt(ln t / N(a)), where t counts all
    rows so far and N(a) those that got a, and every arm is tried once first. Its reward is c_exit - c_first - o: the
    gain in confidence over the first exit less the ``overhead`` of every further exit passed (a number, or one per
    further exit), 0 at the first exit. Q(a) is the mean of the rewards received, 0 before any.

    The rows of a batch are chosen one after the other and learned from, in the same order, when all of them have left:
    feedback is delayed, N counts rows whose reward is still to come (or never comes, where a stream was left), and
    batches of one row are the published algorithm. ``pulls`` (N), ``rewarded`` (how many rewards came back) and
    ``reward_sum`` are the state; copies of the rule share it, and it is saved with the rule. A row whose confidence is
    NaN teaches nothing.
    """

    arms: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    beta: float = field(default=2.0, kw_only=True)
    overhead: float | Sequence[float] = field(default=0.1, kw_only=True)
    compare: str = field(default=">=", kw_only=True)
    pulls: list[int] = field(default_factory=list, kw_only=True)
    rewarded: list[int] = field(default_factory=list, kw_only=True)
    reward_sum: list[float] = field(default_factory=list, kw_only=True)
    min_labels: ClassVar[int] = 2
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.arms, list | tuple):
            raise TypeError(f"arms: expected a list or tuple of thresholds, got {self.arms!r}")
        for arm in self.arms:
            check_number("arms", arm)
        if not self.arms or any(math.isnan(arm) for arm in self.arms):
            raise ValueError(f"arms: expected at least one threshold, none NaN, got {self.arms!r}")
        check_number("beta", self.beta)
        if not self.beta >= 0:
            raise ValueError(f"beta: expected a number >= 0, got {self.beta!r}")
        for name, values in self.state_dict().items():
            if not values:
                values.extend([0] * len(self.arms))
            if len(values) != len(self.arms):
                raise ValueError(f"{name}: expected {len(self.arms)} values (one per arm), got {len(values)}")
        super().__post_init__()
        for name in ("arms", "overhead"):
            if isinstance(given := getattr(self, name), list):  # the caller's, who may change it
                object.__setattr__(self, name, tuple(given))
        for value in self.overhead if isinstance(self.overhead, tuple) else [self.overhead]:
            check_number("overhead", value)

    @property
    def threshold(self) -> float:  # type: ignore[override]
        """The arm with the best mean reward, for whoever does not ask ``start``."""
        return float(self.arms[max(range(len(self.arms)), key=self._mean)])

    def with_threshold(self, threshold: float | Sequence[float]) -> ExitRule:
        """The bandit replaced by a threshold that stays."""
        return MaxProb(threshold, compare=self.compare)

    @property
    def spec(self) -> ScoreSpec:
        return ScoreSpec("max_prob", self.compare)

    def check(self, num_exits: int) -> None:
        if isinstance(self.overhead, Sequence) and len(self.overhead) != num_exits - 1:
            raise ValueError(
                f"overhead: expected one number or {num_exits - 1} (one per exit after the first), "
                f"got {len(self.overhead)}"
            )

    def start(self, sample_ids: Tensor) -> Tensor:
        chosen = [self.arms[self._choose()] for _ in range(len(sample_ids))]
        return torch.tensor(chosen, dtype=torch.float32, device="cpu")

    def learn(self, thresholds: Tensor, scores: Tensor, exit_index: Tensor) -> None:
        arms = torch.tensor(self.arms, dtype=torch.float32, device="cpu")
        chosen = (thresholds.cpu()[:, None] - arms).abs().argmin(1)
        for arm, confidences, last in zip(chosen.tolist(), scores.tolist(), exit_index.tolist(), strict=True):
            reward = 0.0 if last == 0 else confidences[last] - confidences[0] - self._overhead(last)
            if not math.isnan(reward):
                self.rewarded[arm] += 1
                self.reward_sum[arm] += reward

    def state_dict(self) -> dict[str, list]:
        """What it has learned, JSON-ready."""
        return {"pulls": self.pulls, "rewarded": self.rewarded, "reward_sum": self.reward_sum}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Take over what another rule with as many arms has learned."""
        for name, values in self.state_dict().items():
            if len(state[name]) != len(values):
                raise ValueError(f"{name}: expected {len(values)} values (one per arm), got {len(state[name])}")
            values[:] = state[name]

    def _choose(self) -> int:
        """Choose an arm for the next row and count it."""
        if 0 in self.pulls:
            arm = self.pulls.index(0)
        else:
            total = sum(self.pulls)
            bounds = [
                self._mean(arm) + self.beta * math.sqrt(math.log(total) / count) for arm, count in enumerate(self.pulls)
            ]
            arm = bounds.index(max(bounds))
        self.pulls[arm] += 1
        return arm

    def _mean(self, arm: int) -> float:
        return self.reward_sum[arm] / self.rewarded[arm] if self.rewarded[arm] else 0.0

    def _overhead(self, further_exits: int) -> float:
        if isinstance(self.overhead, Sequence):
            return sum(self.overhead[:further_exits])
        return self.overhead * further_exits


RULES[UcbMaxProb.__name__] = UcbMaxProb
