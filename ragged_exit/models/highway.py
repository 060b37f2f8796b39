"""Highway: the small head that most systems attach to a layer, as a trainable module on padded hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ragged_exit.heads import MlpHead


class Highway(nn.Module):
    """Pool, tanh pooler (Linear H -> H), dropout, classifier (Linear H -> C)."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        for linear in (self.pooler, self.classifier):
            nn.init.normal_(linear.weight, std=getattr(config, "initializer_range", 0.02))
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
        """hidden ``[B, S, H]``, mask ``[B, S]`` -> logits ``[B, C]``."""
        return self.classifier(self.dropout(torch.tanh(self.pooler(pool(hidden, attention_mask, pooling)))))

    def as_mlp_head(self, pooling: str) -> MlpHead:
        """The same head for the ops, referring to the live weights."""
        return MlpHead(
            classifier_weight=self.classifier.weight,
            classifier_bias=self.classifier.bias,
            pooler_weight=self.pooler.weight,
            pooler_bias=self.pooler.bias,
            pooling=pooling,
        )


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """[CLS] (the first token that the mask keeps) or the mean of the kept tokens: ``[B, S, H]`` -> ``[B, H]``."""
    if pooling == "cls":
        first = attention_mask.argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), first]
    weights = attention_mask.to(hidden.dtype)[:, :, None]
    return (hidden * weights).sum(1) / weights.sum(1)


def copy_linear(source: nn.Linear, target: nn.Linear) -> None:
    """Copy weights and bias of ``source`` into ``target``."""
    with torch.no_grad():
        target.weight.copy_(source.weight)
        target.bias.copy_(source.bias)
