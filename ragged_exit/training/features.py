"""Features for fitting heads on a frozen backbone: every layer's pooled hidden state, computed once, packed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ragged_exit.encoder import PackedEncoder
from ragged_exit.examples import Sequences
from ragged_exit.ops.reference.exit import pool_rows
from ragged_exit.scheduler import token_budget_batches


@torch.inference_mode()
def pooled_features(
    encoder: PackedEncoder,
    sequences: Sequences,
    token_type_ids: Sequences | None = None,
    *,
    pooling: str,
    token_budget: int = 4096,
    on_rows: Callable[[int], None] | None = None,
) -> Tensor:
    """Pooled hidden state after each layer: f32 ``[N, L, H]`` in the order of ``sequences``.

    pooling: "cls" or "mean". on_rows is told how many rows each batch finished (a progress bar's hook).
    """
    features = torch.empty(len(sequences), encoder.num_layers, encoder.hidden_size)
    for rows in token_budget_batches([len(sequence) for sequence in sequences], token_budget):
        types = None if token_type_ids is None else [token_type_ids[row] for row in rows]
        batch = encoder.embed(encoder.pack_sequences([sequences[row] for row in rows], types))
        for layer in range(encoder.num_layers):
            encoder.layer(layer, batch)
            assert batch.hidden is not None
            features[rows, layer] = pool_rows(batch.hidden, batch.cu_seqlens, pooling).float().cpu()
        if on_rows is not None:
            on_rows(len(rows))
    return features
