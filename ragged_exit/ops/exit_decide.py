"""exit_decide: the same decision as exit_step where a head of another kind has made the logits already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ragged_exit.batch import RaggedBatch
from ragged_exit.ops.common import ExitTensors, new_exit_tensors
from ragged_exit.ops.dispatch import implementation, resolve_impl
from ragged_exit.ops.exit_step import ExitDecision, check_classes, check_rows, decision, row_threshold, rule_state
from ragged_exit.ops.registration import registered
from ragged_exit.rules import ExitRule, ScoreSpec


def exit_decide(
    batch: RaggedBatch,
    logits: Tensor,
    rule: ExitRule,
    final: bool = False,
    *,
    signal: Tensor | None = None,
    exit_index: int = 0,
    impl: str | None = None,
) -> ExitDecision:
    """Decide from ``logits`` (float ``[Bcap, C]``) which rows of ``batch`` leave; otherwise as ``exit_step``.

    signal: f32, what the rule needs besides: ``[Bcap]`` uncertainty (sigmoid applied), or ``[Bcap, C]`` cosine
    distances to the class prototypes.

    Raises ValueError naming the argument: no rows, logits of another row count or device, a missing or misshapen
    signal.
    """
    check_rows(batch)
    rows = batch.row_capacity
    if logits.ndim != 2 or logits.shape[0] != rows or not logits.is_floating_point():
        raise ValueError(f"logits: expected float [{rows}, C], got {logits.dtype} {list(logits.shape)}")
    if logits.device != batch.device:
        raise ValueError(f"logits: expected the device of batch, {batch.device}, got {logits.device}")
    check_classes(rule, logits.shape[1])
    if rule.needs:
        expected = [rows] if rule.needs == "uncertainty" else [rows, logits.shape[1]]
        if signal is None or list(signal.shape) != expected:
            got = "None" if signal is None else list(signal.shape)
            raise ValueError(f"signal: {type(rule).__name__} needs {rule.needs} of shape {expected}, got {got}")
        if signal.device != batch.device:
            raise ValueError(f"signal: expected the device of batch, {batch.device}, got {signal.device}")
    else:
        signal = None
    threshold = row_threshold(batch, rule, exit_index)
    counter, previous = rule_state(batch, rule)
    outputs = _exit_decide(
        logits,
        signal,
        batch.cu_seqlens,
        batch.live,
        counter,
        previous,
        threshold,
        *rule.spec,
        final,
        resolve_impl(impl, logits.device),
    )
    return decision(outputs, counter is not None)


@registered()
def _exit_decide(
    logits: Tensor,  # [Bcap, C]
    signal: Tensor | None,  # [Bcap] or [Bcap, C]
    cu_seqlens: Tensor,  # i32 [Bcap + 1]
    live: Tensor,  # i32 [2]
    counter: Tensor | None,  # i32 [Bcap]
    previous: Tensor | None,  # f32 [Bcap]
    threshold: Tensor,  # f32 [1] or [Bcap]
    score: str,
    compare: str,
    tolerance: float,
    temperature: float,
    lam: float,
    dr_order: str,
    final: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec = ScoreSpec(score, compare, tolerance, temperature, lam, dr_order)
    return tuple(
        implementation(impl).exit_decide(logits, signal, cu_seqlens, live, counter, previous, threshold, spec, final)
    )


@torch.library.register_fake("ragged_exit::exit_decide")
def _(
    logits: Tensor, signal: Tensor | None, cu_seqlens: Tensor, live: Tensor, counter: Tensor | None, *rest: Any
) -> ExitTensors:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return new_exit_tensors(cu_seqlens, logits.shape[1], counter is not None, wide)
