"""Tiny random models of every system on every backbone, quiet thresholds for them, and the reference row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from tiny import LONGEST, VOCAB, bert_config, padded, randomise, roberta_config
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    PretrainedConfig,
    XLMRobertaConfig,
)

import ragged_exit as rx
from ragged_exit.backbones import ROBERTA_LIKE, UerLayerNorm
from ragged_exit.models.base import ExitPoint, answer
from ragged_exit.models.uer import UerConfig
from ragged_exit.ops import reference
from ragged_exit.testing import quiet_threshold

LAYERS = 4
SIZES = {"vocab_size": VOCAB, "num_labels": 3, "max_position_embeddings": LONGEST}
WIDE = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}


def config_of(kind: str, **changes: Any) -> PretrainedConfig:
    """A tiny config of this architecture; embeddings of another width than the layers where it has that."""
    makers: dict[str, Callable[..., PretrainedConfig]] = {
        "albert": lambda **more: AlbertConfig(**(SIZES | WIDE | {"embedding_size": 24, "num_hidden_groups": 2} | more)),
        "bert": bert_config,
        "distilbert": lambda **more: DistilBertConfig(
            **(SIZES | {"dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 64} | more)
        ),
        "electra": lambda **more: ElectraConfig(**(SIZES | WIDE | {"embedding_size": 24} | more)),
        "roberta": roberta_config,
        "camembert": lambda **more: CamembertConfig(**(_of_roberta() | more)),
        "xlm-roberta": lambda **more: XLMRobertaConfig(**(_of_roberta() | more)),
        "uer": lambda **more: UerConfig(**(SIZES | WIDE | more)),
    }
    return makers[kind](**changes)


def _of_roberta() -> dict[str, Any]:
    kept = ("pad_token_id", "type_vocab_size", *SIZES, *WIDE)
    return {name: getattr(roberta_config(), name) for name in kept}


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0) -> Any:
    """Every parameter random, norms near 1, prototypes too, so that rows and exits differ."""
    generator = torch.Generator().manual_seed(seed)
    randomise(model, seed)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | UerLayerNorm):
            module.weight.copy_(1 + 0.1 * torch.randn(module.weight.shape, generator=generator))
    for name, buffer in model.named_buffers():
        if name.endswith("prototypes"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model.eval()


@dataclass(frozen=True)
class Case:
    """A system with a rule; ``make`` takes (config, rule, exit_layers)."""

    name: str
    make: Callable[[PretrainedConfig, rx.ExitRule, Sequence[int] | None], rx.EarlyExitModel]
    rule: rx.ExitRule
    backbones: tuple[str, ...] = ("bert", "roberta", "albert", "distilbert", "electra")
    labels: int = 3

    def build(self, kind: str, seed: int, exit_layers: Sequence[int] | None = None) -> Any:
        return randomised(self.make(config_of(kind, num_labels=self.labels), self.rule, exit_layers), seed)


def _cascade(config: PretrainedConfig, rule: rx.ExitRule, exit_layers: Sequence[int] | None) -> rx.CascadeBert:
    """A plain small member of another size, an early-exit member, and a large plain one."""
    kind = config.model_type
    small = config_of(kind, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, num_labels=config.num_labels)
    middle = rx.ElasticBert(config, rx.Entropy(0.6), exit_layers=exit_layers)
    return rx.CascadeBert.from_members([rx.FullDepth(small), middle, rx.FullDepth(config)], rule)


def _of(system: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda config, rule, exit_layers: system(config, rule, exit_layers=exit_layers, **options)


CASES = [
    Case("deebert", _of(rx.DeeBert, exit_at_last_highway=True), rx.Entropy(0.0, dialect="hf")),
    Case("deebert_mean", _of(rx.DeeBert, pooling="mean"), rx.Entropy(0.0, dialect="castorini")),
    Case("berxit", _of(rx.Berxit), rx.LearnedUncertainty(0.0)),
    Case("berxit_entropy", _of(rx.Berxit), rx.Entropy(0.0, dialect="hf")),
    Case("berxit_regression", _of(rx.Berxit), rx.LearnedUncertainty(0.0), labels=1),
    Case("de3bert", _of(rx.De3Bert), rx.DistanceEntropy(0.0, lam=0.7)),
    Case("de3bert_distance", _of(rx.De3Bert), rx.DistanceEntropy(0.0, lam=2.0, dr_order="distance")),
    Case("cascade", _cascade, rx.MaxProb(0.0), backbones=("bert", "roberta")),
    Case("pabee", _of(rx.Pabee), rx.Patience(1)),
    Case("pabee_regression", _of(rx.Pabee), rx.Patience(1, tolerance=0.4), labels=1),
    Case("pcee", _of(rx.Pabee), rx.ConfidentPatience(2, tolerance=0.5)),
    Case("cosee", _of(rx.Pabee), rx.Energy(0.0, temperature=1.5)),
    Case("elasticbert", _of(rx.ElasticBert), rx.Entropy(0.0, dialect="hf")),
    Case("elasticbert_patience", _of(rx.ElasticBert), rx.Patience(2), labels=2),
    Case("elasticbert_max_prob", _of(rx.ElasticBert), rx.MaxProb(0.0, compare=">=")),
    Case("fastbert", _of(rx.FastBert), rx.Entropy(0.0, dialect="categorical", compare="<="), backbones=("uer", "bert")),
    Case("fastbert_package", _of(rx.FastBert), rx.Entropy(0.0, dialect="categorical"), backbones=("uer",)),
]


# systems whose exits a threshold chooses one by one
BY_THRESHOLD = [case for case in CASES if case.name != "cascade" and not case.rule.spec.score.endswith("patience")]


class Reference:
    """What the plain model says of every row alone: each exit's output, and with ``rule`` its answer."""

    def __init__(self, model: rx.EarlyExitModel, rows: Sequence[Sequence[int]]) -> None:
        self.rule = model.rule
        self.points: list[list[ExitPoint]] = []
        with torch.no_grad():
            for row in rows:
                ids = torch.tensor([list(row)])
                self.points.append(model.exit_points(ids, torch.ones_like(ids), None))

    def quiet(self, share: float) -> rx.ExitRule:
        """The rule with a threshold in a gap of the rows' scores, about ``share`` of them below it."""
        if self.rule.spec.score.endswith("patience"):
            return self.rule
        scores = [_score(point) for points in self.points for point in points if point.rule is self.rule]
        return replace(self.rule, threshold=quiet_threshold(torch.tensor(scores).double(), share))

    def use(self, rule: rx.ExitRule) -> None:
        """Answer by this rule instead of the model's."""
        old, self.rule = self.rule, rule
        self.points = [
            [replace(point, rule=rule) if point.rule is old else point for point in points] for points in self.points
        ]

    def gather(self, name: str) -> Tensor:
        """A field of the answers, ``[rows, ...]``."""
        return torch.cat([getattr(answer(points), name) for points in self.points])

    def closest_tie(self) -> float:
        """How far the nearest of all rows and exits is from another decision, in what the rule goes by."""
        distances = [abs(tip.value - tip.bar) for row in self.tips() for tips in row for tip in tips.values()]
        return min(distances, default=math.inf)  # a single exit has nothing to compare with

    def tips(self) -> list[list[dict[str, Tip]]]:
        """For every row and exit, what the decision goes by."""
        return [
            [_tips(before, point) for before, point in zip([None, *points[:-1]], points, strict=True)]
            for points in self.points
        ]


