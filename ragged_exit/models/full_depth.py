"""FullDepth: a backbone and one classifier at its end - the truncated BERT-kL baseline, a cascade's plain member."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import PretrainedConfig

from ragged_exit.arguments import whole_number
from ragged_exit.models.base import EarlyExitModel
from ragged_exit.models.highway import Highway, MlpExit, copy_linear, own_activation
from ragged_exit.models.layered import LayeredModel, LayerExit
from ragged_exit.models.pretrained import first_layers, read_backbone, set_labels
from ragged_exit.rules import ExitRule, MaxProb, Patience


class FullDepth(LayeredModel):
    """Everybody leaves at the last layer; the rule only says which score is reported.

    activation: between the head's two linears; by default what the architecture's own classifier has.
    """

    system: ClassVar[str] = "full_depth"

    def __init__(
        self,
        config: PretrainedConfig,
        rule: ExitRule | None = None,
        *,
        pooling: str = "cls",
        activation: str | None = None,
        backbone: nn.Module | None = None,
    ) -> None:
        if rule is None:
            rule = Patience(0) if config.num_labels == 1 else MaxProb(1.0)
        super().__init__(config, rule, exit_layers=[config.num_hidden_layers], pooling=pooling, backbone=backbone)
        self.final = Highway(config, own_activation(config) if activation is None else activation)

    def options(self) -> dict[str, Any]:
        return {"pooling": self.pooling, "activation": self.final.activation}

    def start_from(self, pooler: nn.Linear | None, classifier: nn.Linear | None) -> None:
        if pooler is not None:
            copy_linear(pooler, self.final.pooler)
        if classifier is not None:
            copy_linear(classifier, self.final.classifier)

    def layer_exits(self) -> list[LayerExit]:
        return [LayerExit(self.final.exit(self.pooling), self.exit_layers[-1], 0)]


def truncated(
    source: str | Path | nn.Module, k: int, *, num_labels: int | None = None, pooling: str | None = None
) -> FullDepth:
    """BERT-kL: the first ``k`` layers with one classifier, a copy that no exit slows down.

    source: an early-exit model, whose head at layer ``k`` becomes the classifier; or a Hugging Face encoder as in
    ``from_backbone`` (directory, id or module), whose own head is copied where it has one, to be trained again.

    Raises ValueError when ``k`` is not a layer, or an early-exit model has no pooled MLP exit there; TypeError for
    a ``k`` that is no integer, and for ``num_labels`` or ``pooling`` beside an early-exit model.
    """
    k = whole_number("k", k)
    if isinstance(source, EarlyExitModel):
        if num_labels is not None or pooling is not None:
            raise TypeError("num_labels, pooling: expected None for an early-exit model, which has its own")
        head = _head_at(source, k)
        backbone = first_layers(source.backbone, k)  # type: ignore[arg-type]
        model = FullDepth(backbone.config, pooling=head.pooling, activation=head.activation, backbone=backbone)
        model.start_from(head.pooler, head.classifier)
        return model.to(source.dtype).eval()
    found = read_backbone(source)
    set_labels(found, num_labels)
    backbone = first_layers(found.backbone, k)
    model = FullDepth(backbone.config, pooling=pooling or "cls", backbone=backbone)
    model.start_from(found.pooler, found.classifier)
    return model.float().eval()  # whatever torch's default dtype


def _head_at(model: EarlyExitModel, k: int) -> MlpExit:
    exits: Sequence[LayerExit] = model.layer_exits() if isinstance(model, LayeredModel) else ()
    heads = [head for head, layer, _ in exits if layer == k and isinstance(head, MlpExit)]
    if not heads:
        raise ValueError(f"k: expected a layer of {model.system} with a pooled MLP exit, got {k}")
    return heads[-1]
