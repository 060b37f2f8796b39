"""embed_layer_norm: packed word, position and token type embeddings, added and normalised in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ragged_exit.ops.dispatch import implementation, resolve_impl
from ragged_exit.ops.layer_norm import KINDS
from ragged_exit.ops.registration import registered


def embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    kind: str = "standard",
    *,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """LayerNorm of word[input_ids] + token_type[token_type_ids] + position[position_ids] -> ``[T, H]``.

    The ids: int64 ``[T]``; without token_type_ids every token has type 0. word ``[V, H]``, position ``[S, H]``,
    token_type ``[Y, H]`` or None: tables of one floating dtype, which is the result's; sums in fp32. weight, bias, eps
    and kind: as in ``add_layer_norm``. Ids outside a table are an error on a CPU; a GPU reads zeros for them, since a
    check would wait for it. out: where to write, contiguous ``[T, H]``.

    Raises ValueError/TypeError naming the argument that has another shape, dtype or device.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    if word.ndim != 2:
        raise ValueError(f"word: expected [V, H], got {list(word.shape)}")
    if token_type is None and token_type_ids is not None:
        raise ValueError("token_type_ids: expected None without a token_type table")
    if token_type is not None and not len(token_type):
        raise ValueError("token_type: expected a table with rows, or None")
    lookups = (
        ("input_ids", input_ids, "word", word),
        ("position_ids", position_ids, "position", position),
        ("token_type_ids", token_type_ids, "token_type", token_type),
    )
    for ids_name, ids, name, table in lookups:
        if table is not None:
            _check_like_word(name, table, (*table.shape[:1], word.shape[1]), word)
        if ids is None or table is None:
            continue
        if ids.shape != input_ids.shape or ids.ndim != 1 or ids.device != word.device:
            raise ValueError(
                f"{ids_name}: expected [{len(input_ids)}] on {word.device}, got {list(ids.shape)} on {ids.device}"
            )
        if ids.dtype != torch.int64:
            raise TypeError(f"{ids_name}: expected int64, got {ids.dtype}")
        if ids.device.type == "cpu" and len(ids):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= len(table):
                raise ValueError(f"{ids_name}: expected 0 to {len(table) - 1} (rows of {name}), got {low} to {high}")
    _check_like_word("weight", weight, word.shape[1:], word)
    _check_like_word("bias", bias, word.shape[1:], word)
    if out is None:
        out = word.new_empty(len(input_ids), word.shape[1])
    _check_like_word("out", out, (len(input_ids), word.shape[1]), word)
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {list(out.stride())}")
    _embed_layer_norm(
        out,
        input_ids,
        position_ids,
        token_type_ids,
        word,
        position,
        token_type,
        weight,
        bias,
        eps,
        kind,
        resolve_impl(impl, word.device),
    )
    return out


def _check_like_word(name: str, value: Tensor, shape: tuple[int, ...], word: Tensor) -> None:
    if value.shape != shape or value.device != word.device:
        raise ValueError(f"{name}: expected {list(shape)} on {word.device}, got {list(value.shape)} on {value.device}")
    if value.dtype != word.dtype:
        raise TypeError(f"{name}: expected the dtype of word, {word.dtype}, got {value.dtype}")


@registered(mutates_args=("out",))
def _embed_layer_norm(
    out: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    kind: str,
    impl: str,
) -> None:
    implementation(impl).embed_layer_norm(
        out, input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps, kind
    )
