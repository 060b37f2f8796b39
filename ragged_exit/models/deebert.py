"""DeeBERT: an entropy exit with a head of its own after every layer (Xin et al., ACL 2020)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PretrainedConfig

from ragged_exit.executor import Stage
from ragged_exit.heads import POOLINGS, HeadOutput
from ragged_exit.models.base import EarlyExitModel, EncoderFactory, ExitPoint, new_backbone
from ragged_exit.models.highway import Highway, copy_linear
from ragged_exit.rules import Entropy, ExitRule


class DeeBert(EarlyExitModel):
    """A backbone, a highway (tanh pooler and classifier) per layer, and the final classifier.

    pooling: what a head sees, "cls" as published or the "mean" of the tokens. exit_at_last_highway: also test the last
    layer's highway, which the original never trains, before the final classifier answers (the original's behaviour).
    """

    system: ClassVar[str] = "deebert"

    def __init__(
        self,
        config: PretrainedConfig,
        rule: ExitRule | None = None,
        *,
        pooling: str = "cls",
        exit_at_last_highway: bool = False,
        backbone: nn.Module | None = None,
    ) -> None:
        super().__init__(config, Entropy(0.0) if rule is None else rule)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {POOLINGS}, got {pooling!r}")
        self.pooling = pooling
        self.exit_at_last_highway = exit_at_last_highway
        self.backbone = new_backbone(config) if backbone is None else backbone
        self.highways = nn.ModuleList(Highway(config) for _ in range(config.num_hidden_layers))
        self.final = Highway(config)
        self.rule.check(self.num_exits)

    @classmethod
    def from_backbone(
        cls,
        source: str | Path | nn.Module,
        *,
        num_labels: int | None = None,
        rule: ExitRule | None = None,
        pooling: str = "cls",
    ) -> DeeBert:
        """Fresh highways on a Hugging Face encoder: a directory, an id, or a loaded ``...Model``.

        A fine-tuned ``...ForSequenceClassification`` keeps its pooler and classifier as the final head; a plain
        encoder gets fresh ones. Highway poolers start as copies of the encoder's own pooler where it has one.
        """
        backbone, pooler, classifier = _read_backbone(source)
        config = backbone.config
        if num_labels is not None:
            if classifier is not None and classifier.out_features != num_labels:
                raise ValueError(
                    f"num_labels: the checkpoint's classifier has {classifier.out_features} classes, got {num_labels}"
                )
            config.num_labels = num_labels
        model = cls(config, rule, pooling=pooling, backbone=backbone)
        for head in (*model.highways, model.final):
            if pooler is not None:
                copy_linear(pooler, head.pooler)
        if classifier is not None:
            copy_linear(classifier, model.final.classifier)
        return model.eval()

    @property
    def num_exits(self) -> int:
        return len(self.highways)

    def options(self) -> dict[str, Any]:
        return {"pooling": self.pooling, "exit_at_last_highway": self.exit_at_last_highway}

    def _exits(self) -> list[tuple[Highway, int]]:
        """(head, layers run before it is asked), shallow to deep; the final head is last."""
        depth = len(self.highways)
        tested = depth if self.exit_at_last_highway else depth - 1
        return [(self.highways[index], index + 1) for index in range(tested)] + [(self.final, depth)]

    def exit_points(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> list[ExitPoint]:
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            output_hidden_states=True,
        ).hidden_states  # L + 1 of [B, S, H]
        return [
            ExitPoint(HeadOutput(head(hidden[depth], attention_mask, self.pooling)), self.rule, depth - 1, depth, depth)
            for head, depth in self._exits()
        ]

    def stages(self, encoder: EncoderFactory) -> list[Stage]:
        packed = encoder(self.backbone)
        done = 0
        stages = []
        for head, depth in self._exits():
            stages.append(
                Stage(
                    encoder=packed,
                    layers=range(done, depth),
                    head=head.as_mlp_head(self.pooling),
                    rule=self.rule,
                    exit_index=depth - 1,
                    exit_layer=depth,
                    executed_layers=depth,
                    restart=done == 0,
                )
            )
            done = depth
        return stages


def _read_backbone(source: str | Path | nn.Module) -> tuple[nn.Module, nn.Linear | None, nn.Linear | None]:
    """(encoder without pooler, its pooler, its classifier) of a Hugging Face model."""
    if isinstance(source, nn.Module):
        whole = source
    else:
        architectures = AutoConfig.from_pretrained(source).architectures or [""]
        fine_tuned = architectures[0].endswith("ForSequenceClassification")
        factory = AutoModelForSequenceClassification if fine_tuned else AutoModel
        whole = factory.from_pretrained(source)
    backbone = getattr(whole, "base_model", whole)
    classifier = getattr(whole, "classifier", None)
    pooler = getattr(getattr(backbone, "pooler", None), "dense", None)
    if classifier is not None and not isinstance(classifier, nn.Linear):  # RoBERTa: dense, tanh, out_proj on <s>
        pooler, classifier = classifier.dense, classifier.out_proj
    if hasattr(backbone, "pooler"):
        backbone.pooler = None
    return backbone, pooler, classifier
