"""Reference layer: the reference ops, one after the other."""

from __future__ import annotations

import math

from torch import Tensor

from ragged_exit.ops.reference.attention import varlen_attention
from ragged_exit.ops.reference.exit import mean_rows
from ragged_exit.ops.reference.layer_norm import add_layer_norm
from ragged_exit.ops.reference.packed_linear import packed_linear


def packed_layer(
    hidden: Tensor,  # [Tcap, H]
    means: Tensor | None,  # [Bcap, H], written
    cu_seqlens: Tensor,  # [Bcap + 1]
    layer: list[Tensor],  # of a PackedLayer, in its order
    num_heads: int,
    eps: float,
    kind: str,
) -> None:
    qkv, output, norm, up, down, last_norm = zip(layer[::2], layer[1::2], strict=True)
    tokens = int(cu_seqlens[-1])
    x = hidden[:tokens]
    head_size = x.shape[1] // num_heads
    q, k, v = packed_linear(x, *qkv, None, "").view(tokens, 3, num_heads, head_size).unbind(1)
    longest = int(cu_seqlens.diff().max())
    context = varlen_attention(q, k, v, cu_seqlens, longest, 1 / math.sqrt(head_size))
    x = add_layer_norm(packed_linear(context.reshape(x.shape), *output, x, ""), None, *norm, eps, kind)
    inner = packed_linear(x, *up, None, "gelu")
    add_layer_norm(packed_linear(inner, *down, x, ""), None, *last_norm, eps, kind, hidden[:tokens])
    if means is not None:
        means.copy_(mean_rows(hidden, cu_seqlens))
