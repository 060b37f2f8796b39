"""ElasticBERT: a head of its own at every exit, entropy or patience (Liu et al., NAACL 2022); CeeBERT builds on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from ragged_exit.models.base import config_from_dict
from ragged_exit.models.highway import Highway, copy_linear, own_activation
from ragged_exit.models.layered import LayeredModel, LayerExit
from ragged_exit.models.published import LAYOUTS, PublishedLayout, read_labels
from ragged_exit.rules import Entropy, ExitRule


class ElasticBert(LayeredModel):
    """A tanh pooler and a classifier at every exit; the last one answers for whoever is left.

    Its activation is the architecture's own (gelu on ELECTRA, relu on DistilBERT), as a fine-tuned classifier's is.

    Rules: ``Entropy(..., dialect="hf")`` and ``Patience`` as released; ``MaxProb`` or ``UcbMaxProb`` for CeeBERT, whose
    exits are ``exit_layers=(1, 2, 3, 4, 5, 6, 12)`` or ``(3, 6, 12)``.
    """

    system: ClassVar[str] = "elasticbert"

    def __init__(
        self,
        config: PretrainedConfig,
        rule: ExitRule | None = None,
        *,
        exit_layers: Sequence[int] | None = None,
        pooling: str = "cls",
        backbone: nn.Module | None = None,
    ) -> None:
        rule = Entropy(0.0) if rule is None else rule
        super().__init__(config, rule, exit_layers=exit_layers, pooling=pooling, backbone=backbone)
        # the last may start as a fine-tuned classifier, whose activation it then needs
        activations = ["tanh"] * (len(self.exit_layers) - 1) + [own_activation(config)]
        self.highways = nn.ModuleList(Highway(config, activation) for activation in activations)

    def start_from(self, pooler: nn.Linear | None, classifier: nn.Linear | None) -> None:
        for head in self.highways:
            if pooler is not None:
                copy_linear(pooler, head.pooler)  # type: ignore[arg-type]
        if classifier is not None:
            copy_linear(classifier, self.highways[-1].classifier)  # type: ignore[arg-type]

    def layer_exits(self) -> list[LayerExit]:
        return [
            LayerExit(head.exit(self.pooling), layer, index)  # type: ignore[operator]
            for index, (head, layer) in enumerate(zip(self.highways, self.exit_layers, strict=True))
        ]


def _build(saved: dict, state: dict[str, Tensor], dialect: str) -> ElasticBert:
    layers = sorted({int(match[1]) + 1 for name in state if (match := re.match(r"poolers\.(\d+)\.", name))})
    for index, layer in enumerate(layers):  # poolers are numbered by layer, classifiers by exit
        for name in [name for name in state if name.startswith(f"poolers.{layer - 1}.")]:
            state[f"highways.{index}.pooler.{name.rsplit('.', 1)[1]}"] = state.pop(name)
    config = config_from_dict(saved)
    read_labels(config, state, "highways.0.classifier.weight")
    return ElasticBert(config, Entropy(-1.0, dialect=dialect), exit_layers=layers)


LAYOUTS.append(
    PublishedLayout(
        system="elasticbert",
        signature=r"^elasticbert\.encoder\.pooler\.\d+\.",
        renames=(
            (r"elasticbert\.encoder\.pooler\.(\d+)\.dense\.(.*)", r"poolers.\1.\2"),
            (r"classifiers\.(\d+)\.(.*)", r"highways.\1.classifier.\2"),
            (r"elasticbert\.(.*)", r"backbone.\1"),
        ),
        build=_build,
    )
)
