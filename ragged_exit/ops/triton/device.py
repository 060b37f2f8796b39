"""Arithmetic that kernels share, written so that the interpreter and the GPU give the same numbers."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter keeps bfloat16 as raw uint16: it multiplies the bit patterns and truncates when it narrows.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a b with fp32 sums and, for fp32 inputs, fp32 products (never tf32)."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 ``x`` rounded to the nearest, ties to even, ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1  # libdevice.tanh does not run in the interpreter


@triton.jit
def linear_tile(
    x_ptr,
    x_rows,  # [BLOCK_B] int64, the element at which each row of x starts
    alive,  # [BLOCK_B] rows that may be read
    weight_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    cols,  # [BLOCK_N] output columns
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x W^T + b for a tile of rows and columns -> fp32; zero for columns past N."""
    acc = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + x_rows[:, None] + ks[None, :], mask=alive[:, None] & (ks < K)[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + cols.to(tl.int64)[None, :] * K + ks[:, None],
            mask=(cols < N)[None, :] & (ks < K)[:, None],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        acc = dot(x, weight, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def cosine_distance(dots, squares, prototype_squares):
    """1 - cos, never negative; 1 where a vector is zero."""
    norms = tl.sqrt(squares) * tl.sqrt(prototype_squares)
    distance = 1 - dots / tl.where(norms == 0, 1.0, norms)
    return tl.where(norms == 0, 1.0, tl.where(distance < 0, 0.0, distance))
