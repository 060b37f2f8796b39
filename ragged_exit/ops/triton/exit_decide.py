"""exit_decide: score, comparison, row state and plan from logits that exist already, in one launch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragged_exit.ops.common import ExitTensors, new_exit_tensors
from ragged_exit.ops.triton.config import FP_FUSION, on_its_device
from ragged_exit.ops.triton.plan import arrived_last, scan_plan, tickets
from ragged_exit.ops.triton.scores import decide_rows, load_tile
from ragged_exit.rules import ScoreSpec

MAX_CLASS_TILE = 1024
SCAN_BLOCK = 1024
# Logits that one program of 4 warps holds at a time: 8 registers of a thread a copy. With 16, ptxas spills predicates.
_TILE_ELEMENTS = 1024


def class_tile(classes: int, most_rows: int) -> dict[str, int]:
    """The tile in which scores are computed: BLOCK_C classes of BLOCK_R rows."""
    block_c = min(max(16, triton.next_power_of_2(classes)), MAX_CLASS_TILE)
    return {"BLOCK_C": block_c, "BLOCK_R": min(most_rows, _TILE_ELEMENTS // block_c)}


def packed(value: Tensor | None) -> Tensor | None:
    """``value`` without strides: the kernels take vectors and weight matrices as they lie in memory."""
    return None if value is None else value.contiguous()


class RuleArguments(NamedTuple):
    """What a kernel judges a row by: f32 ``[1]`` or ``[Bcap]``, the patience state, and the numbers of the rule."""

    threshold: Tensor
    counter: Tensor | None
    previous: Tensor | None
    tolerance: float
    temperature: float
    lam: float
    log_classes: float


def rule_arguments(
    spec: ScoreSpec, threshold: Tensor, counter: Tensor | None, previous: Tensor | None, classes: int, final: bool
) -> dict:
    """The kernel arguments that say which score, comparison and threshold a row gets."""
    return {
        "rule": RuleArguments(
            threshold.contiguous(),
            packed(counter),
            packed(previous),
            spec.tolerance,
            spec.temperature,
            spec.lam,
            math.log(classes),
        ),
        "SCORE": spec.score,
        "COMPARE": spec.compare,
        "DR_ORDER": spec.dr_order,
        "PER_ROW": threshold.numel() > 1,
        "FINAL": final,
        "C": classes,
    }


def as_pointers(outputs: ExitTensors) -> ExitTensors:
    """``outputs`` as a kernel takes them: it has no pointers to bool."""
    return outputs._replace(exits=outputs.exits.view(torch.uint8))


@triton.jit(do_not_specialize=["row_capacity"])
def exit_decide_kernel(
    logits_ptr,  # [row_capacity, C]
    signal_ptr,  # f32 [row_capacity] or [row_capacity, C]
    cu_ptr,
    live_ptr,
    rule,  # RuleArguments
    ticket_ptr,
    out,  # ExitTensors
    row_capacity,
    SCORE: tl.constexpr,
    COMPARE: tl.constexpr,
    DR_ORDER: tl.constexpr,
    PER_ROW: tl.constexpr,
    FINAL: tl.constexpr,
    C: tl.constexpr,
    COPY: tl.constexpr,  # False when the logits are out.logits already
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SCAN_BLOCK: tl.constexpr,
):
    """A program decides BLOCK_R rows; the last one scans the plan."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    within = rows < row_capacity
    alive = rows < tl.load(live_ptr)
    if COPY:
        for start in range(0, C, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)
            z = load_tile(logits_ptr, rows, alive, cols, C, 0.0)  # [BLOCK_R, BLOCK_C]
            tl.store(out.logits + rows[:, None] * C + cols[None, :], z, mask=within[:, None] & (cols < C)[None, :])
    decide_rows(
        logits_ptr,
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
    if arrived_last(ticket_ptr, tl.num_programs(0)):
        scan_plan(cu_ptr, live_ptr, out, row_capacity, SCAN_BLOCK)


@on_its_device
def exit_decide(
    logits: Tensor,  # [Bcap, C]
    signal: Tensor | None,  # [Bcap] uncertainty, [Bcap, C] distances
    cu_seqlens: Tensor,  # [Bcap + 1]
    live: Tensor,  # [2]
    counter: Tensor | None,  # [Bcap]
    previous: Tensor | None,  # [Bcap]
    threshold: Tensor,  # [1] or [Bcap]
    spec: ScoreSpec,
    final: bool,
) -> ExitTensors:
    outputs = new_exit_tensors(cu_seqlens, logits.shape[1], counter is not None)
    launch_decide(logits.contiguous(), signal, cu_seqlens, live, counter, previous, threshold, spec, final, outputs)
    return outputs


def launch_decide(
    logits: Tensor,
    signal: Tensor | None,
    cu_seqlens: Tensor,
    live: Tensor,
    counter: Tensor | None,
    previous: Tensor | None,
    threshold: Tensor,
    spec: ScoreSpec,
    final: bool,
    outputs: ExitTensors,
) -> None:
    """Fill ``outputs`` from contiguous ``logits``, which may be ``outputs.logits`` themselves."""
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f'logits: impl "triton" takes float32, float16 and bfloat16, got {logits.dtype}')
    rows, classes = logits.shape
    tile = class_tile(classes, 16)
    exit_decide_kernel[(triton.cdiv(rows, tile["BLOCK_R"]),)](
        logits_ptr=logits,
        signal_ptr=packed(signal),
        cu_ptr=packed(cu_seqlens),
        live_ptr=packed(live),
        ticket_ptr=tickets(1, logits.device),
        out=as_pointers(outputs),
        row_capacity=rows,
        COPY=logits is not outputs.logits,
        SCAN_BLOCK=SCAN_BLOCK,
        num_warps=4,
        enable_fp_fusion=FP_FUSION,
        **tile,
        **rule_arguments(spec, threshold, counter, previous, classes, final),
    )
