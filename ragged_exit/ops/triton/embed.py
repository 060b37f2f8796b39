"""embed_layer_norm: three gathers, their sum and LayerNorm, a program a token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ragged_exit.ops.triton.config import config, on_its_device
from ragged_exit.ops.triton.device import narrow
from ragged_exit.ops.triton.layer_norm import normalise


@triton.jit
def gather_row(ids_ptr, table_ptr, token, cols, ENTRIES: tl.constexpr, H: tl.constexpr):
    """The table's row for a token; zeros for an id outside the table."""
    row = tl.load(ids_ptr + token).to(tl.int64)
    known = tl.minimum(tl.maximum(row, 0), ENTRIES - 1)  # nothing outside the table may be read
    x = tl.load(table_ptr + known * H + cols, mask=cols < H, other=0.0).to(tl.float32)
    return tl.where(row == known, x, 0.0)


@triton.jit
def embed_layer_norm_kernel(
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,  # or None: type 0
    word_ptr,
    position_ptr,
    token_type_ptr,  # or None
    weight_ptr,
    bias_ptr,
    out_ptr,  # [T, H]
    eps,
    WORDS: tl.constexpr,
    POSITIONS: tl.constexpr,
    TYPES: tl.constexpr,
    UER: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    x = gather_row(input_ids_ptr, word_ptr, token, cols, WORDS, H)  # [BLOCK_H]
    if token_type_ptr is not None:
        if token_type_ids_ptr is None:
            x += tl.load(token_type_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
        else:
            x += gather_row(token_type_ids_ptr, token_type_ptr, token, cols, TYPES, H)
    x += gather_row(position_ids_ptr, position_ptr, token, cols, POSITIONS, H)
    out = normalise(x, weight_ptr, bias_ptr, cols, eps, UER, H)
    tl.store(out_ptr + token * H + cols, narrow(out, out_ptr.dtype.element_ty), mask=cols < H)


@on_its_device
def embed_layer_norm(
    out: Tensor,  # [T, H]
    input_ids: Tensor,  # [T]
    position_ids: Tensor,  # [T]
    token_type_ids: Tensor | None,  # [T]
    word: Tensor,  # [V, H]
    position: Tensor,  # [S, H]
    token_type: Tensor | None,  # [Y, H]
    weight: Tensor,  # [H]
    bias: Tensor,  # [H]
    eps: float,
    kind: str,
) -> None:
    tokens, size = out.shape
    if tokens == 0:
        return
    embed_layer_norm_kernel[(tokens,)](
        input_ids.contiguous(),
        position_ids.contiguous(),
        None if token_type_ids is None else token_type_ids.contiguous(),
        word.contiguous(),
        position.contiguous(),
        None if token_type is None else token_type.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        out,
        eps,
        WORDS=word.shape[0],
        POSITIONS=position.shape[0],
        TYPES=0 if token_type is None else token_type.shape[0],
        UER=kind == "uer",
        H=size,
        BLOCK_H=triton.next_power_of_2(size),
        **config("layer_norm", word.device, word.dtype, size),
    )
