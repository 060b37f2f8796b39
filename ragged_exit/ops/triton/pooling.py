"""From packed hidden states to pooled vectors: row starts, means, and columns of the tanh pooler."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragged_exit.ops.triton.config import FP_FUSION
from ragged_exit.ops.triton.device import linear_tile, narrow, tanh

_BLOCK_H = 128
_BLOCK_T = 16


@triton.jit
def mean_pool_kernel(
    hidden_ptr,
    hidden_stride,
    cu_ptr,
    out_ptr,  # [row_capacity, H]
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A program averages one row's tokens over BLOCK_H columns; a row without tokens gives zeros."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    begin = tl.load(cu_ptr + row)
    end = tl.load(cu_ptr + row + 1)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(begin, end, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        x = tl.load(
            hidden_ptr + tokens.to(tl.int64)[:, None] * hidden_stride + cols[None, :],
            mask=(tokens < end)[:, None] & (cols < H)[None, :],
            other=0.0,
        )  # [BLOCK_T, BLOCK_H]
        total += tl.sum(x.to(tl.float32), 0)
    mean = total / tl.maximum(end - begin, 1).to(tl.float32)
    tl.store(out_ptr + row * H + cols, narrow(mean, out_ptr.dtype.element_ty), mask=cols < H)


@triton.jit
def pooled_tile(
    x_ptr,
    x_rows,
    alive,
    weight_ptr,  # [P, H] or None: the pooled vector is the hidden state itself
    bias_ptr,
    cols,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns of the pooled vector, fp32 ``[BLOCK_B, BLOCK_N]``, zero past P."""
    if weight_ptr is None:
        x = tl.load(x_ptr + x_rows[:, None] + cols[None, :], mask=alive[:, None] & (cols < P)[None, :], other=0.0)
        return x.to(tl.float32)
    else:
        return tanh(linear_tile(x_ptr, x_rows, alive, weight_ptr, bias_ptr, cols, P, H, BLOCK_B, BLOCK_N, BLOCK_K))


@triton.jit
def row_starts(cu_ptr, rows, alive, stride, IS_POOLED: tl.constexpr):
    """The element at which each row's pooled hidden state starts: its first token, or its row where pooled before."""
    place = rows if IS_POOLED else tl.load(cu_ptr + rows, mask=alive, other=0).to(tl.int64)
    return place * stride


def mean_pool(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Row means ``[Bcap, H]``, rounded to the dtype of ``hidden``."""
    rows, size = cu_seqlens.shape[0] - 1, hidden.shape[1]
    pooled = torch.empty(rows, size, dtype=hidden.dtype, device=hidden.device)
    mean_pool_kernel[(rows, triton.cdiv(size, _BLOCK_H))](
        hidden,
        hidden.stride(0),
        cu_seqlens,
        pooled,
        H=size,
        BLOCK_T=_BLOCK_T,
        BLOCK_H=_BLOCK_H,
        num_warps=4,
        enable_fp_fusion=FP_FUSION,
    )
    return pooled
