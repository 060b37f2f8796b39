"""exit_step: pool, head, score, comparison, row state and plan; one launch up to 1,024 classes, three beyond.

Work is split over tiles of the pooler's outputs, so that a small batch keeps many multiprocessors busy. A tile's
program multiplies its columns with the classifier's at once; the last of a row block's programs adds these partial
logits in tile order and decides the rows, and the last of all row blocks scans the plan. Tiles have a fixed size and
sums a fixed order, so a row's bits do not depend on its neighbours, its place or the order of arrival.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragged_exit.heads import HeadWeights
from ragged_exit.ops.common import ExitTensors, new_exit_tensors
from ragged_exit.ops.triton.config import config, on_its_device
from ragged_exit.ops.triton.device import cosine_distance, dot, linear_tile, narrow
from ragged_exit.ops.triton.exit_decide import (
    MAX_CLASS_TILE,
    SCAN_BLOCK,
    as_pointers,
    class_tile,
    launch_decide,
    packed,
    rule_arguments,
)
from ragged_exit.ops.triton.many_classes import launch_many_classes
from ragged_exit.ops.triton.plan import arrived_last, scan_plan, tickets
from ragged_exit.ops.triton.pooling import mean_pool, pooled_tile, row_starts
from ragged_exit.ops.triton.scores import decide_rows
from ragged_exit.rules import ScoreSpec

BOUNDED_CLASSES, BOUNDED_REGISTERS = 256, 192


@triton.jit(do_not_specialize=["row_capacity"])
def exit_step_kernel(
    x_ptr,  # [Tcap, H] hidden, or [row_capacity, H] where pooled before
    x_stride,
    cu_ptr,
    live_ptr,
    classifier_weight_ptr,  # [C, P]
    classifier_bias_ptr,
    pooler_weight_ptr,  # [P, H]
    pooler_bias_ptr,
    uncertainty_weight_ptr,  # [P]
    uncertainty_bias_ptr,
    prototype_weight_ptr,  # [D, H]
    prototype_bias_ptr,
    prototypes_ptr,  # [C, D]
    rule,  # RuleArguments
    partial_ptr,  # f32 [tiles, row_capacity, SLOTS]
    signal_ptr,  # f32 [row_capacity] or [row_capacity, C]
    ticket_ptr,  # i32 [1 + row blocks]
    out,  # ExitTensors
    row_capacity,
    SCORE: tl.constexpr,
    COMPARE: tl.constexpr,
    DR_ORDER: tl.constexpr,
    PER_ROW: tl.constexpr,
    FINAL: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    IS_POOLED: tl.constexpr,
    TILES_P: tl.constexpr,
    TILES_D: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,  # >= C
    SCAN_BLOCK: tl.constexpr,
):
    """A program takes BLOCK_N columns of the pooler or of the prototype net, for BLOCK_B rows.

    Its slots of ``partial``: pooler tile, C logits and the uncertainty; prototype tile, C dot products, the squared
    norm of the row's projection and C squared norms of the prototypes.
    """
    tile = tl.program_id(0)
    block = tl.program_id(1)
    live_rows = tl.load(live_ptr)
    if block * BLOCK_B < live_rows:
        rows = block.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
        alive = rows < live_rows
        x_rows = row_starts(cu_ptr, rows, alive, x_stride, IS_POOLED)
        slots_ptr = partial_ptr + (tile.to(tl.int64) * row_capacity + rows) * SLOTS  # [BLOCK_B]
        if tile < TILES_P:
            pooler_part(
                x_ptr,
                x_rows,
                alive,
                pooler_weight_ptr,
                pooler_bias_ptr,
                classifier_weight_ptr,
                uncertainty_weight_ptr,
                slots_ptr,
                tile * BLOCK_N + tl.arange(0, BLOCK_N),
                H,
                P,
                C,
                BLOCK_B,
                BLOCK_N,
                BLOCK_K,
                BLOCK_C,
            )
        elif TILES_D > 0:
            prototype_part(
                x_ptr,
                x_rows,
                alive,
                prototype_weight_ptr,
                prototype_bias_ptr,
                prototypes_ptr,
                slots_ptr,
                (tile - TILES_P) * BLOCK_N + tl.arange(0, BLOCK_N),
                H,
                D,
                C,
                BLOCK_B,
                BLOCK_N,
                BLOCK_K,
                BLOCK_C,
            )
    if arrived_last(ticket_ptr + 1 + block, TILES_P + TILES_D):
        live_rows = tl.load(live_ptr)  # again: kept since the start it would spill
        for first in range(0, BLOCK_B, BLOCK_R):
            rows = block.to(tl.int64) * BLOCK_B + first + tl.arange(0, BLOCK_R)
            within = rows < row_capacity
            alive = rows < live_rows
            combine_parts(
                partial_ptr,
                classifier_bias_ptr,
                uncertainty_bias_ptr,
                out.logits,
                signal_ptr,
                rows,
                within,
                alive,
                row_capacity,
                uncertainty_weight_ptr is not None,
                C,
                TILES_P,
                TILES_D,
                SLOTS,
                BLOCK_C,
            )
            tl.debug_barrier()  # the scores read what combine_parts stored
            decide_rows(
                out.logits,
                signal_ptr,
                rule,
                out,
                rows,
                within,
                alive,
                SCORE,
                COMPARE,
                DR_ORDER,
                PER_ROW,
                FINAL,
                C,
                BLOCK_R,
                BLOCK_C,
            )
        if arrived_last(ticket_ptr, tl.num_programs(1)):
            scan_plan(cu_ptr, live_ptr, out, row_capacity, SCAN_BLOCK)


@triton.jit
def pooler_part(
    x_ptr,
    x_rows,
    alive,
    pooler_weight_ptr,
    pooler_bias_ptr,
    classifier_weight_ptr,
    uncertainty_weight_ptr,
    slots_ptr,
    cols,
    H: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What these columns of the pooled vector add to the logits and the uncertainty."""
    pooled = pooled_tile(
        x_ptr, x_rows, alive, pooler_weight_ptr, pooler_bias_ptr, cols, H, P, BLOCK_B, BLOCK_N, BLOCK_K
    )
    if uncertainty_weight_ptr is not None:
        direction = tl.load(uncertainty_weight_ptr + cols, mask=cols < P, other=0.0).to(tl.float32)
        tl.store(slots_ptr + C, tl.sum(pooled * direction[None, :], 1), mask=alive)
    factor = narrow(pooled, classifier_weight_ptr.dtype.element_ty)
    STEP: tl.constexpr = min(BLOCK_C, 64)
    for start in range(0, C, STEP):
        classes = start + tl.arange(0, STEP)
        weight = tl.load(
            classifier_weight_ptr + classes.to(tl.int64)[None, :] * P + cols[:, None],
            mask=(classes < C)[None, :] & (cols < P)[:, None],
            other=0.0,
        )  # [BLOCK_N, STEP]
        part = dot(factor, weight, tl.zeros((BLOCK_B, STEP), tl.float32))
        tl.store(slots_ptr[:, None] + classes[None, :], part, mask=alive[:, None] & (classes < C)[None, :])


