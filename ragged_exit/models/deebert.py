"""DeeBERT: an entropy exit with a head of its own after every layer (Xin et al., ACL 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from ragged_exit.models.base import config_from_dict
from ragged_exit.models.highway import Highway, copy_linear, own_activation
from ragged_exit.models.layered import LayeredModel, LayerExit
from ragged_exit.models.published import BACKBONES, LAYOUTS, PublishedLayout, read_labels
from ragged_exit.rules import Entropy, ExitRule


class HighwayModel(LayeredModel):
    """A highway (tanh pooler and classifier) at every exit layer, and a final classifier: DeeBERT and BERxiT."""

    def __init__(
        self,
        config: PretrainedConfig,
        rule: ExitRule,
        *,
        exit_layers: Sequence[int] | None = None,
        pooling: str = "cls",
        activation: str = "tanh",
        backbone: nn.Module | None = None,
    ) -> None:
        """activation: of the highways; the final head has the architecture's own."""
        super().__init__(config, rule, exit_layers=exit_layers, pooling=pooling, backbone=backbone)
        self.highways = nn.ModuleList(Highway(config, activation) for _ in self.exit_layers)
        self.final = Highway(config, own_activation(config))

    def start_from(self, pooler: nn.Linear | None, classifier: nn.Linear | None) -> None:
        for head in (*self.highways, self.final):
            if pooler is not None:
                copy_linear(pooler, head.pooler)
        if classifier is not None:
            copy_linear(classifier, self.final.classifier)


class DeeBert(HighwayModel):
    """Entropy exits at highways, and the final classifier.

    exit_at_last_highway: also test the last layer's highway, which the original never trains, before the final
    classifier answers (the original's behaviour).
    """

    system: ClassVar[str] = "deebert"

    def __init__(
        self,
        config: PretrainedConfig,
        rule: ExitRule | None = None,
        *,
        exit_layers: Sequence[int] | None = None,
        pooling: str = "cls",
        exit_at_last_highway: bool = False,
        backbone: nn.Module | None = None,
    ) -> None:
        rule = Entropy(0.0) if rule is None else rule
        super().__init__(config, rule, exit_layers=exit_layers, pooling=pooling, backbone=backbone)
        self.exit_at_last_highway = exit_at_last_highway

    def options(self) -> dict[str, Any]:
        return super().options() | {"exit_at_last_highway": self.exit_at_last_highway}

    def exits(self) -> list[tuple[Highway, int]]:
        """(head, layers run before it is asked), shallow to deep; the final head is last."""
        tested = self.num_exits if self.exit_at_last_highway else self.num_exits - 1
        heads: list[tuple[Any, int]] = list(zip(self.highways, self.exit_layers, strict=True))
        return [*heads[:tested], (self.final, self.exit_layers[-1])]

    def layer_exits(self) -> list[LayerExit]:
        return [
            LayerExit(head.exit(self.pooling), layer, self.exit_layers.index(layer)) for head, layer in self.exits()
        ]


def _build(saved: dict, state: dict[str, Tensor], dialect: str) -> DeeBert:
    config = config_from_dict(saved)
    read_labels(config, state, "final.classifier.weight")
    return DeeBert(config, Entropy(-1.0, dialect=dialect), exit_at_last_highway=True)  # -1: the original's "never exit"


HIGHWAY_RENAMES = (
    (rf"{BACKBONES}\.encoder\.highway\.(\d+)\.pooler\.dense\.(.*)", r"highways.\1.pooler.\2"),
    (rf"{BACKBONES}\.encoder\.highway\.(\d+)\.classifier\.(.*)", r"highways.\1.classifier.\2"),
    (rf"{BACKBONES}\.pooler\.dense\.(.*)", r"final.pooler.\1"),
    (r"classifier\.(.*)", r"final.classifier.\1"),
    (rf"{BACKBONES}\.(.*)", r"backbone.\1"),
)
LAYOUTS.append(
    PublishedLayout(
        system="deebert",
        signature=rf"^{BACKBONES}\.encoder\.highway\.\d+\.pooler\.",
        without=r"lte_classifier\.",
        renames=HIGHWAY_RENAMES,
        build=_build,
    )
)
