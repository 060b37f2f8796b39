"""What the ops and their implementations share: the tensors that an exit step gives back, and checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Packed linears: inputs and outputs come in whole blocks, and 32 inputs for 32 outputs lie as one of these, the last of
# ``panels.shape`` (LinearArgs in csrc/kernels.h).
BLOCK = 32
FLOAT_VECTORS = (1, 2, 32, 16, 1), torch.float32
HALF_VECTORS = (1, 2, 16, 16, 2), torch.bfloat16  # of tiles in bfloat16, too
FLOAT_TILES = (3, 2, 16, 16, 2), torch.bfloat16


class ExitTensors(NamedTuple):
    """logits f32 ``[Bcap, C]``, score f32 ``[Bcap]``, exits bool ``[Bcap]``, survivors i32 ``[Bcap]`` (then -1),
    cu_seqlens i32 ``[Bcap + 1]`` and live i32 ``[2]`` of the survivors, counter i32 and previous f32 ``[Bcap]`` in the
    input's row order (``[0]`` where the rule keeps no state). Rows past the input's ``live``: logits and score 0."""

    logits: Tensor
    score: Tensor
    exits: Tensor
    survivors: Tensor
    cu_seqlens: Tensor
    live: Tensor
    counter: Tensor
    previous: Tensor


def new_exit_tensors(
    cu_seqlens: Tensor, classes: int, counts: bool, logits_dtype: torch.dtype = torch.float32
) -> ExitTensors:
    """Uninitialised, for the rows of ``cu_seqlens`` and on its device: the kernels write every element."""
    rows, new = len(cu_seqlens) - 1, cu_seqlens.new_empty  # int32, as cu_seqlens, where nothing else is said
    counted = rows if counts else 0
    return ExitTensors(
        logits=new((rows, classes), dtype=logits_dtype),
        score=new(rows, dtype=logits_dtype),
        exits=new(rows, dtype=torch.bool),
        survivors=new(rows),
        cu_seqlens=new(rows + 1),
        live=new(2),
        counter=new(counted),
        previous=new(counted, dtype=torch.float32),
    )


def check_means(means: Tensor, rows: int, hidden: Tensor) -> None:
    """Raise ValueError unless these can be the means of ``rows`` rows of ``hidden``, as the kernels read them."""
    expected = rows, hidden.shape[1]
    if means.shape != expected or means.dtype != torch.float32 or not means.is_contiguous():
        raise ValueError(f"means: expected contiguous float32 {list(expected)}, got {means.dtype} {list(means.shape)}")
    if means.device != hidden.device:
        raise ValueError(f"means: expected the device of hidden, {hidden.device}, got {means.device}")


def check_cu_seqlens(cu_seqlens: Tensor, device: torch.device) -> None:
    """Raise ValueError unless these are row ends as the kernels read them; what they say is checked where they lie."""
    found = cu_seqlens.dtype, cu_seqlens.ndim, cu_seqlens.device
    if found != (torch.int32, 1, device) or len(cu_seqlens) == 0:
        raise ValueError(
            f"cu_seqlens: expected int32 [B + 1] on {device}, "
            f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
