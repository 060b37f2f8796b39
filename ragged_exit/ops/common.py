"""What the implementations share: the tensors that an exit step gives back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
