"""LayeredModel: one backbone with exit heads after some of its layers, which is what most systems are."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ragged_exit.backbones import check_backbone
from ragged_exit.encoder import PackedEncoder
from ragged_exit.executor import Stage
from ragged_exit.heads import POOLINGS, HeadOutput, MlpHead, TokenHead
from ragged_exit.models.base import EarlyExitModel, EncoderFactory, ExitPoint, new_backbone
from ragged_exit.models.pretrained import read_backbone, set_labels
from ragged_exit.rules import ExitRule


class ExitHead(Protocol):
    """One exit, twice: on padded hidden states for the reference, and packed for the executor."""

    def __call__(self, hidden: Tensor, attention_mask: Tensor) -> HeadOutput:
        """hidden ``[B, S, H]``, mask 0/1 ``[B, S]``."""
        ...

    def packed(self, encoder: PackedEncoder) -> MlpHead | TokenHead: ...


class LayerExit(NamedTuple):
    """A head, the layer (1 ... L) after which it is asked, and the place of its threshold."""

    head: ExitHead
    layer: int
    exit_index: int


class LayeredModel(EarlyExitModel):
    """A backbone and exits at ``exit_layers`` (ascending, the last is L; by default every layer).

    The rule takes one threshold per exit layer. pooling: what MLP heads see, "cls" as published or the "mean" of the
    tokens. A system implements ``layer_exits``; the last of them answers for whoever is left.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        rule: ExitRule,
        *,
        exit_layers: Sequence[int] | None = None,
        pooling: str = "cls",
        backbone: nn.Module | None = None,
    ) -> None:
        """Raises ValueError for an option that cannot work, and a backbone that the packed encoder does not know;
        TypeError for exit layers that are no whole numbers.
        """
        super().__init__(config, rule)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {POOLINGS}, got {pooling!r}")
        self.pooling = pooling
        self.exit_layers = _check_exit_layers(exit_layers, config.num_hidden_layers)
        self.backbone = new_backbone(config) if backbone is None else backbone
        check_backbone(self.backbone)  # before anything is trained that could not be accelerated
        self.check_rule(rule)

    def layer_exits(self) -> list[LayerExit]:
        """The exits, shallow to deep."""
        raise NotImplementedError

    def start_from(self, pooler: nn.Linear | None, classifier: nn.Linear | None) -> None:
        """Copy what a checkpoint's own head offers into fresh heads."""

    @classmethod
    def from_backbone(
        cls,
        source: str | Path | nn.Module,
        *,
        num_labels: int | None = None,
        rule: ExitRule | None = None,
        **options: Any,
    ) -> Self:
        """Fresh heads on a Hugging Face encoder: a directory, an id, or a loaded ``...Model``, which is copied.

        A fine-tuned ``...ForSequenceClassification`` gives its classifier to the last exit, and its pooler to every
        exit's. Where all exits share one tanh pooler (PABEE, DE3-BERT) the last exit answers as the fine-tuned model
        only if that has tanh there too: not on ELECTRA (gelu) and DistilBERT (relu). options: the system's own.
        """
        found = read_backbone(source)
        set_labels(found, num_labels)
        model = cls(found.backbone.config, backbone=found.backbone, **options, rule=rule)  # type: ignore[arg-type]
        model.start_from(found.pooler, found.classifier)
        return model.to(next(found.backbone.parameters()).device).float().eval()  # whatever torch's default dtype

    @property
    def num_exits(self) -> int:
        return len(self.exit_layers)

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"pooling": self.pooling}
        if len(self.exit_layers) < self.config.num_hidden_layers:
            options["exit_layers"] = list(self.exit_layers)
        return options

    def exit_points(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> list[ExitPoint]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None and hasattr(self.config, "type_vocab_size"):  # DistilBERT has none
            inputs["token_type_ids"] = token_type_ids
        output = self.backbone(**inputs, output_hidden_states=True, return_dict=True)  # whatever the config says
        hidden = output.hidden_states  # L + 1 of [B, S, H]
        return [
            ExitPoint(head(hidden[layer], attention_mask), self.rule, index, layer, layer)
            for head, layer, index in self.layer_exits()
        ]

    def stages(self, encoder: EncoderFactory) -> list[Stage]:
        packed = encoder(self.backbone)
        done = 0
        stages = []
        for head, layer, index in self.layer_exits():
            stages.append(
                Stage(
                    encoder=packed,
                    layers=range(done, layer),
                    head=head.packed(packed),
                    rule=self.rule,
                    exit_index=index,
                    exit_layer=layer,
                    executed_layers=layer,
                    restart=done == 0,
                )
            )
            done = layer
        return stages


def weighted_by_layer(losses: list[Tensor], layers: Sequence[int]) -> Tensor:
    """sum(l loss_l) / sum(l) over the exits' layers l (PABEE)."""
    weights = torch.tensor(layers, dtype=losses[0].dtype, device=losses[0].device)
    return (torch.stack(losses) * weights).sum() / weights.sum()


def _check_exit_layers(exit_layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    try:  # NumPy's and torch's integers become Python's, which config.json can hold
        layers = tuple(range(1, depth + 1)) if exit_layers is None else tuple(map(operator.index, exit_layers))
    except TypeError as error:
        raise TypeError(f"exit_layers: expected a sequence of whole numbers, got {exit_layers!r}") from error
    if not layers or layers[-1] != depth or layers[0] < 1 or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"exit_layers: expected ascending layers from 1 to {depth} that end with {depth}, where everybody leaves, "
            f"got {list(layers)}"
        )
    return layers
