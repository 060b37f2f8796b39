"""The logits and signals of a head with more than 1,024 classes, where one launch cannot hold them: two launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragged_exit.ops.triton.config import config
from ragged_exit.ops.triton.device import cosine_distance, dot, linear_tile, narrow
from ragged_exit.ops.triton.pooling import pooled_tile, row_starts


@triton.jit
def pool_kernel(
    x_ptr,
    x_stride,
    cu_ptr,
    live_ptr,
    pooler_weight_ptr,
    pooler_bias_ptr,
    prototype_weight_ptr,
    prototype_bias_ptr,
    pooled_ptr,  # [row_capacity, P] in the dtype of x
    projected_ptr,  # f32 [row_capacity, D]
    H: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    IS_POOLED: tl.constexpr,
    TILES_P: tl.constexpr,
    TILES_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """First of the three launches for many classes: the pooled vectors and the prototype projections."""
    tile = tl.program_id(0)
    live_rows = tl.load(live_ptr)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    alive = rows < live_rows
    x_rows = row_starts(cu_ptr, rows, alive, x_stride, IS_POOLED)
    if tile < TILES_P:
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        pooled = pooled_tile(
            x_ptr, x_rows, alive, pooler_weight_ptr, pooler_bias_ptr, cols, H, P, BLOCK_B, BLOCK_N, BLOCK_K
        )
        out = pooled_ptr + rows[:, None] * P + cols[None, :]
        tl.store(out, narrow(pooled, pooled_ptr.dtype.element_ty), mask=alive[:, None] & (cols < P)[None, :])
    elif TILES_D > 0:
        depths = (tile - TILES_P) * BLOCK_N + tl.arange(0, BLOCK_N)
        projected = linear_tile(
            x_ptr, x_rows, alive, prototype_weight_ptr, prototype_bias_ptr, depths, D, H, BLOCK_B, BLOCK_N, BLOCK_K
        )
        target = projected_ptr + rows[:, None] * D + depths[None, :]
        tl.store(target, projected, mask=alive[:, None] & (depths < D)[None, :])


@triton.jit(do_not_specialize=["row_capacity"])
def classes_kernel(
    pooled_ptr,  # [row_capacity, P]
    projected_ptr,  # f32 [row_capacity, D]
    live_ptr,
    classifier_weight_ptr,
    classifier_bias_ptr,
    uncertainty_weight_ptr,
    uncertainty_bias_ptr,
    prototypes_ptr,
    logits_ptr,  # f32 [row_capacity, C]
    signal_ptr,
    row_capacity,
    P: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Second launch: BLOCK_N logits and cosine distances of BLOCK_B rows; the first class tile has the uncertainty."""
    classes = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    alive = rows < tl.load(live_ptr)
    inside = (classes < C)[None, :]
    logits = linear_tile(
        pooled_ptr,
        rows * P,
        alive,
        classifier_weight_ptr,
        classifier_bias_ptr,
        classes,
        C,
        P,
        BLOCK_B,
        BLOCK_N,
        BLOCK_K,
    )
    out = rows[:, None] * C + classes[None, :]
    logits = tl.where(alive[:, None], logits, 0.0)
    tl.store(logits_ptr + out, logits, mask=(rows < row_capacity)[:, None] & inside)
    if uncertainty_weight_ptr is not None and tl.program_id(0) == 0:
        raw = tl.zeros((BLOCK_B,), tl.float32)
        for start in range(0, P, BLOCK_K):
            ks = start + tl.arange(0, BLOCK_K)
            x = tl.load(
                pooled_ptr + rows[:, None] * P + ks[None, :], mask=alive[:, None] & (ks < P)[None, :], other=0.0
            )
            weight = tl.load(uncertainty_weight_ptr + ks, mask=ks < P, other=0.0)
            raw += tl.sum(x.to(tl.float32) * weight.to(tl.float32)[None, :], 1)
        if uncertainty_bias_ptr is not None:
            raw += tl.load(uncertainty_bias_ptr).to(tl.float32)
        tl.store(signal_ptr + rows, tl.sigmoid(raw), mask=alive)
    if prototypes_ptr is not None:
        dots = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        squares = tl.zeros((BLOCK_B,), tl.float32)
        norms = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, D, BLOCK_K):
            ks = start + tl.arange(0, BLOCK_K)
            x = tl.load(
                projected_ptr + rows[:, None] * D + ks[None, :], mask=alive[:, None] & (ks < D)[None, :], other=0.0
            )
            prototype = tl.load(
                prototypes_ptr + classes.to(tl.int64)[None, :] * D + ks[:, None],
                mask=inside & (ks < D)[:, None],
                other=0.0,
            ).to(tl.float32)  # [BLOCK_K, BLOCK_N]
            dots = dot(x, prototype, dots)
            squares += tl.sum(x * x, 1)
            norms += tl.sum(prototype * prototype, 0)
        distance = cosine_distance(dots, squares[:, None], norms[None, :])
        tl.store(signal_ptr + out, distance, mask=alive[:, None] & inside)


def launch_many_classes(grid: tuple[int, int], pooler: dict, classifier: dict, logits: Tensor) -> None:
    """Fill ``logits`` f32 ``[Bcap, C]`` and the signal; ``pooler``, ``classifier``: what exit_step's kernel takes."""
    rows, classes = logits.shape
    width, depth = pooler["P"], pooler["D"]
    x, live = pooler["x_ptr"], pooler["live_ptr"]
    pooled = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    projected = torch.empty(rows, depth, dtype=torch.float32, device=x.device) if depth else None
    pool_kernel[grid](pooled_ptr=pooled, projected_ptr=projected, **pooler)
    tile = config("exit_classes", x.device, x.dtype, width)
    classes_kernel[(triton.cdiv(classes, tile["BLOCK_N"]), triton.cdiv(rows, tile["BLOCK_B"]))](
        pooled_ptr=pooled,
        projected_ptr=projected,
        live_ptr=live,
        logits_ptr=logits,
        row_capacity=rows,
        P=width,
        D=depth,
        C=classes,
        **classifier,
        **tile,
    )