class Tip(NamedTuple):
    """A number that a decision goes by, and the bar at which the decision changes."""

    value: float
    bar: float


def _score(point: ExitPoint) -> float:
    """The score f32 of one row by a rule that does not count."""
    logits, signal = point.output.logits, point.output.signal
    bounds, live = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1, 1], dtype=torch.int32)
    none = torch.zeros(1)
    return float(reference.exit_decide(logits, signal, bounds, live, None, None, none, point.rule.spec, False).score)


def _tips(before: ExitPoint | None, point: ExitPoint) -> dict[str, Tip]:
    logits, spec = point.output.logits.double()[0], point.rule.spec
    if spec.score == "confident_patience":
        return {"entropy": Tip(_normalised_entropy(logits), spec.tolerance)}
    if spec.score == "patience" and len(logits) == 1:
        if before is None:
            return {}
        return {"change": Tip(float((logits - before.output.logits.double()[0]).abs()), spec.tolerance)}
    top = logits.sort(descending=True).values
    if spec.score == "patience":
        return {"choice": Tip(float(top[0] - top[1]), 0.0)}
    tips = {"score": Tip(_score(point), point.rule.threshold_at(point.exit_index))}
    if spec.dr_order == "prob" and spec.score == "distance_entropy":  # the score jumps where the top two change
        tips["choice"] = Tip(float(-top[:3].diff().max()), 0.0)
    return tips


def _normalised_entropy(logits: Tensor) -> float:
    probs = logits.softmax(0)
    return float(torch.special.entr(probs).sum() / torch.log(torch.tensor(float(len(logits)))))


def batch_of(rows: Sequence[Sequence[int]], kind: str) -> tuple[Tensor, Tensor]:
    return padded([list(row) for row in rows], fill=1 if kind in ROBERTA_LIKE else 0)
