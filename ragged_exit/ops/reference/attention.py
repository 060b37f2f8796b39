"""Reference packed attention: one dense softmax attention per sequence."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def varlen_attention(
    q: Tensor,  # [Tcap, N, D]
    k: Tensor,  # [Tcap, N, D]
    v: Tensor,  # [Tcap, N, D]
    cu_seqlens: Tensor,  # [Bcap + 1]
    max_seqlen: int,
    scale: float,
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # tokens past live stay zero
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        if start == end:
            continue
        queries, keys, values = (x[start:end].transpose(0, 1).to(wide) for x in (q, k, v))  # [N, S, D]
        weights = torch.softmax(queries @ keys.transpose(1, 2) * scale, dim=-1)  # [N, S, S]
        out[start:end] = (weights @ values).transpose(0, 1).to(q.dtype)
    return out
