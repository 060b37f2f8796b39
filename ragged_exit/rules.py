"""Exit rules: which score a row gets at an exit, and which comparison against which threshold lets it leave."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ragged_exit.arguments import check_number

COMPARISONS = ("<", "<=", ">", ">=")
ENTROPY_DIALECTS = ("exact", "hf", "castorini", "categorical", "normalised")
SCORES = (
    *(f"entropy_{dialect}" for dialect in ENTROPY_DIALECTS),
    "max_prob",
    "energy",
    "uncertainty",
    "patience",
    "confident_patience",
    "distance_entropy",
)
DR_ORDERS = ("prob", "distance")


class ScoreSpec(NamedTuple):
    """What a kernel must know of a rule besides the threshold: plain values, no tensors.

    ``tolerance`` is the patience rules' inner threshold: the largest change between two regression values that still
    counts as agreement (exclusive), or the entropy below which ``confident_patience`` counts a layer as confident.
    """

    score: str
    compare: str
    tolerance: float = 0.0
    temperature: float = 1.0
    lam: float = 1.0
    dr_order: str = "prob"

    @property
    def counts(self) -> bool:
        """Whether the score is a count from exit to exit, kept in the rows' ``counter`` and ``previous``."""
        return self.score in ("patience", "confident_patience")


def _plain(value: Any) -> Any:
    """A tensor's or an array's numbers as Python's, which config.json can hold; what is plain stays the same object."""
    if isinstance(value, list | tuple):
        plain = type(value)(map(_plain, value))
        return value if all(map(operator.is_, plain, value)) else plain
    return value.tolist() if hasattr(value, "tolist") else value


def _numbers(name: str, value: object) -> list[float]:
    items = list(value) if isinstance(value, list | tuple) else [value]
    try:
        numbers = [float(item) for item in items if not isinstance(item, str)]  # type: ignore[arg-type]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != len(items):
        raise TypeError(f"{name}: expected a number or a sequence of one number per exit, got {value!r}")
    return numbers


