"""Reference compaction: gather the survivors' tokens and row state."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(
    new_tokens: list[Tensor],  # each [new Tcap, ...], written
    new_rows: list[Tensor],  # each [new Bcap, ...], written
    tokens: list[Tensor],  # each [Tcap, ...]
    rows: list[Tensor],  # each [Bcap, ...]
    survivors: Tensor,  # [Bcap]
    cu_seqlens: Tensor,  # [Bcap + 1] of the input
    new_cu_seqlens: Tensor,  # [Bcap + 1]
    live: Tensor,  # [2] of the survivors
) -> None:
    count = int(live[0])
    kept = survivors[:count].long()
    starts = cu_seqlens[kept].long()
    lengths = (new_cu_seqlens[1 : count + 1] - new_cu_seqlens[:count]).long()
    offset = torch.repeat_interleave(starts - new_cu_seqlens[:count].long(), lengths)
    source = torch.arange(len(offset), device=offset.device) + offset  # [T'] old place of each token
    for target, value in zip(new_tokens, tokens, strict=True):
        _gather(target, value, source)
    for target, value in zip(new_rows, rows, strict=True):
        _gather(target, value, kept)


def _gather(target: Tensor, value: Tensor, index: Tensor) -> None:
    target[: len(index)] = value[index]
    target[len(index) :] = 0
