"""varlen_attention: bidirectional attention over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from ragged_exit.ops.common import check_cu_seqlens
from ragged_exit.ops.dispatch import implementation, resolve_impl
from ragged_exit.ops.registration import registered


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    *,
    impl: str | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v within each sequence.

    q, k, v: ``[Tcap, N, D]`` of one floating dtype, the last dimension contiguous (views of a fused QKV are fine).
    cu_seqlens: int32 ``[Bcap + 1]``. max_seqlen: the longest sequence. Returns contiguous ``[Tcap, N, D]``; tokens past
    ``cu_seqlens[-1]`` are zero.

    Raises ValueError/TypeError naming the argument that has another shape, dtype or device.
    """
    if q.ndim != 3:
        raise ValueError(f"q: expected [T, N, D], got {list(q.shape)}")
    for name, value in (("k", k), ("v", v)):
        if value.shape != q.shape or value.device != q.device:
            raise ValueError(
                f"{name}: expected {list(q.shape)} on {q.device} as q, got {list(value.shape)} on {value.device}"
            )
        if value.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {value.dtype}")
    check_cu_seqlens(cu_seqlens, q.device)
    return _varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale, resolve_impl(impl, q.device))


@registered()
def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, impl: str
) -> Tensor:
    return implementation(impl).varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale)


@torch.library.register_fake("ragged_exit::varlen_attention")
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, impl: str) -> Tensor:
    return q.new_empty(q.shape)