class ExitRule:
    """Base of all rules: immutable dataclasses with a ``threshold`` and a ``compare``.

    ``threshold`` is one number for every exit, or a sequence with one number an exit. Thresholds per row are given by
    ``start``, which sees the rows' ids before the first layer and may return f32 ``[rows]``; ``learn`` and ``finish``
    see what became of the rows when all have left. The hooks exist for online rules and do nothing here.
    """

    threshold: float | Sequence[float]
    compare: str
    needs: ClassVar[str] = ""  # what the head must offer besides logits: "", "uncertainty" or "prototypes"
    min_labels: ClassVar[int] = 1  # 2 where the score of a single output says nothing
    learns: ClassVar[bool] = False  # whether to call ``learn``
    threshold_name: ClassVar[str] = "threshold"  # as the user set it

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, item.name, _plain(getattr(self, item.name)))
        if self.compare not in COMPARISONS:
            raise ValueError(f"compare: expected one of {COMPARISONS}, got {self.compare!r}")
        if isinstance(self.threshold, list):  # the caller's, who may change it
            object.__setattr__(self, self.threshold_name, tuple(self.threshold))
        numbers = _numbers(self.threshold_name, self.threshold)
        if not numbers:
            raise ValueError(f"{self.threshold_name}: expected a number or one number per exit, got an empty sequence")
        if any(math.isnan(value) for value in numbers):
            raise ValueError(f"{self.threshold_name}: expected numbers, got NaN in {self.threshold!r}")

    @property
    def spec(self) -> ScoreSpec:
        """The rule as the kernels know it."""
        raise NotImplementedError

    def check(self, num_exits: int) -> None:
        """Raise ``ValueError`` when a per-exit threshold does not have ``num_exits`` entries."""
        if isinstance(self.threshold, Sequence) and len(self.threshold) != num_exits:
            raise ValueError(
                f"{self.threshold_name}: expected one number or {num_exits} (one per exit), got {len(self.threshold)}"
            )

    def check_labels(self, num_labels: int) -> None:
        """Raise ``ValueError`` when the rule can decide nothing from ``num_labels`` outputs."""
        if num_labels < self.min_labels:
            raise ValueError(
                f"rule: {type(self).__name__} needs at least {self.min_labels} classes, the model has {num_labels}; "
                "a regression takes Patience, or LearnedUncertainty where the model offers it"
            )

    def threshold_at(self, exit_index: int) -> float:
        """The threshold of the ``exit_index``-th exit (0-based)."""
        return float(self.threshold[exit_index] if isinstance(self.threshold, Sequence) else self.threshold)

    def with_threshold(self, threshold: float | Sequence[float]) -> ExitRule:
        """This rule with another threshold; patience rules: with another patience."""
        return replace(self, threshold=threshold)  # type: ignore[type-var]

    def initial_state(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        """Row state that the rule starts with: name -> ``[rows, ...]``."""
        return {}

    def start(self, sample_ids: Tensor) -> Tensor | None:
        """Called once a batch before the first layer; may give thresholds f32 ``[rows]``, to every batch or to none."""
        return None

    def learn(self, thresholds: Tensor, scores: Tensor, exit_index: Tensor) -> None:
        """Called, where ``learns`` is set, once a batch when every row has left, with the rows in the caller's order.

        thresholds: f32 ``[rows]``, what ``start`` returned for them. scores: f32 ``[rows, exits]``, NaN where a row was
        not asked. exit_index: int64 ``[rows]``, the last exit (0-based) that a row was asked at.
        """

    def finish(self, sample_ids: Tensor, scores: Tensor, exit_layer: Tensor) -> None:
        """Called once a batch when every row has left, with the score at the exit that answered."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form that ``rule_from_dict`` reads back."""
        return {"name": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Entropy(ExitRule):
    """Exit when the entropy of softmax(logits) is below the threshold (DeeBERT, ElasticBERT, FastBERT, ...).

    Dialects (z logits, p softmax(z), nats): ``exact`` max-subtracted and never negative; ``hf`` and ``castorini`` the
    published formulas to the letter, with their failures; ``categorical`` renormalised, clamped to [eps, 1 - eps],
    divided by ln C; ``normalised`` divided by ln C with 0 ln 0 = 0.
    """

    threshold: float | Sequence[float]
    compare: str = field(default="<", kw_only=True)
    dialect: str = field(default="exact", kw_only=True)
    min_labels: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dialect not in ENTROPY_DIALECTS:
            raise ValueError(f"dialect: expected one of {ENTROPY_DIALECTS}, got {self.dialect!r}")

    @property
    def spec(self) -> ScoreSpec:
        return ScoreSpec(f"entropy_{self.dialect}", self.compare)


@dataclass(frozen=True)
class MaxProb(ExitRule):
    """Exit when the largest class probability is above the threshold (CascadeBERT ``>``, CeeBERT ``>=``)."""

    threshold: float | Sequence[float]
    compare: str = field(default=">", kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    min_labels: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_temperature(self.temperature)

    @property
    def spec(self) -> ScoreSpec:
        return ScoreSpec("max_prob", self.compare, temperature=self.temperature)


@dataclass(frozen=True)
class Energy(ExitRule):
    """Exit when 1 / (1 + (sum exp(z / T))^T) is below the threshold (COSEE's energy signal)."""

    threshold: float | Sequence[float]
    compare: str = field(default="<", kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    min_labels: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_temperature(self.temperature)

    @property
    def spec(self) -> ScoreSpec:
        return ScoreSpec("energy", self.compare, temperature=self.temperature)


@dataclass(frozen=True)
class LearnedUncertainty(ExitRule):
    """Exit when BERxiT's uncertainty u = sigmoid(w . pooled + b) is below the threshold (certainty is 1 - u)."""

    threshold: float | Sequence[float]
    compare: str = field(default="<", kw_only=True)
    needs: ClassVar[str] = "uncertainty"

    @property
    def spec(self) -> ScoreSpec:
        return ScoreSpec("uncertainty", self.compare)


@dataclass(frozen=True)
class _Counting(ExitRule):
    """What the patience rules share: the threshold is the patience, the state a counter and the last prediction."""

    patience: int | Sequence[int]
    tolerance: float = 0.0
    compare: ClassVar[str] = ">="  # type: ignore[misc]  # the counter grows by one, so >= is the papers' ==
    score: ClassVar[str]
    threshold_name: ClassVar[str] = "patience"

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(value < 0 or not value.is_integer() for value in _numbers("patience", self.patience)):
            raise ValueError(f"patience: expected whole numbers >= 0, got {self.patience!r}")
        check_number("tolerance", self.tolerance)
        if math.isnan(self.tolerance):
            raise ValueError("tolerance: expected a number, got NaN")

    @property
    def threshold(self) -> float | Sequence[float]:  # type: ignore[override]
        return self.patience

    @property
    def spec(self) -> ScoreSpec:
        return ScoreSpec(self.score, self.compare, tolerance=self.tolerance)

    def with_threshold(self, threshold: float | Sequence[float]) -> ExitRule:
        return replace(self, patience=threshold)  # type: ignore[arg-type]

    def threshold_at(self, exit_index: int) -> float:
        patience = super().threshold_at(exit_index)
        return patience if patience > 0 else math.inf  # patience 0 switches early exit off

    def initial_state(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "counter": torch.zeros(rows, dtype=torch.int32, device=device),
            # argmax as a number (exact in fp32 up to 2^24 classes) or the regression value; NaN agrees with nothing
            "previous": torch.full((rows,), math.nan, dtype=torch.float32, device=device),
        }


@dataclass(frozen=True)
class Patience(_Counting):
    """Exit when ``patience`` consecutive exits agreed with the one before (PABEE); 0 never exits early.

    Agreement is an equal argmax, or for one output |previous - current| < ``tolerance``.
    """

    score: ClassVar[str] = "patience"


@dataclass(frozen=True)
class ConfidentPatience(_Counting):
    """Exit when ``patience`` exits in a row had ``categorical`` entropy < ``tolerance`` (PCEE-BERT); 0 never exits."""

    score: ClassVar[str] = "confident_patience"
    min_labels: ClassVar[int] = 2


@dataclass(frozen=True)
class DistanceEntropy(ExitRule):
    """Exit when EDR = (lam + 1) DR E / (lam E + DR) is below the threshold (DE3-BERT, arXiv 2402.05948).

    E is the ``normalised`` entropy, DR = (1 + (r1 - r2) / max(r1, r2)) / 2 the ratio of the cosine distances to the
    prototypes of the two classes that are likeliest (``dr_order="prob"``) or nearest (``"distance"``).
    """

    threshold: float | Sequence[float]
    lam: float = field(default=1.0, kw_only=True)
    dr_order: str = field(default="prob", kw_only=True)
    compare: str = field(default="<", kw_only=True)
    needs: ClassVar[str] = "prototypes"
    min_labels: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lam", self.lam)
        if not self.lam >= 0 or math.isinf(self.lam):
            raise ValueError(f"lam: expected a finite number >= 0, got {self.lam!r}")
        if self.dr_order not in DR_ORDERS:
            raise ValueError(f"dr_order: expected one of {DR_ORDERS}, got {self.dr_order!r}")

    @property
    def spec(self) -> ScoreSpec:
        return ScoreSpec("distance_entropy", self.compare, lam=float(self.lam), dr_order=self.dr_order)


def _check_temperature(temperature: float) -> None:
    check_number("temperature", temperature)
    if not temperature > 0 or math.isinf(temperature):
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")


RULES: dict[str, type[ExitRule]] = {
    rule.__name__: rule
    for rule in (Entropy, MaxProb, Energy, LearnedUncertainty, Patience, ConfidentPatience, DistanceEntropy)
}


def rule_from_dict(saved: dict[str, Any]) -> ExitRule:
    """The rule that ``to_dict`` described. Raises ``ValueError`` for an unknown name or field."""
    arguments = dict(saved)
    name = arguments.pop("name", None)
    if name not in RULES:
        raise ValueError(f"rule: expected one of {sorted(RULES)}, got {name!r}")
    known = {item.name for item in fields(RULES[name])}  # type: ignore[arg-type]
    if unknown := set(arguments) - known:
        raise ValueError(f"rule: {name} has no field {sorted(unknown)}")
    needed = {item.name for item in fields(RULES[name]) if item.default is MISSING}  # type: ignore[arg-type]
    if missing := needed - set(arguments):
        raise ValueError(f"rule: {name} needs {sorted(missing)}")
    return RULES[name](**arguments)
