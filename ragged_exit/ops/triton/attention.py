"""varlen_attention: bidirectional flash attention over packed tokens, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragged_exit.ops.triton.config import config, on_its_device
from ragged_exit.ops.triton.device import dot, narrow

_LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=["row_capacity", "token_capacity", "query_blocks"])
def varlen_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [token_capacity, N, D]
    cu_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    row_capacity,
    token_capacity,
    query_blocks,  # of the longest row
    scale_log2,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program answers BLOCK_M queries of one row and head; one more row of programs zeroes what no row owns."""
    row = tl.program_id(0) // query_blocks
    first = (tl.program_id(0) % query_blocks) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    has_dim = (dims < D)[None, :]
    if row == row_capacity:
        live_tokens = tl.load(cu_ptr + row_capacity)
        for start in range(live_tokens + first, token_capacity, query_blocks * BLOCK_M):
            tokens = start + tl.arange(0, BLOCK_M)
            out = out_ptr + (tokens.to(tl.int64) * N + head)[:, None] * D + dims[None, :]
            zero = tl.zeros((BLOCK_M, BLOCK_D), out_ptr.dtype.element_ty)
            tl.store(out, zero, mask=(tokens < token_capacity)[:, None] & has_dim)
    else:
        begin = tl.load(cu_ptr + row).to(tl.int64)
        length = (tl.load(cu_ptr + row + 1) - begin).to(tl.int32)
        if first < length:
            at = first + tl.arange(0, BLOCK_M)
            has_query = (at < length)[:, None] & has_dim
            q_rows = q_ptr + (begin + at)[:, None] * q_token_stride + head * q_head_stride
            q = tl.load(q_rows + dims[None, :], mask=has_query, other=0.0)  # [BLOCK_M, BLOCK_D]
            # the lowest finite number: from a block whose scores are all -inf, -inf would make NaN
            highest = tl.full((BLOCK_M,), -3.4028234663852886e38, tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for start in range(0, length, BLOCK_N):
                keys = start + tl.arange(0, BLOCK_N)
                has_key = keys < length
                k_rows = k_ptr + (begin + keys)[None, :] * k_token_stride + head * k_head_stride
                k = tl.load(k_rows + dims[:, None], mask=has_key[None, :] & (dims < D)[:, None], other=0.0)
                s = dot(q, k, tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale_log2  # [BLOCK_M, BLOCK_N]
                s = tl.where(has_key[None, :], s, float("-inf"))
                higher = tl.maximum(highest, tl.max(s, 1))
                p = tl.exp2(s - higher[:, None])
                shrink = tl.exp2(highest - higher)
                total = total * shrink + tl.sum(p, 1)
                v_rows = v_ptr + (begin + keys)[:, None] * v_token_stride + head * v_head_stride
                v = tl.load(v_rows + dims[None, :], mask=has_key[:, None] & has_dim, other=0.0)
                acc = dot(narrow(p, v.dtype), v, acc * shrink[:, None])
                highest = higher
            out = out_ptr + ((begin + at) * N + head)[:, None] * D + dims[None, :]
            tl.store(out, narrow(acc / total[:, None], out_ptr.dtype.element_ty), mask=has_query)


@on_its_device
def varlen_attention(
    q: Tensor,  # [Tcap, N, D]
    k: Tensor,  # [Tcap, N, D]
    v: Tensor,  # [Tcap, N, D]
    cu_seqlens: Tensor,  # [Bcap + 1]
    max_seqlen: int,
    scale: float,
) -> Tensor:
    tokens, heads, size = q.shape
    out = torch.empty((tokens, heads, size), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    tile = config("attention", q.device, q.dtype, size)
    rows = cu_seqlens.shape[0] - 1
    query_blocks = max(1, triton.cdiv(max_seqlen, tile["BLOCK_M"]))
    varlen_attention_kernel[((rows + 1) * query_blocks, heads)](
        q,
        k,
        v,
        out,
        cu_seqlens.contiguous(),
        *(stride for x in (q, k, v) for stride in x.stride()[:2]),
        rows,
        tokens,
        query_blocks,
        scale * _LOG2E,
        N=heads,
        D=size,
        BLOCK_D=max(16, triton.next_power_of_2(size)),
        **tile,
    )
    return out
