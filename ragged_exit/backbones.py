"""What the packed encoder needs of a Hugging Face backbone: its weights under neutral names, and its conventions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Affine:
    """weight ``[N, K]`` (or ``[H]`` for a LayerNorm) and bias ``[N]``."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: nn.Module) -> Affine:
        return cls(module.weight, module.bias)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LayerWeights:
    """One post-LayerNorm transformer layer; qkv is query, key and value stacked: ``[3 H, H]``."""

    qkv: Affine
    attention_output: Affine
    attention_norm: Affine
    feed_forward_up: Affine
    feed_forward_down: Affine
    output_norm: Affine


@dataclass(frozen=True)
class BackboneWeights:
    """A whole encoder. ``padding_idx`` is set where positions count from it (RoBERTa), else None."""

    word_embeddings: Tensor  # [V, H]
    position_embeddings: Tensor  # [S, H]
    token_type_embeddings: Tensor | None  # [K, H]
    embedding_norm: Affine
    layers: list[LayerWeights]
    num_heads: int
    activation: str
    norm_eps: float
    padding_idx: int | None

    @property
    def hidden_size(self) -> int:
        return self.layers[0].qkv.weight.shape[1]

    @property
    def max_positions(self) -> int:
        """The longest sequence that the position table holds."""
        offset = 0 if self.padding_idx is None else self.padding_idx + 1
        return self.position_embeddings.shape[0] - offset


def backbone_weights(backbone: nn.Module) -> BackboneWeights:
    """Read a ``BertModel`` or ``RobertaModel`` (transformers), referring to its parameters, not copying them.

    Raises ValueError naming what is not supported: another architecture, a decoder, relative positions.
    """
    config = backbone.config
    kind = getattr(config, "model_type", type(backbone).__name__)
    if kind not in ("bert", "roberta"):
        raise ValueError(f"backbone: expected a BERT or RoBERTa encoder, got model type {kind!r}")
    if getattr(config, "is_decoder", False):
        raise ValueError("backbone: expected an encoder, got is_decoder=True")
    positions = getattr(config, "position_embedding_type", "absolute") or "absolute"
    if positions != "absolute":
        raise ValueError(f"backbone: expected absolute position embeddings, got {positions!r}")
    embeddings = backbone.embeddings
    return BackboneWeights(
        word_embeddings=embeddings.word_embeddings.weight,
        position_embeddings=embeddings.position_embeddings.weight,
        token_type_embeddings=embeddings.token_type_embeddings.weight,
        embedding_norm=Affine.of(embeddings.LayerNorm),
        layers=[_bert_layer(layer) for layer in backbone.encoder.layer],
        num_heads=config.num_attention_heads,
        activation=config.hidden_act,
        norm_eps=config.layer_norm_eps,
        padding_idx=config.pad_token_id if kind == "roberta" else None,
    )


def stack(*parts: nn.Module) -> Affine:
    """Several linears on one input as one: weights and biases concatenated."""
    return Affine(
        torch.cat([part.weight for part in parts]),  # type: ignore[misc]
        torch.cat([part.bias for part in parts]),  # type: ignore[misc]
    )


def _bert_layer(layer: nn.Module) -> LayerWeights:
    attention = layer.attention
    return LayerWeights(
        qkv=stack(attention.self.query, attention.self.key, attention.self.value),
        attention_output=Affine.of(attention.output.dense),
        attention_norm=Affine.of(attention.output.LayerNorm),
        feed_forward_up=Affine.of(layer.intermediate.dense),
        feed_forward_down=Affine.of(layer.output.dense),
        output_norm=Affine.of(layer.output.LayerNorm),
    )