@triton.jit
def prototype_part(
    x_ptr,
    x_rows,
    alive,
    weight_ptr,
    bias_ptr,
    prototypes_ptr,
    slots_ptr,
    cols,
    H: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What these columns of the projection add to the dot products and squared norms of the cosine distances."""
    projected = linear_tile(x_ptr, x_rows, alive, weight_ptr, bias_ptr, cols, D, H, BLOCK_B, BLOCK_N, BLOCK_K)
    tl.store(slots_ptr + C, tl.sum(projected * projected, 1), mask=alive)
    STEP: tl.constexpr = min(BLOCK_C, 64)
    for start in range(0, C, STEP):
        classes = start + tl.arange(0, STEP)
        inside = alive[:, None] & (classes < C)[None, :]
        prototype = tl.load(
            prototypes_ptr + classes.to(tl.int64)[None, :] * D + cols[:, None],
            mask=(classes < C)[None, :] & (cols < D)[:, None],
            other=0.0,
        ).to(tl.float32)  # [BLOCK_N, STEP]
        part = dot(projected, prototype, tl.zeros((BLOCK_B, STEP), tl.float32))
        tl.store(slots_ptr[:, None] + classes[None, :], part, mask=inside)
        squares = tl.broadcast_to(tl.sum(prototype * prototype, 0)[None, :], (BLOCK_B, STEP))
        tl.store(slots_ptr[:, None] + C + 1 + classes[None, :], squares, mask=inside)


@triton.jit
def slot_sum(partial_ptr, at, mask, stride, FIRST: tl.constexpr, LAST: tl.constexpr):
    """The slots ``at`` added up over the tiles FIRST to LAST, in this order."""
    total = tl.load(partial_ptr + FIRST * stride + at, mask=mask, other=0.0, cache_modifier=".cg")
    for tile in tl.range(FIRST + 1, LAST, loop_unroll_factor=8):  # unrolled: the loads overlap, the sums keep order
        # .cg: other multiprocessors wrote them, past this one's L1 cache
        total += tl.load(partial_ptr + tile * stride + at, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def combine_parts(
    partial_ptr,
    classifier_bias_ptr,
    uncertainty_bias_ptr,
    logits_ptr,
    signal_ptr,
    rows,
    within,
    alive,
    row_capacity,
    UNCERTAIN: tl.constexpr,
    C: tl.constexpr,
    TILES_P: tl.constexpr,
    TILES_D: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Logits and signal of a tile of rows, from the partial sums of all programs; zero logits where not alive."""
    stride = row_capacity.to(tl.int64) * SLOTS
    cols = tl.arange(0, BLOCK_C)
    inside = (cols < C)[None, :]
    at = rows[:, None] * SLOTS + cols[None, :]  # [rows, BLOCK_C]
    out = rows[:, None] * C + cols[None, :]
    some = alive[:, None] & inside
    logits = slot_sum(partial_ptr, at, some, stride, 0, TILES_P)
    if classifier_bias_ptr is not None:
        logits += tl.load(classifier_bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    tl.store(logits_ptr + out, tl.where(alive[:, None], logits, 0.0), mask=within[:, None] & inside)
    if UNCERTAIN:
        raw = slot_sum(partial_ptr, rows * SLOTS + C, alive, stride, 0, TILES_P)
        if uncertainty_bias_ptr is not None:
            raw += tl.load(uncertainty_bias_ptr).to(tl.float32)
        tl.store(signal_ptr + rows, tl.sigmoid(raw), mask=alive)
    if TILES_D > 0:
        dots = slot_sum(partial_ptr, at, some, stride, TILES_P, TILES_P + TILES_D)
        squares = slot_sum(partial_ptr, rows * SLOTS + C, alive, stride, TILES_P, TILES_P + TILES_D)
        norms = slot_sum(partial_ptr, at + C + 1, some, stride, TILES_P, TILES_P + TILES_D)
        tl.store(signal_ptr + out, cosine_distance(dots, squares[:, None], norms), mask=some)


@on_its_device
def exit_step(
    hidden: Tensor,  # [Tcap, H]
    means: Tensor | None,  # [Bcap, H], where the head is on the mean and they are known
    cu_seqlens: Tensor,  # [Bcap + 1]
    live: Tensor,  # [2]
    head: HeadWeights,
    counter: Tensor | None,  # [Bcap]
    previous: Tensor | None,  # [Bcap]
    threshold: Tensor,  # [1] or [Bcap]
    spec: ScoreSpec,
    final: bool,
) -> ExitTensors:
    head = _what_the_score_needs(head, spec.score)
    classes, width = head.classifier_weight.shape
    depth = 0 if head.prototypes is None else head.prototypes.shape[1]
    cu_seqlens, live = cu_seqlens.contiguous(), live.contiguous()
    rows, device = cu_seqlens.shape[0] - 1, hidden.device
    x = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    if head.pooling == "mean":
        x = mean_pool(x, cu_seqlens) if means is None else means.to(x.dtype)
    tile = config("exit_step", device, hidden.dtype, hidden.shape[1])
    tiles_p, tiles_d = triton.cdiv(width, tile["BLOCK_N"]), triton.cdiv(depth, tile["BLOCK_N"])
    grid = (tiles_p + tiles_d, triton.cdiv(rows, tile["BLOCK_B"]))
    pooler = {
        "x_ptr": x,
        "x_stride": x.stride(0),
        "cu_ptr": cu_seqlens,
        "live_ptr": live,
        "pooler_weight_ptr": packed(head.pooler_weight),
        "pooler_bias_ptr": packed(head.pooler_bias),
        "prototype_weight_ptr": packed(head.prototype_weight),
        "prototype_bias_ptr": packed(head.prototype_bias),
        "H": hidden.shape[1],
        "P": width,
        "D": depth,
        "IS_POOLED": head.pooling == "mean",
        "TILES_P": tiles_p,
        "TILES_D": tiles_d,
        **tile,
    }
    signal = None
    if head.prototypes is not None:
        signal = torch.empty(rows, classes, dtype=torch.float32, device=device)
    elif head.uncertainty_weight is not None:
        signal = torch.empty(rows, dtype=torch.float32, device=device)
    classifier = {
        "classifier_weight_ptr": packed(head.classifier_weight),
        "classifier_bias_ptr": packed(head.classifier_bias),
        "uncertainty_weight_ptr": packed(head.uncertainty_weight),
        "uncertainty_bias_ptr": packed(head.uncertainty_bias),
        "prototypes_ptr": packed(head.prototypes),
        "signal_ptr": signal,
    }
    outputs = new_exit_tensors(cu_seqlens, classes, counter is not None)
    if classes > MAX_CLASS_TILE:
        launch_many_classes(grid, pooler, classifier, outputs.logits)
        launch_decide(outputs.logits, signal, cu_seqlens, live, counter, previous, threshold, spec, final, outputs)
        return outputs
    slots = classes + (0 if signal is None else 1) + (0 if head.prototypes is None else classes)
    exit_step_kernel[grid](
        partial_ptr=torch.empty(grid[0], rows, slots, dtype=torch.float32, device=device),
        ticket_ptr=tickets(1 + grid[1], device),
        out=as_pointers(outputs),
        row_capacity=rows,
        SLOTS=slots,
        SCAN_BLOCK=SCAN_BLOCK,
        **pooler,
        **classifier,
        **class_tile(classes, tile["BLOCK_B"]),
        **rule_arguments(spec, threshold, counter, previous, classes, final),
        # many classes: without a bound of its own ptxas spills predicates to fit one more program on a multiprocessor
        maxnreg=BOUNDED_REGISTERS if classes > BOUNDED_CLASSES else None,
    )
    return outputs


def _what_the_score_needs(head: HeadWeights, score: str) -> HeadWeights:
    """The head without the uncertainty or the prototypes that this score does not ask for."""
    if score != "uncertainty":
        head = head._replace(uncertainty_weight=None, uncertainty_bias=None)
    if score != "distance_entropy":
        head = head._replace(prototype_weight=None, prototype_bias=None, prototypes=None)
    return head
