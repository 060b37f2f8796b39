"""RaggedBatch: the packed tokens of many sequences, and everything that travels with their rows."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragged_exit.transfer import to_device

SMALLEST_BUCKET = 32
MOST_TOKENS = 2**31 - 1  # cu_seqlens is int32
TOKEN_FIELDS = ("hidden", "input_ids", "token_type_ids", "position_ids")


def token_bucket(tokens: int) -> int:
    """The buffer size for ``tokens`` live tokens: one of few sizes, all multiples of 32.

    Batches that shrink at every layer shrink through few sizes, since a oneDNN linear builds a kernel for every new
    number of rows, and so that memory fits again: 32 apart up to 1,024, then 16 steps an octave (a waste of 2 % on
    average, 48 sizes up to 2,048).
    """
    if tokens <= 0:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    octave = max(0, (tokens - 1).bit_length() - 10)
    step = SMALLEST_BUCKET << octave
    return -(-tokens // step) * step


@dataclass
class RaggedBatch:
    """B sequences, packed end to end.

    hidden: ``[Tcap, H]``, None before the embeddings. input_ids, token_type_ids, position_ids: int64 ``[T]``, None once
    no later stage needs them. cu_seqlens: int32 ``[Bcap + 1]``, row b owns tokens ``cu_seqlens[b]:cu_seqlens[b + 1]``.
    live: int32 ``[2]``, the rows and tokens that count: tokens past ``live`` are ignored, rows past it have length 0.
    seqlens: int32 ``[B]`` on the host, the truth at entry and while ``live_on_host``; elsewhere ``compact`` leaves
    those that it found, whose longest bounds the survivors', for whoever learns the truth later. sample_ids: int64
    ``[Bcap]``, the place of each row in the caller's batch. state: name -> ``[Bcap, ...]``, what rules and heads
    remember of a row.
    """

    cu_seqlens: Tensor
    live: Tensor
    seqlens: Tensor
    sample_ids: Tensor
    hidden: Tensor | None = None
    input_ids: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, live = self.cu_seqlens, self.live  # the kernels read both as they lie in memory
        if rows.dtype != torch.int32 or rows.ndim != 1 or not len(rows):
            raise ValueError(f"cu_seqlens: expected int32 [B + 1], got {rows.dtype} {list(rows.shape)}")
        if live.dtype != torch.int32 or live.shape != (2,) or live.device != rows.device:
            raise ValueError(
                f"live: expected int32 [2] on {rows.device}, got {live.dtype} {list(live.shape)} on {live.device}"
            )
        ids = self.sample_ids
        if ids.shape != (self.row_capacity,) or ids.device != rows.device:
            raise ValueError(
                f"sample_ids: expected [{self.row_capacity}] on {rows.device}, got {list(ids.shape)} on {ids.device}"
            )

    @property
    def row_capacity(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def live_on_host(self) -> bool:
        """Whether the host reads ``live`` for nothing. It would wait for a GPU, so there row capacities stay."""
        return self.device.type == "cpu"

    @property
    def rows(self) -> int:
        return self.seqlens.shape[0]

    @cached_property
    def tokens(self) -> int:
        return int(self.seqlens.sum())

    @cached_property
    def max_seqlen(self) -> int:
        return int(self.seqlens.max()) if len(self.seqlens) else 0

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    @classmethod
    def from_seqlens(cls, seqlens: Tensor, device: torch.device | str = "cpu", **fields: object) -> RaggedBatch:
        """A batch of rows with these lengths (int ``[B]``, host), without tokens unless given by name.

        Raises ValueError for no rows, a row without tokens, or more tokens than int32 counts.
        """
        if seqlens.ndim != 1 or len(seqlens) == 0 or int(seqlens.min()) < 1:
            raise ValueError(f"seqlens: expected at least one row of at least one token, got {seqlens.tolist()}")
        tokens = int(seqlens.sum(dtype=torch.int64))
        if tokens > MOST_TOKENS:
            raise ValueError(f"seqlens: expected at most {MOST_TOKENS} tokens, got {tokens}")
        fields.setdefault("sample_ids", torch.arange(len(seqlens), device=device))
        return cls._of(seqlens.to(device="cpu", dtype=torch.int32), tokens, device, **fields)

    @classmethod
    def _of(cls, seqlens: Tensor, tokens: int, device: torch.device | str, **fields: Any) -> RaggedBatch:
        """``from_seqlens`` of int32 lengths on the host whose sum is known: nothing is left to check."""
        cu_seqlens = seqlens.new_zeros(len(seqlens) + 1)
        torch.cumsum(seqlens, 0, dtype=torch.int32, out=cu_seqlens[1:])
        live = seqlens.new_tensor([len(seqlens), tokens])
        return cls(cu_seqlens=to_device(cu_seqlens, device), live=to_device(live, device), seqlens=seqlens, **fields)

    @classmethod
    def pack(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        padding_idx: int | None = None,
    ) -> RaggedBatch:
        """Drop the padding of ``[B, S]`` int64 tensors; ``attention_mask`` is any 0/1 mask, holes and left padding too.

        Without ``position_ids`` a token's position is its column (BERT), or with ``padding_idx`` the count of tokens
        that are not ``padding_idx`` up to it, plus ``padding_idx`` (RoBERTa).

        Raises ValueError naming the argument: an empty batch, a row without tokens, a mask that is not 0/1, shapes or
        devices that differ. Raises TypeError when ids are not integers, or something is no tensor.
        """
        beside = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        check_inputs(input_ids, **beside)
        for name, value in beside.items():
            if value is not None and value.device != input_ids.device:
                raise ValueError(f"{name}: expected the device of input_ids, {input_ids.device}, got {value.device}")
        batch, width = input_ids.shape
        keep, seqlens = kept_tokens(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        if position_ids is None:
            if padding_idx is None:
                position_ids = torch.arange(width, device=input_ids.device).expand(batch, width)
            else:
                counted = input_ids != padding_idx
                position_ids = counted.cumsum(1) * counted + padding_idx
        return cls.from_seqlens(
            seqlens,
            input_ids.device,
            input_ids=input_ids[keep].long(),
            token_type_ids=None if token_type_ids is None else token_type_ids[keep].long(),
            position_ids=position_ids[keep].long(),
        )

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        token_type_ids: Sequence[Sequence[int]] | None = None,
        *,
        padding_idx: int | None = None,
        device: torch.device | str = "cpu",
    ) -> RaggedBatch:
        """Pack lists of token ids. Positions count from 0, or from ``padding_idx + 1`` (RoBERTa).

        Raises ValueError for an empty list, a sequence without tokens, or token types of other lengths; TypeError for
        values that are not whole numbers.
        """
        if len(sequences) == 0:
            raise ValueError("sequences: expected at least one, got none")
        lengths = [len(sequence) for sequence in sequences]
        if 0 in lengths:
            raise ValueError(f"sequences: sequence {lengths.index(0)} has no tokens; expected at least one")
        seqlens = torch.tensor(lengths, dtype=torch.int32, device="cpu")
        batch = cls.from_seqlens(seqlens)
        batch.input_ids = _flatten("sequences", sequences)
        starts = (seqlens.cumsum(0) - seqlens).repeat_interleave(seqlens)
        positions = torch.arange(int(seqlens.sum()), device="cpu") - starts
        if padding_idx is not None:
            counted = batch.input_ids != padding_idx
            before = counted.cumsum(0)
            row_start = (before - counted.long())[starts]  # counted tokens before the row's first
            positions = (before - row_start) * counted + padding_idx
        batch.position_ids = positions
        if token_type_ids is not None:
            if [len(types) for types in token_type_ids] != lengths:
                raise ValueError("token_type_ids: expected the lengths of sequences, got others")
            batch.token_type_ids = _flatten("token_type_ids", token_type_ids)
        return batch.to(device)

    def to(self, device: torch.device | str) -> RaggedBatch:
        """The same rows on ``device``; from the host without waiting for what the device has still to do."""

        if self.device == torch.device(device):
            return self
        given = {name: getattr(self, name) for name in TOKEN_FIELDS}
        tokens: dict[str, Any] = {
            name: None if value is None else to_device(value, device) for name, value in given.items()
        }
        return replace(
            self,
            cu_seqlens=to_device(self.cu_seqlens, device),
            live=to_device(self.live, device),
            sample_ids=to_device(self.sample_ids, device),
            state={name: to_device(value, device) for name, value in self.state.items()},
            **tokens,
        )

    def unpack(self, values: Tensor | None = None, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """(packed ``values`` ``[T, ...]``, default ``hidden``, padded to ``[B, S, ...]``; mask int64 ``[B, S]``)."""
        values = self.hidden if values is None else values
        if values is None:
            raise ValueError("values: expected packed values, and the batch has no hidden states yet")
        seqlens = self.seqlens.to(values.device)
        mask = torch.arange(self.max_seqlen, device=values.device) < seqlens[:, None]  # [B, S]
        padded = values.new_full((self.rows, self.max_seqlen, *values.shape[1:]), fill)
        padded[mask] = values[: self.tokens]
        return padded, mask.long()

    def part(self, start: int, stop: int) -> RaggedBatch:
        """The rows ``start:stop`` as a batch of views, without any capacity to spare. ``seqlens`` must be the truth."""
        seqlens = self.seqlens[start:stop]
        first, length = int(self.seqlens[:start].sum()), int(seqlens.sum())
        tokens = slice(first, first + length)
        values = {name: getattr(self, name) for name in TOKEN_FIELDS}
        return replace(
            self,
            cu_seqlens=self.cu_seqlens[start : stop + 1] - first,
            live=to_device(seqlens.new_tensor([stop - start, length]), self.device),
            seqlens=seqlens,
            sample_ids=self.sample_ids[start:stop],
            state={name: value[start:stop] for name, value in self.state.items()},
            **{name: value if value is None else value[tokens] for name, value in values.items()},
        )

    @classmethod
    def merge(cls, parts: Sequence[RaggedBatch], hidden: Tensor | None = None) -> RaggedBatch:
        """The live rows of all ``parts`` one after the other; token types are 0 where some parts have none.

        hidden: their hidden states ``[tokens, H]``, which already lie so. ``seqlens`` must be the truth. Raises
        ValueError for parts with other row state than the first.
        """
        first = parts[0]
        for part in parts:
            if part.state.keys() != first.state.keys():
                raise ValueError(f"parts: expected the row state {sorted(first.state)}, got {sorted(part.state)}")
        if any(part.token_type_ids is not None for part in parts):
            parts = [part if part.token_type_ids is not None else part._with_types() for part in parts]
        tokens = {
            name: torch.cat([getattr(part, name)[: part.tokens] for part in parts])
            for name in TOKEN_FIELDS[1:]
            if getattr(parts[0], name) is not None
        }
        return cls._of(
            torch.cat([part.seqlens for part in parts]),
            sum(part.tokens for part in parts),
            first.device,
            sample_ids=torch.cat([part.sample_ids[: part.rows] for part in parts]),
            hidden=hidden,
            state={name: torch.cat([part.state[name][: part.rows] for part in parts]) for name in first.state},
            **tokens,
        )

    def _with_types(self) -> RaggedBatch:
        """The same rows with token types of 0, which is what a backbone takes where there are none."""
        assert self.input_ids is not None
        return replace(self, token_type_ids=torch.zeros_like(self.input_ids))

    def with_hidden(self, hidden: Tensor) -> RaggedBatch:
        """The same rows with other hidden states."""
        return replace(self, hidden=hidden)


def _flatten(name: str, sequences: Sequence[Sequence[int]]) -> Tensor:
    try:
        flat = np.fromiter(map(operator.index, chain.from_iterable(sequences)), np.int64)
    except (TypeError, OverflowError) as error:
        raise TypeError(f"{name}: expected whole numbers of at most 64 bits: {error}") from None
    return torch.from_numpy(flat)


def check_ids(name: str, ids: Tensor) -> None:
    """Raise unless ``ids`` is an integer ``[B, S]`` tensor with at least one row and column."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name}: expected an integer tensor, got {got}")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(f"{name}: expected shape [batch >= 1, length >= 1], got {list(ids.shape)}")


def check_inputs(input_ids: Tensor, **beside: Tensor | None) -> None:
    """Raise unless ``input_ids`` passes ``check_ids`` and what is given beside it are tensors of its shape, or None."""
    check_ids("input_ids", input_ids)
    for name, value in beside.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.shape != input_ids.shape:
            raise ValueError(
                f"{name}: expected the shape of input_ids {list(input_ids.shape)}, got {list(value.shape)}"
            )


def kept_tokens(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """bool ``[B, S]``, and how many in each row, int32 ``[B]`` on the host.

    Raises ValueError for values other than 0 and 1, and for a row without tokens.
    """
    keep = attention_mask == 1
    if not bool((keep | (attention_mask == 0)).all()):
        raise ValueError("attention_mask: expected only 0 and 1, got other values")
    seqlens = keep.sum(1, dtype=torch.int32).cpu()
    if bool((seqlens == 0).any()):
        row = int((seqlens == 0).nonzero()[0])
        raise ValueError(f"attention_mask: row {row} has no tokens; expected at least one")
    return keep, seqlens
