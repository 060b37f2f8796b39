"""compact: survivors' tokens and row state, gathered as raw words; two launches for up to four tensors of each kind."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragged_exit.ops.triton.config import FP_FUSION, on_its_device

_SLOTS = 4  # tensors of one launch
_BLOCK_ITEMS = 8
_MAX_BLOCK_WORDS = 512  # words of 4 bytes: 16-byte accesses of 128 threads
_SEARCH_STEPS = (12, 21, 31)  # of a search among fewer than 2 ** steps rows: not a kernel for every octave of rows
_WORDS = (torch.int32, torch.int16, torch.int8)  # int32: four neighbours make a 16-byte access where they can


@triton.jit
def copy_words(source_ptr, target_ptr, source, item, live, within, WORDS: tl.constexpr, MAX_BLOCK: tl.constexpr):
    """target[item] = source_ptr[source], or zeros where the item is not live; WORDS words each, 0 for no tensor."""
    if WORDS > 0:
        BLOCK: tl.constexpr = min(triton.next_power_of_2(WORDS), MAX_BLOCK)
        for start in range(0, WORDS, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = (cols < WORDS)[None, :]
            words = tl.load(source_ptr + source[:, None] * WORDS + cols[None, :], mask=live[:, None] & inside, other=0)
            tl.store(target_ptr + item[:, None] * WORDS + cols[None, :], words, mask=within[:, None] & inside)


@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["survivors_ptr", "new_cu_ptr"])
def gather_kernel(
    source0_ptr,
    source1_ptr,
    source2_ptr,
    source3_ptr,
    target0_ptr,
    target1_ptr,
    target2_ptr,
    target3_ptr,
    survivors_ptr,
    cu_ptr,
    new_cu_ptr,
    live_ptr,
    capacity,  # items of the targets
    SEARCH_STEPS: tl.constexpr,  # items are tokens, and 2 ** SEARCH_STEPS > rows; 0: items are rows
    WORDS0: tl.constexpr,
    WORDS1: tl.constexpr,
    WORDS2: tl.constexpr,
    WORDS3: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_BLOCK: tl.constexpr,
):
    """A program fills BLOCK items of every target: the survivors' from its source, zeros past ``live``."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    within = item < capacity
    live_rows = tl.load(live_ptr)
    if SEARCH_STEPS > 0:
        live = within & (item < tl.load(live_ptr + 1))
        # the last row that starts at or before the token: binary search in cu_seqlens, which is constant past the live
        row = tl.zeros((BLOCK,), tl.int32)
        for step in tl.static_range(SEARCH_STEPS):
            probe = row + (1 << (SEARCH_STEPS - 1 - step))
            start = tl.load(new_cu_ptr + probe, mask=live & (probe < live_rows), other=2147483647)
            row = tl.where(start <= item, probe, row)
        begin = tl.load(new_cu_ptr + row, mask=live, other=0)
        old_row = tl.load(survivors_ptr + row, mask=live, other=0)
        source = tl.load(cu_ptr + old_row, mask=live, other=0) + item - begin
    else:
        live = within & (item < live_rows)
        source = tl.load(survivors_ptr + item, mask=live, other=0)
    source = source.to(tl.int64)
    item = item.to(tl.int64)
    copy_words(source0_ptr, target0_ptr, source, item, live, within, WORDS0, MAX_BLOCK)
    copy_words(source1_ptr, target1_ptr, source, item, live, within, WORDS1, MAX_BLOCK)
    copy_words(source2_ptr, target2_ptr, source, item, live, within, WORDS2, MAX_BLOCK)
    copy_words(source3_ptr, target3_ptr, source, item, live, within, WORDS3, MAX_BLOCK)


@on_its_device
def compact(
    new_tokens: list[Tensor],  # each [new Tcap, ...], written
    new_rows: list[Tensor],  # each [new Bcap, ...], written
    tokens: list[Tensor],  # each [Tcap, ...]
    rows: list[Tensor],  # each [Bcap, ...]
    survivors: Tensor,  # [Bcap]
    cu_seqlens: Tensor,  # [Bcap + 1] of the input
    new_cu_seqlens: Tensor,  # [Bcap + 1]
    live: Tensor,  # [2] of the survivors
) -> None:
    plan = tuple(value.contiguous() for value in (survivors, cu_seqlens, new_cu_seqlens, live))
    _gather(new_tokens, tokens, plan, next(steps for steps in _SEARCH_STEPS if len(survivors) < 1 << steps))
    _gather(new_rows, rows, plan, 0)


def _gather(targets: list[Tensor], sources: list[Tensor], plan: tuple[Tensor, ...], search_steps: int) -> None:
    """search_steps: to find a token's row; 0 where items are rows."""
    pairs = [
        _as_words(source.contiguous(), target)
        for source, target in zip(sources, targets, strict=True)
        if target.numel()
    ]
    capacity = len(targets[0]) if targets else 0
    for first in range(0, len(pairs), _SLOTS):
        some = pairs[first : first + _SLOTS]
        filled = some + [(None, None)] * (_SLOTS - len(some))
        gather_kernel[(triton.cdiv(capacity, _BLOCK_ITEMS),)](
            *(source for source, _ in filled),
            *(target for _, target in filled),
            *plan,
            capacity,
            SEARCH_STEPS=search_steps,
            **{f"WORDS{slot}": 0 if source is None else source.shape[1] for slot, (source, _) in enumerate(filled)},
            BLOCK=_BLOCK_ITEMS,
            MAX_BLOCK=_MAX_BLOCK_WORDS,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )


def _as_words(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as ``[items, words]`` of the widest integers that the bytes of an item and the addresses divide into."""
    item_bytes = target[0].numel() * target.element_size()
    ends = (item_bytes, source.data_ptr(), target.data_ptr())
    word = next(dtype for dtype in _WORDS if all(end % dtype.itemsize == 0 for end in ends))
    return _words(source, word), _words(target, word)


def _words(value: Tensor, word: torch.dtype) -> Tensor:
    flat = value.reshape(value.shape[0], -1)
    return torch.view_as_real(flat).flatten(1).view(word) if flat.is_complex() else flat.view(word)
