"""compact: the survivors' hidden states and row state, gathered by one plan."""

from __future__ import annotations

import torch
from torch import Tensor

from ragged_exit.batch import TOKEN_FIELDS, RaggedBatch
from ragged_exit.ops.dispatch import implementation, resolve_impl
from ragged_exit.ops.exit_step import ExitDecision
from ragged_exit.ops.registration import registered


def compact(
    batch: RaggedBatch,
    decision: ExitDecision,
    token_capacity: int | None = None,
    *,
    out: Tensor | None = None,
    impl: str | None = None,
) -> RaggedBatch:
    """The batch of the survivors of ``decision``; tokens past the live ones are zero.

    token_capacity: rows of the new ``hidden`` (default: the survivors' tokens). Where ``batch.live_on_host`` the row
    capacity shrinks to the survivors; on a GPU it stays, so that no count has to reach the host, and ``token_capacity``
    is believed. out: where the new ``hidden`` goes, contiguous ``[token_capacity, H]`` outside of the old one.

    Raises ValueError when ``token_capacity`` is smaller than the survivors' tokens, there are no survivors, the
    decision is another batch's, or an entry of the state has another row count or device than the batch; or ``out``
    another shape, dtype or device than the new ``hidden``.
    """
    seqlens = batch.seqlens
    row_capacity = decision.survivors.numel()  # fewer than the batch's where only some of the survivors are asked for
    if decision.exits.shape != (batch.row_capacity,):
        raise ValueError(f"decision: expected one of {batch.row_capacity} rows, got {list(decision.exits.shape)}")
    plan = {"survivors": (row_capacity,), "cu_seqlens": (row_capacity + 1,), "live": (2,)}
    for name, shape in plan.items():
        value: Tensor = getattr(decision, name)
        if value.dtype != torch.int32 or value.shape != shape or value.device != batch.device:
            raise ValueError(
                f"decision: expected {name} int32 {list(shape)} on {batch.device}, "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )
    state = {**batch.state, **decision.state}
    for name, value in state.items():
        if value.shape[:1] != (batch.row_capacity,) or value.device != batch.device:
            raise ValueError(
                f'batch.state["{name}"]: expected [{batch.row_capacity}, ...] on {batch.device}, '
                f"got {list(value.shape)} on {value.device}"
            )
    cu_seqlens = decision.cu_seqlens
    if batch.live_on_host:
        live_rows, tokens = decision.live.tolist()
        if live_rows == 0:
            raise ValueError("decision: nobody survives; there is no batch to make")
        if live_rows > row_capacity:
            raise ValueError(
                f"decision: expected at most {row_capacity} live rows, as it has survivors, got {live_rows}"
            )
        row_capacity = live_rows
        cu_seqlens = cu_seqlens[: row_capacity + 1]
        seqlens = cu_seqlens.diff()
        token_capacity = tokens if token_capacity is None else token_capacity
        if token_capacity < tokens:
            raise ValueError(
                f"token_capacity: expected at least {tokens} (the survivors' tokens), got {token_capacity}"
            )
    elif token_capacity is None:
        raise ValueError("token_capacity: expected a number on a GPU, where the survivors' count is not on the host")
    names = [name for name in TOKEN_FIELDS if getattr(batch, name) is not None]
    tokens_of = [getattr(batch, name) for name in names]
    rows_of = [batch.sample_ids, *state.values()]
    if out is not None:
        _check_out(out, batch.hidden, token_capacity)
    new_tokens = [] if out is None else [out]  # hidden comes first
    new_tokens += [value.new_empty((token_capacity, *value.shape[1:])) for value in tokens_of[len(new_tokens) :]]
    rows = [value.new_empty((row_capacity, *value.shape[1:])) for value in rows_of]
    _compact(
        new_tokens,
        rows,
        tokens_of,
        rows_of,
        decision.survivors,
        batch.cu_seqlens,
        decision.cu_seqlens,
        decision.live,
        resolve_impl(impl, batch.device),
    )
    return RaggedBatch(
        cu_seqlens=cu_seqlens,
        live=decision.live,
        seqlens=seqlens,
        sample_ids=rows[0],
        state=dict(zip(state, rows[1:], strict=True)),
        **dict(zip(names, new_tokens, strict=True)),
    )


def _check_out(out: Tensor, hidden: Tensor | None, token_capacity: int) -> None:
    if hidden is None:
        raise ValueError("out: expected None for a batch without hidden states")
    shape = (token_capacity, *hidden.shape[1:])
    if out.shape != shape or not out.is_contiguous() or (out.dtype, out.device) != (hidden.dtype, hidden.device):
        raise ValueError(
            f"out: expected contiguous {hidden.dtype} {list(shape)} on {hidden.device}, "
            f"got {out.dtype} {list(out.shape)} {list(out.stride())} on {out.device}"
        )


@registered(mutates_args=("new_tokens", "new_rows"))
def _compact(
    new_tokens: list[Tensor],  # each [new Tcap, ...]
    new_rows: list[Tensor],  # each [new Bcap, ...]
    tokens: list[Tensor],  # each [Tcap, ...]
    rows: list[Tensor],  # each [Bcap, ...]
    survivors: Tensor,  # i32 [Bcap]
    cu_seqlens: Tensor,  # i32 [Bcap + 1]
    new_cu_seqlens: Tensor,  # i32 [Bcap + 1]
    live: Tensor,  # i32 [2] of the survivors
    impl: str,
) -> None:
    implementation(impl).compact(new_tokens, new_rows, tokens, rows, survivors, cu_seqlens, new_cu_seqlens, live)
