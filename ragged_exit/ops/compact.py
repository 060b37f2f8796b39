"""compact: the survivors' hidden states and row state, gathered by one plan."""

from __future__ import annotations

import torch
from torch import Tensor

from ragged_exit.batch import TOKEN_FIELDS, RaggedBatch
from ragged_exit.ops.dispatch import implementation, resolve_impl
from ragged_exit.ops.exit_step import ExitDecision


def compact(
    batch: RaggedBatch,
    decision: ExitDecision,
    token_capacity: int | None = None,
    *,
    impl: str | None = None,
) -> RaggedBatch:
    """The batch of the survivors of ``decision``; tokens past the live ones are zero.

    token_capacity: rows of the new ``hidden`` (default: the survivors' tokens). Where ``batch.live_on_host`` the row
    capacity shrinks to the survivors; on a GPU it stays, so that no count has to reach the host, and ``token_capacity``
    is believed.

    Raises ValueError when ``token_capacity`` is smaller than the survivors' tokens, there are no survivors, the
    decision is another batch's, or an entry of the state has another row count or device than the batch.
    """
    seqlens = batch.seqlens
    row_capacity = batch.row_capacity
    if decision.survivors.shape != (row_capacity,):
        raise ValueError(f"decision: expected one of {row_capacity} rows, got {list(decision.survivors.shape)}")
    state = {**batch.state, **decision.state}
    for name, value in state.items():
        if value.shape[:1] != (row_capacity,) or value.device != batch.device:
            raise ValueError(
                f'batch.state["{name}"]: expected [{row_capacity}, ...] on {batch.device}, '
                f"got {list(value.shape)} on {value.device}"
            )
    cu_seqlens = decision.cu_seqlens
    if batch.live_on_host:
        row_capacity, tokens = decision.live.tolist()
        if row_capacity == 0:
            raise ValueError("decision: nobody survives; there is no batch to make")
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
    gathered = _compact(
        [getattr(batch, name) for name in names],
        [batch.sample_ids, *state.values()],
        decision.survivors,
        batch.cu_seqlens,
        decision.cu_seqlens,
        decision.live,
        token_capacity,
        row_capacity,
        resolve_impl(impl, batch.device),
    )
    rows = gathered[len(names) :]
    return RaggedBatch(
        cu_seqlens=cu_seqlens,
        live=decision.live,
        seqlens=seqlens,
        sample_ids=rows[0],
        state=dict(zip(state, rows[1:], strict=True)),
        **dict(zip(names, gathered[: len(names)], strict=True)),
    )


@torch.library.custom_op("ragged_exit::compact", mutates_args=())
def _compact(
    tokens: list[Tensor],  # each [Tcap, ...]
    rows: list[Tensor],  # each [Bcap, ...]
    survivors: Tensor,  # i32 [Bcap]
    cu_seqlens: Tensor,  # i32 [Bcap + 1]
    new_cu_seqlens: Tensor,  # i32 [Bcap + 1]
    live: Tensor,  # i32 [2] of the survivors
    token_capacity: int,
    row_capacity: int,
    impl: str,
) -> list[Tensor]:
    return implementation(impl).compact(
        tokens, rows, survivors, cu_seqlens, new_cu_seqlens, live, token_capacity, row_capacity
    )


@_compact.register_fake
def _(
    tokens: list[Tensor],
    rows: list[Tensor],
    survivors: Tensor,
    cu_seqlens: Tensor,
    new_cu_seqlens: Tensor,
    live: Tensor,
    token_capacity: int,
    row_capacity: int,
    impl: str,
) -> list[Tensor]:
    return [value.new_empty((token_capacity, *value.shape[1:])) for value in tokens] + [
        value.new_empty((row_capacity, *value.shape[1:])) for value in rows
    ]
