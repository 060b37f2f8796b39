"""A Hugging Face encoder taken apart: its embeddings, then one layer at a time, on padded batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def padded_embeddings(backbone: Any, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
    """What the first layer sees ``[B, S, H]``, of int64 ``[B, S]`` ids; DistilBERT has no token types."""
    if backbone.config.model_type == "distilbert":
        return backbone.embeddings(input_ids)
    hidden = backbone.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
    projection = getattr(backbone, "embeddings_project", None)  # ELECTRA's
    if backbone.config.model_type == "albert":
        projection = backbone.encoder.embedding_hidden_mapping_in
    return hidden if projection is None else projection(hidden)


def padded_layers(backbone: Any) -> list[nn.Module]:
    """The layers in order, each called with hidden states ``[B, S, H]`` and a mask; ALBERT repeats its own."""
    if backbone.config.model_type == "distilbert":
        return list(backbone.transformer.layer)
    if backbone.config.model_type != "albert":
        return list(backbone.encoder.layer)
    groups, depth = backbone.encoder.albert_layer_groups, backbone.config.num_hidden_layers
    return [groups[int(index / (depth / len(groups)))] for index in range(depth)]  # rounded as transformers does
