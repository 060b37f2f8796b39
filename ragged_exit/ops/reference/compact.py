"""Reference compaction: gather the survivors' tokens and row state."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(
    tokens: list[Tensor],  # each [Tcap, ...]
    rows: list[Tensor],  # each [Bcap, ...]
    survivors: Tensor,  # [Bcap]
    cu_seqlens: Tensor,  # [Bcap + 1] of the input
    new_cu_seqlens: Tensor,  # [Bcap + 1]
    live: Tensor,  # [2] of the survivors
    token_capacity: int,
    row_capacity: int,
    out: Tensor | None = None,  # for the first of tokens
) -> list[Tensor]:
    count = int(live[0])
    kept = survivors[:count].long()
    starts = cu_seqlens[kept].long()
    lengths = (new_cu_seqlens[1 : count + 1] - new_cu_seqlens[:count]).long()
    offset = torch.repeat_interleave(starts - new_cu_seqlens[:count].long(), lengths)
    source = torch.arange(len(offset), device=offset.device) + offset  # [T'] old place of each token
    gathered = [_gather(value, source, token_capacity) for value in tokens]
    if out is not None:
        gathered[0] = out.copy_(gathered[0])
    return gathered + [_gather(value, kept, row_capacity) for value in rows]


def _gather(value: Tensor, index: Tensor, capacity: int) -> Tensor:
    out = value.new_zeros((capacity, *value.shape[1:]))
    out[: len(index)] = value[index]
    return out
