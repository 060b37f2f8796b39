"""DE3-BERT: entropy and distance to class prototypes, combined (arXiv 2402.05948; no code was published)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ragged_exit.models.base import IGNORED, ExitPoint
from ragged_exit.models.highway import MlpExit, copy_linear, new_dropout, new_linear
from ragged_exit.models.layered import LayeredModel, LayerExit
from ragged_exit.rules import DistanceEntropy, ExitRule


class PrototypeHighway(nn.Module):
    """A classifier (on the shared pooler) and a prototype net (Linear H -> H on the hidden state) with C prototypes.

    The prototypes are a buffer: zero at first, which puts them at distance 1 from everything, then moving averages.
    """

    prototypes: Tensor  # [C, H]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.classifier = new_linear(config, config.num_labels)
        self.proto = new_linear(config, config.hidden_size)
        self.register_buffer("prototypes", torch.zeros(config.num_labels, config.hidden_size))

    @torch.no_grad()
    def move(self, features: Tensor, labels: Tensor, rate: float) -> None:
        """prototype = (1 - rate) prototype + rate centroid of ``features`` ``[B, H]``, for the classes in the batch."""
        moved = self.prototypes.clone()
        for label in labels.unique().tolist():
            moved[label].lerp_(features[labels == label].mean(0).to(moved.dtype), rate)
        self.prototypes = moved  # not in place: the backward pass still needs the old ones


class De3Bert(LayeredModel):
    """Exit where EDR, the harmonic mean of entropy and distance ratio, is small (``DistanceEntropy``). Classification.

    What the paper's secondary sources leave open is our reading: one linear classifier an exit on a shared tanh pooler,
    as in COSEE by the same authors; the layers' losses weigh the same. The last exit has no prototypes: all distances
    are 1 there, so DR = 1/2. dar_weight: of the distance loss. prototype_rate: of the moving average.
    """

    system: ClassVar[str] = "de3bert"
    offers: ClassVar[frozenset[str]] = frozenset({"prototypes"})

    def __init__(
        self,
        config: PretrainedConfig,
        rule: ExitRule | None = None,
        *,
        exit_layers: Sequence[int] | None = None,
        pooling: str = "cls",
        dar_weight: float = 0.1,
        prototype_rate: float = 0.1,
        backbone: nn.Module | None = None,
    ) -> None:
        rule = DistanceEntropy(0.0) if rule is None else rule
        super().__init__(config, rule, exit_layers=exit_layers, pooling=pooling, backbone=backbone)
        self.dar_weight = dar_weight
        self.prototype_rate = prototype_rate
        self.pooler = new_linear(config, config.hidden_size)
        self.dropout = new_dropout(config)
        self.highways = nn.ModuleList(PrototypeHighway(config) for _ in self.exit_layers[:-1])
        self.classifier = new_linear(config, self.config.num_labels)

    def start_from(self, pooler: nn.Linear | None, classifier: nn.Linear | None) -> None:
        if pooler is not None:
            copy_linear(pooler, self.pooler)
        if classifier is not None:
            copy_linear(classifier, self.classifier)

    def options(self) -> dict[str, Any]:
        return super().options() | {"dar_weight": self.dar_weight, "prototype_rate": self.prototype_rate}

    def layer_exits(self) -> list[LayerExit]:
        heads = [
            MlpExit(
                highway.classifier,  # type: ignore[arg-type]
                self.pooler,
                self.dropout,
                self.pooling,
                prototype=highway.proto,  # type: ignore[arg-type]
                prototypes=highway.prototypes,  # type: ignore[arg-type]
            )
            for highway in self.highways
        ]
        # zero prototypes are at distance 1 from every vector, so the classifier may stand for the net
        nowhere = self.classifier.weight.new_zeros(self.config.num_labels, self.config.num_labels)
        last = MlpExit(
            self.classifier, self.pooler, self.dropout, self.pooling, prototype=self.classifier, prototypes=nowhere
        )
        return [
            LayerExit(head, layer, index)
            for index, (head, layer) in enumerate(zip([*heads, last], self.exit_layers, strict=True))
        ]

    def training_loss(self, points: list[ExitPoint], labels: Tensor) -> Tensor:
        """sum(CE + dar_weight DAR), DAR the mean cosine distance to the own class's prototype.

        A step that learns (with gradients) moves the prototypes; rows that only evaluate must teach nothing, nor those
        of class -100.
        """
        loss = super().training_loss(points, labels)
        learns = loss.requires_grad
        counted = labels.long() != IGNORED  # [B]
        labels = labels.long()[counted]
        for point, highway in zip(points, self.highways, strict=False):
            distances, features = point.output.signal, point.output.features
            assert distances is not None and features is not None
            loss = loss + self.dar_weight * distances[counted].gather(1, labels[:, None]).mean()
            if learns:
                highway.move(features[counted], labels, self.prototype_rate)  # type: ignore[operator]
        return loss
