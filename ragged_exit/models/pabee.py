"""PABEE: leave when consecutive layers agree (Zhou et al., NeurIPS 2020); PCEE-BERT and COSEE have the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from ragged_exit.models.base import ExitPoint, config_from_dict
from ragged_exit.models.highway import MlpExit, copy_linear, new_dropout, new_linear
from ragged_exit.models.layered import LayeredModel, LayerExit, weighted_by_layer
from ragged_exit.models.published import LAYOUTS, PublishedLayout, count_prefixes, read_labels
from ragged_exit.rules import Entropy, ExitRule, Patience


class Pabee(LayeredModel):
    """One tanh pooler for all exits and a linear classifier at each; the last one answers for whoever is left.

    The default rule never leaves early, as the original's: ``Patience(0)``. ``ConfidentPatience`` makes it PCEE-BERT;
    ``Entropy(..., dialect="normalised")``, ``MaxProb`` or ``Energy`` make it COSEE.
    """

    system: ClassVar[str] = "pabee"

    def __init__(
        self,
        config: PretrainedConfig,
        rule: ExitRule | None = None,
        *,
        exit_layers: Sequence[int] | None = None,
        pooling: str = "cls",
        backbone: nn.Module | None = None,
    ) -> None:
        rule = Patience(0) if rule is None else rule
        super().__init__(config, rule, exit_layers=exit_layers, pooling=pooling, backbone=backbone)
        self.pooler = new_linear(config, config.hidden_size)
        self.dropout = new_dropout(config)
        self.classifiers = nn.ModuleList(new_linear(config, self.config.num_labels) for _ in self.exit_layers)

    def start_from(self, pooler: nn.Linear | None, classifier: nn.Linear | None) -> None:
        if pooler is not None:
            copy_linear(pooler, self.pooler)
        if classifier is not None:
            copy_linear(classifier, self.classifiers[-1])  # type: ignore[arg-type]

    def layer_exits(self) -> list[LayerExit]:
        return [
            LayerExit(MlpExit(classifier, self.pooler, self.dropout, self.pooling), layer, index)  # type: ignore[arg-type]
            for index, (classifier, layer) in enumerate(zip(self.classifiers, self.exit_layers, strict=True))
        ]

    def training_loss(self, points: list[ExitPoint], labels: Tensor) -> Tensor:
        """sum(l loss_l) / sum(l): deeper exits count more."""
        losses = [self.task_loss(point.output.logits, labels) for point in points]
        return weighted_by_layer(losses, self.exit_layers)


def _build_pabee(saved: dict, state: dict[str, Tensor], dialect: str) -> Pabee:
    config = config_from_dict(saved)
    read_labels(config, state, "classifiers.0.weight")
    return Pabee(config)


def _build_cosee(saved: dict, state: dict[str, Tensor], dialect: str) -> Pabee:
    last = count_prefixes(state, r"classifiers\.(\d+)\.")
    for name in [name for name in state if name.startswith("final.")]:
        state[f"classifiers.{last}.{name.removeprefix('final.')}"] = state.pop(name)
    config = config_from_dict(saved)
    read_labels(config, state, "classifiers.0.weight")
    return Pabee(config, Entropy(0.0, dialect="normalised"))


_PABEE = PublishedLayout(
    system="pabee",
    signature=r"^classifiers\.\d+\.weight$",
    without=r"encoder\.pooler\.\d|pred_layer\.|Policy_network\.",
    renames=(
        (r"(?:bert|albert)\.pooler\.(?:dense\.)?(weight|bias)", r"pooler.\1"),
        (r"(?:bert|albert)\.(.*)", r"backbone.\1"),
    ),
    build=_build_pabee,
)
_COSEE = dataclasses.replace(
    _PABEE,
    system="cosee",
    signature=r"^bert\.encoder\.highway\.\d+\.classifier\.",
    without=r"encoder\.highway\.\d+\.pooler\.",
    renames=(
        (r"bert\.encoder\.highway\.(\d+)\.classifier\.(.*)", r"classifiers.\1.\2"),
        (r"classifier\.(.*)", r"final.\1"),
        *_PABEE.renames,
    ),
    build=_build_cosee,
)
LAYOUTS.extend((_PABEE, _COSEE))
