"""exit_step: an exit's logits, score, comparison, row state and compaction plan, in one fused pass."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ragged_exit.batch import RaggedBatch
from ragged_exit.heads import HeadWeights, MlpHead
from ragged_exit.ops.common import ExitTensors, check_means, new_exit_tensors
from ragged_exit.ops.dispatch import implementation, resolve_impl
from ragged_exit.ops.packed_linear import fits_packing, linears_available, pack_linear
from ragged_exit.ops.registration import registered
from ragged_exit.rules import ExitRule, ScoreSpec


class ExitDecision(NamedTuple):
    """What an exit decided. Rows in the order of the input, before compaction.

    logits: f32 ``[Bcap, C]``. score: f32 ``[Bcap]``. exits: bool ``[Bcap]``. survivors: int32 ``[Bcap]``, the old row
    numbers of those that stay, in order, then -1. cu_seqlens: int32 ``[Bcap + 1]`` and live: int32 ``[2]`` of the
    survivors. state: the rule's row state, updated, name -> ``[Bcap]``.
    """

    logits: Tensor
    score: Tensor
    exits: Tensor
    survivors: Tensor
    cu_seqlens: Tensor
    live: Tensor
    state: dict[str, Tensor]


def exit_step(
    batch: RaggedBatch,
    head: MlpHead,
    rule: ExitRule,
    final: bool = False,
    *,
    exit_index: int = 0,
    means: Tensor | None = None,
    impl: str | None = None,
) -> ExitDecision:
    """Ask one exit which rows of ``batch`` leave.

    means: float32 ``[Bcap, H]`` of each row's tokens, where they are known (``packed_layer``): a head on the mean
    reads these instead of all tokens, another one needs none.

    The threshold of a row is ``batch.state["threshold"]`` where present, else ``rule.threshold_at(exit_index)``. A NaN
    score never leaves early; with ``final`` every live row leaves. ``impl``: see ``resolve_impl``.

    Raises ValueError/TypeError naming the argument: no rows, no hidden states, a head of another width, dtype or
    device, a rule that needs what the head does not offer, missing row state.
    """
    check_rows(batch)
    if batch.hidden is None:
        raise ValueError("batch: expected hidden states [Tcap, H], got a batch before its embeddings")
    hidden = batch.hidden
    if head.hidden_size != hidden.shape[1]:
        raise ValueError(f"head: expected hidden size {hidden.shape[1]}, got {head.hidden_size}")
    if head.classifier_weight.dtype != hidden.dtype:
        raise TypeError(f"head: expected the dtype of hidden, {hidden.dtype}, got {head.classifier_weight.dtype}")
    if head.classifier_weight.device != hidden.device:
        raise ValueError(f"head: expected the device of hidden, {hidden.device}, got {head.classifier_weight.device}")
    if rule.needs and rule.needs not in head.offers:
        raise ValueError(f"rule: {type(rule).__name__} needs a head with {rule.needs}, and this one has none")
    check_classes(rule, head.num_labels)
    threshold = row_threshold(batch, rule, exit_index)
    counter, previous = rule_state(batch, rule)
    if means is not None:
        check_means(means, batch.row_capacity, hidden)
    outputs = _exit_step(
        hidden,
        means if head.pooling == "mean" else None,
        batch.cu_seqlens,
        batch.live,
        head.weights[:-1],
        head.pooling,
        counter,
        previous,
        threshold,
        *rule.spec,
        final,
        resolve_impl(impl, hidden.device),
    )
    return decision(outputs, counter is not None)


def packed_for(impl: str | None, head: MlpHead) -> MlpHead:
    """``head`` as ``impl`` reads it fastest: for "native" with its pooler packed, where there are kernels for that.

    In float32 whatever the dtype: so rows are pooled and multiplied.
    """
    weight = head.pooler_weight
    native = weight is not None and resolve_impl(impl, weight.device) == "native"
    if weight is None or not native or not linears_available(torch.float32) or not fits_packing(weight):
        return head
    return dataclasses.replace(head, packed_pooler=pack_linear(weight.float(), None).panels)


@registered()
def _exit_step(
    hidden: Tensor,  # [Tcap, H]
    means: Tensor | None,  # f32 [Bcap, H]
    cu_seqlens: Tensor,  # i32 [Bcap + 1]
    live: Tensor,  # i32 [2]
    head: Sequence[Tensor | None],  # as HeadWeights has them
    pooling: str,
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
        implementation(impl).exit_step(
            hidden,
            means,
            cu_seqlens,
            live,
            HeadWeights._make((*head, pooling)),
            counter,
            previous,
            threshold,
            spec,
            final,
        )
    )


@torch.library.register_fake("ragged_exit::exit_step")
def _(
    hidden: Tensor,
    means: Tensor | None,
    cu_seqlens: Tensor,
    live: Tensor,
    head: Sequence[Tensor | None],
    pooling: str,
    counter: Tensor | None,
    *rest: Any,
) -> ExitTensors:
    classes = HeadWeights._make((*head, pooling)).classifier_weight.shape[0]
    return new_exit_tensors(cu_seqlens, classes, counter is not None, torch.promote_types(hidden.dtype, torch.float32))


def decision(outputs: tuple[Tensor, ...], counts: bool) -> ExitDecision:
    """The named result of a registered exit op."""
    found = ExitTensors(*outputs)
    state = {"counter": found.counter, "previous": found.previous} if counts else {}
    return ExitDecision(*found[:6], state)


def row_threshold(batch: RaggedBatch, rule: ExitRule, exit_index: int) -> Tensor:
    """f32 ``[1]``, or ``[Bcap]`` where the batch carries thresholds of its own."""
    if "threshold" in batch.state:
        return _row_state(batch, "threshold", torch.float32)
    value, device = rule.threshold_at(exit_index), batch.device
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return _filled(value, device)  # it may be fake, and must not be met by a call that is not
    if device.type != "cuda":
        return _constant(value, device, 0)
    with torch.cuda.device(device):
        # a CUDA graph would fill the cached one only when it is replayed, and read it after it has left the cache
        if torch.cuda.is_current_stream_capturing():
            return _filled(value, device)
        return _constant(value, device, torch.cuda.current_stream().cuda_stream)


@functools.lru_cache(maxsize=4096)
def _constant(value: float, device: torch.device, stream: int) -> Tensor:
    """``_filled``, kept for its stream: another one could read it before it is filled."""
    return _filled(value, device)


def _filled(value: float, device: torch.device) -> Tensor:
    if abs(value) > torch.finfo(torch.float32).max:  # no score is beyond, and torch refuses it
        value = math.copysign(math.inf, value)
    return torch.full((1,), value, dtype=torch.float32, device=device)  # filled there: no copy to wait for


def rule_state(batch: RaggedBatch, rule: ExitRule) -> tuple[Tensor | None, Tensor | None]:
    """The counter and previous that a patience rule keeps, (None, None) for the others."""
    if not rule.spec.counts:
        return None, None
    missing = {"counter", "previous"} - set(batch.state)
    if missing:
        raise ValueError(f"batch: {type(rule).__name__} needs row state {sorted(missing)}; see rule.initial_state")
    return _row_state(batch, "counter", torch.int32), _row_state(batch, "previous", torch.float32)


def _row_state(batch: RaggedBatch, name: str, dtype: torch.dtype) -> Tensor:
    """An entry ``[Bcap]`` of the row state; raises ValueError unless the kernels can read it as it is."""
    value, rows = batch.state[name], batch.row_capacity
    if value.shape != (rows,) or value.dtype != dtype or value.device != batch.device:
        raise ValueError(
            f'batch.state["{name}"]: expected {dtype} [{rows}] on {batch.device}, '
            f"got {value.dtype} {list(value.shape)} on {value.device}"
        )
    return value


def check_rows(batch: RaggedBatch) -> None:
    if not batch.row_capacity:
        raise ValueError("batch: expected at least one row, got none")


def check_classes(rule: ExitRule, num_labels: int) -> None:
    if rule.needs == "prototypes" and num_labels < 2:
        raise ValueError(f"rule: {type(rule).__name__} needs at least 2 classes, and the head has {num_labels}")
