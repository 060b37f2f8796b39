"""UerModel: the BERT encoder of UER-py, FastBERT's backbone, as ordinary padded PyTorch under its own names."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from ragged_exit.backbones import UerLayerNorm


class UerConfig(PretrainedConfig):
    """Sizes under Hugging Face's names. The segment table has a row more than ``type_vocab_size``, for padding."""

    model_type = "uer"

    def __init__(
        self,
        vocab_size: int = 21128,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        hidden_dropout_prob: float = 0.1,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.hidden_dropout_prob = hidden_dropout_prob
        self.initializer_range = initializer_range


class UerAttention(nn.Module):
    """Multi-head self-attention with an output projection; no residual, no norm."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear_layers = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(3))  # query, key, value
        self.final_linear = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """x ``[B, S, H]``, mask 0/1 ``[B, S]`` -> ``[B, S, H]``."""
        query, key, value = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear in self.linear_layers
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])  # [B, N, S, S]
        scores = scores + (1.0 - attention_mask.to(x.dtype))[:, None, None] * -10000.0
        context = self.dropout(scores.softmax(-1)) @ value  # [B, N, S, D]
        return self.final_linear(context.transpose(1, 2).flatten(2))


class _Embedding(nn.Module):
    def __init__(self, config: UerConfig) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segment_embedding = nn.Embedding(config.type_vocab_size + 1, config.hidden_size)
        self.layer_norm = UerLayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, segments: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        summed = self.word_embedding(input_ids) + self.position_embedding(positions) + self.segment_embedding(segments)
        return self.dropout(self.layer_norm(summed))


class _FeedForward(nn.Module):
    def __init__(self, config: UerConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class _Layer(nn.Module):
    def __init__(self, config: UerConfig) -> None:
        super().__init__()
        self.self_attn = UerAttention(config.hidden_size, config.num_attention_heads, config.hidden_dropout_prob)
        self.layer_norm_1 = UerLayerNorm(config.hidden_size)
        self.feed_forward = _FeedForward(config)
        self.layer_norm_2 = UerLayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.layer_norm_1(self.dropout(self.self_attn(x, attention_mask)) + x)
        return self.layer_norm_2(self.dropout(self.feed_forward(x)) + x)


class _Encoder(nn.Module):
    def __init__(self, config: UerConfig) -> None:
        super().__init__()
        self.transformer = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class UerModel(nn.Module):
    """Post-norm BERT with UER's LayerNorm everywhere, called like a Hugging Face encoder.

    UER's own segments (0 padding, 1 first, 2 second sentence) are ``token_type_ids + 1`` where the mask is 1, else 0.
    """

    def __init__(self, config: UerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = _Embedding(config)
        self.encoder = _Encoder(config)
        for name, parameter in self.named_parameters():
            if "layer_norm" not in name:
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> BaseModelOutput:
        """``[B, S]`` in; hidden_states: the embeddings and every layer's output, ``[B, S, H]``.

        return_dict: as Hugging Face's encoders take it; never a tuple here.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        token_type_ids = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        hidden = [self.embedding(input_ids, (token_type_ids + 1) * (attention_mask == 1))]
        for layer in self.encoder.transformer:
            hidden.append(layer(hidden[-1], attention_mask))
        return BaseModelOutput(
            last_hidden_state=hidden[-1], hidden_states=tuple(hidden) if output_hidden_states else None
        )
