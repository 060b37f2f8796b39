"""The head that most systems attach to a layer: pool, tanh pooler, classifier - as modules and as views of modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from ragged_exit.backbones import weight_of
from ragged_exit.batch import RaggedBatch, token_bucket
from ragged_exit.encoder import PackedEncoder
from ragged_exit.heads import HeadOutput, MlpHead
from ragged_exit.linears import PackedLinear
from ragged_exit.ops.reference.exit import pool_rows

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu}


def own_activation(config: PretrainedConfig) -> str:
    """What a fine-tuned Hugging Face classifier of this architecture has between its two linears."""
    return {"electra": "gelu", "distilbert": "relu"}.get(config.model_type, "tanh")


def new_dropout(config: PretrainedConfig) -> nn.Dropout:
    """The dropout in front of a classifier."""
    for name in ("classifier_dropout", "seq_classif_dropout", "classifier_dropout_prob", "hidden_dropout_prob"):
        if getattr(config, name, None) is not None:
            return nn.Dropout(getattr(config, name))
    return nn.Dropout(0.0)


def new_linear(config: Any, outputs: int) -> nn.Linear:
    """A fresh linear on the hidden states."""
    linear = nn.Linear(config.hidden_size, outputs)
    nn.init.normal_(linear.weight, std=getattr(config, "initializer_range", 0.02))
    nn.init.zeros_(linear.bias)
    return linear


class Highway(nn.Module):
    """A head of its own weights: pooler (Linear H -> H), activation, dropout, classifier (Linear H -> C)."""

    def __init__(self, config: Any, activation: str = "tanh") -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(_ACTIVATIONS)}, got {activation!r}")
        self.activation = activation
        self.pooler = new_linear(config, config.hidden_size)
        self.dropout = new_dropout(config)
        self.classifier = new_linear(config, config.num_labels)

    def forward(self, hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
        """hidden ``[B, S, H]``, mask ``[B, S]`` -> logits ``[B, C]``."""
        return self.exit(pooling)(hidden, attention_mask).logits

    def exit(self, pooling: str, **extras: Any) -> MlpExit:
        """This head as an exit, with what a system adds (``uncertainty``, ``prototype``, ``prototypes``)."""
        return MlpExit(self.classifier, self.pooler, self.dropout, pooling, self.activation, **extras)


@dataclass(frozen=True)
class MlpExit:
    """A [CLS] or mean-pooled MLP exit, as a view of modules that exits may share.

    classifier: Linear P -> C. pooler: Linear H -> P, then ``activation``. uncertainty: Linear P -> 1 on the pooled
    vector, or with ``raw_uncertainty`` on what the pooler sees; its sigmoid is the signal (BERxiT). prototype: Linear
    H -> D on the pooled hidden state; the cosine distances of its output to ``prototypes`` ``[C, D]`` are the signal
    (DE3-BERT). The output's features are that vector, else the pooled one.
    """

    classifier: nn.Linear
    pooler: nn.Linear
    dropout: nn.Module
    pooling: str = "cls"
    activation: str = "tanh"
    uncertainty: nn.Linear | None = None
    raw_uncertainty: bool = False
    prototype: nn.Linear | None = None
    prototypes: Tensor | None = None

    def __call__(self, hidden: Tensor, attention_mask: Tensor) -> HeadOutput:
        """hidden ``[B, S, H]``, mask ``[B, S]`` -> logits ``[B, C]``, signal ``[B]`` or ``[B, C]``, features."""
        seen = pool(hidden, attention_mask, self.pooling)  # [B, H]
        features = self.dropout(_ACTIVATIONS[self.activation](self.pooler(seen)))  # [B, P]
        logits = self.classifier(features)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if self.uncertainty is not None:
            dots = self.uncertainty(seen if self.raw_uncertainty else features)[:, 0]
            return HeadOutput(logits, torch.sigmoid(dots.to(wide)), features)
        if self.prototype is not None and self.prototypes is not None:
            features = self.prototype(seen)  # [B, D]
            return HeadOutput(logits, cosine_distances(features.to(wide), self.prototypes.to(wide)), features)
        return HeadOutput(logits, features=features)

    def packed(self, encoder: PackedEncoder) -> MlpHead | PackedMlp:
        """The same exit for the executor, in the encoder's dtype and on its device; one that the fused step does not
        know is a snapshot, the others are the live weights where these are so already.
        """
        if self.activation != "tanh" or self.raw_uncertainty:
            return PackedMlp(self, encoder.impl, encoder.dtype, encoder.device)

        def there(value: Tensor | None) -> Any:
            return None if value is None else value.to(encoder.device, encoder.dtype)

        uncertainty, prototype = self.uncertainty, self.prototype
        return MlpHead(
            classifier_weight=there(weight_of(self.classifier)),
            classifier_bias=there(self.classifier.bias),
            pooler_weight=there(weight_of(self.pooler)),
            pooler_bias=there(self.pooler.bias),
            uncertainty_weight=None if uncertainty is None else there(weight_of(uncertainty)[0]),
            uncertainty_bias=None if uncertainty is None else there(uncertainty.bias),
            prototype_weight=None if prototype is None else there(weight_of(prototype)),
            prototype_bias=None if prototype is None else there(prototype.bias),
            prototypes=there(self.prototypes),
            pooling=self.pooling,
        )


class PackedMlp:
    """A snapshot of an ``MlpExit`` outside the fused step, which knows tanh alone (ELECTRA and DistilBERT have others).

    Its linears are the encoder's kind, so that a row's bits depend on that row alone here too.
    """

    def __init__(self, head: MlpExit, impl: str | None, dtype: torch.dtype, device: torch.device) -> None:
        def packed(linear: nn.Linear) -> PackedLinear:
            return PackedLinear(weight_of(linear).to(device, dtype), linear.bias.to(device, dtype), impl=impl)

        self.pooling, self.activation, self.raw_uncertainty = head.pooling, head.activation, head.raw_uncertainty
        self.pooler, self.classifier = packed(head.pooler), packed(head.classifier)
        self.uncertainty = None if head.uncertainty is None else packed(head.uncertainty)

    def __call__(self, batch: RaggedBatch) -> HeadOutput:
        assert batch.hidden is not None
        rows = pool_rows(batch.hidden, batch.cu_seqlens, self.pooling)  # [Bcap, H]
        seen = rows.new_zeros(token_bucket(len(rows)), rows.shape[1])  # few sizes, as for tokens
        seen[: len(rows)] = rows
        pooled = self.pooler(seen, self.activation)
        logits, signal = self.classifier(pooled)[: len(rows)], None
        if self.uncertainty is not None:
            dots = self.uncertainty(seen if self.raw_uncertainty else pooled)[:, 0].contiguous()
            wide = torch.promote_types(dots.dtype, torch.float32)
            signal = torch.sigmoid(dots.to(wide))[: len(rows)]  # of all: the last of an odd number get other bits
        return HeadOutput(logits, signal)


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """[CLS] (the first token that the mask keeps) or the mean of the kept tokens: ``[B, S, H]`` -> ``[B, H]``."""
    if pooling == "cls":
        first = attention_mask.int().argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), first]
    wide = torch.promote_types(hidden.dtype, torch.float32)  # bf16 cannot count beyond 256
    weights = attention_mask.to(wide)[:, :, None]
    return ((hidden * weights).sum(1) / weights.sum(1)).to(hidden.dtype)


def cosine_distances(vectors: Tensor, prototypes: Tensor) -> Tensor:
    """1 - cos of ``[B, D]`` and ``[C, D]`` -> ``[B, C]``, >= 0, 1 for a zero vector; differentiable there too."""
    return (1 - F.cosine_similarity(vectors[:, None], prototypes[None], dim=2)).clamp_min(0)


def copy_linear(source: nn.Linear, target: nn.Linear) -> None:
    """Copy weights and bias of ``source`` into ``target``.

    Raises ValueError where their shapes differ, and for what ``weight_of`` refuses.
    """
    weight = weight_of(source)
    if weight.shape != target.weight.shape:  # copy_ would broadcast one row over all classes
        raise ValueError(
            f"source: expected a linear of {list(target.weight.shape)} in its head, got {list(weight.shape)}"
        )
    with torch.no_grad():
        target.weight.copy_(weight)
        target.bias.copy_(source.bias)
