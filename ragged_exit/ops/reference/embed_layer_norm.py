"""Reference embedding: word + position + token type, then LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ragged_exit.ops.reference.layer_norm import add_layer_norm


def embed_layer_norm(
    out: Tensor,  # [T, H]
    input_ids: Tensor,  # [T]
    position_ids: Tensor,  # [T]
    token_type_ids: Tensor | None,  # [T]
    word: Tensor,  # [V, H]
    position: Tensor,  # [S, H]
    token_type: Tensor | None,  # [Y, H]
    weight: Tensor,  # [H]
    bias: Tensor,  # [H]
    eps: float,
    kind: str,
) -> None:
    """The sum is taken in fp32; without ``token_type_ids`` every token has type 0."""
    wide = torch.promote_types(word.dtype, torch.float32)
    total = F.embedding(input_ids, word).to(wide)
    if token_type is not None:
        total += token_type[0] if token_type_ids is None else F.embedding(token_type_ids, token_type)
    total += F.embedding(position_ids, position)
    out.copy_(add_layer_norm(total, None, weight.to(wide), bias.to(wide), eps, kind))
