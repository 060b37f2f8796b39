"""Random inputs for the ops. The same generator state gives the same tensors, on every device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ragged_exit.batch import RaggedBatch
from ragged_exit.heads import MlpHead
from ragged_exit.rules import (
    ENTROPY_DIALECTS,
    ConfidentPatience,
    DistanceEntropy,
    Energy,
    Entropy,
    ExitRule,
    LearnedUncertainty,
    MaxProb,
    Patience,
)

Device = torch.device | str


def seeded(seed: int) -> torch.Generator:
    """A CPU generator with this seed."""
    return torch.Generator().manual_seed(seed)


def every_rule() -> list[ExitRule]:
    """A rule of every score, entropy dialect and order of distances; some random rows leave by each, some stay."""
    return [
        *(Entropy(0.4, dialect=dialect) for dialect in ENTROPY_DIALECTS),
        MaxProb(0.6),
        Energy(0.3, temperature=2.0),
        LearnedUncertainty(0.5),
        Patience(2),
        ConfidentPatience(2, tolerance=0.4),
        DistanceEntropy(0.4),
        DistanceEntropy(0.4, lam=3.0, dr_order="distance"),
    ]


def random_lengths(rows: int, longest: int, generator: torch.Generator) -> list[int]:
    """``rows`` lengths from 1 to ``longest``, short ones likelier (squared uniform); the first is 1 where rows > 1."""
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    lengths = (1 + (uniform**2 * longest).long()).clamp_max(longest).tolist()
    return [1, *lengths[1:]] if rows > 1 else lengths


def random_batch(
    lengths: Sequence[int],
    hidden_size: int,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
    spare_rows: int = 0,
    spare_tokens: int = 0,
    tail: float = 0.0,
    token_ids: bool = False,
) -> RaggedBatch:
    """A batch of rows with these lengths: normal hidden states, every row at a scale of its own in [0.1, 3].

    spare_rows, spare_tokens: how much larger than what lives the buffers are. tail: what stands in the hidden states
    past the live tokens (the contract is zero; anything else shows who reads them). token_ids: also input_ids,
    token_type_ids and position_ids.
    """
    seqlens = torch.tensor(list(lengths), dtype=torch.int32)
    tokens = int(seqlens.sum())
    scale = (0.1 + 2.9 * torch.rand(len(seqlens), generator=generator)).repeat_interleave(seqlens)
    hidden = torch.randn(tokens, hidden_size, generator=generator) * scale[:, None]
    hidden = torch.cat((hidden, torch.full((spare_tokens, hidden_size), tail)))
    batch = RaggedBatch.from_seqlens(seqlens, device, hidden=hidden.to(dtype).to(device))
    if token_ids:
        batch.input_ids = torch.randint(1, 1000, (tokens + spare_tokens,), generator=generator).to(device)
        batch.token_type_ids = torch.randint(0, 2, (tokens + spare_tokens,), generator=generator).to(device)
        batch.position_ids = torch.randint(0, 512, (tokens + spare_tokens,), generator=generator).to(device)
    if spare_rows:
        batch.cu_seqlens = torch.cat((batch.cu_seqlens, batch.cu_seqlens[-1:].expand(spare_rows)))
        batch.sample_ids = torch.cat((batch.sample_ids, batch.sample_ids.new_full((spare_rows,), -1)))
    return batch


def random_head(
    hidden_size: int,
    classes: int,
    generator: torch.Generator,
    *,
    pooling: str = "cls",
    pooled_size: int | None = None,
    bias: bool = True,
    uncertainty: bool = False,
    prototype_size: int | None = None,
    gain: float = 2.0,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
) -> MlpHead:
    """A head whose logits have a standard deviation of about ``gain`` (times the row's scale without a pooler).

    pooled_size: P of a tanh pooler, None for a head without one. uncertainty: also BERxiT's linear. prototype_size: D
    of DE3-BERT's net and prototypes, None for a head without them.
    """

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype).to(device)

    width = hidden_size if pooled_size is None else pooled_size
    fields: dict[str, Tensor] = {"classifier_weight": normal(classes, width, std=gain / math.sqrt(width))}
    if bias:
        fields["classifier_bias"] = normal(classes, std=0.3)
    if pooled_size is not None:
        fields["pooler_weight"] = normal(pooled_size, hidden_size, std=1 / math.sqrt(hidden_size))
        if bias:
            fields["pooler_bias"] = normal(pooled_size, std=0.3)
    if uncertainty:
        fields["uncertainty_weight"] = normal(width, std=gain / math.sqrt(width))
        if bias:
            fields["uncertainty_bias"] = normal(1, std=0.3)
    if prototype_size is not None:
        fields["prototype_weight"] = normal(prototype_size, hidden_size, std=1 / math.sqrt(hidden_size))
        if bias:
            fields["prototype_bias"] = normal(prototype_size, std=0.3)
        fields["prototypes"] = normal(classes, prototype_size, std=1.0)
    return MlpHead(**fields, pooling=pooling)


def random_logits(
    rows: int,
    classes: int,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
) -> Tensor:
    """Logits ``[rows, classes]`` of every confidence: each row at a scale of its own in [0.1, 6], clamped to +-30."""
    scale = 0.1 + 5.9 * torch.rand(rows, 1, generator=generator)
    return (torch.randn(rows, classes, generator=generator) * scale).clamp(-30, 30).to(dtype).to(device)


def random_distances(rows: int, classes: int, generator: torch.Generator, *, device: Device = "cpu") -> Tensor:
    """Cosine distances f32 ``[rows, classes]`` in [0, 2]; about one in ten is exactly 0."""
    uniform = torch.rand(rows, classes, generator=generator)
    return (2 * (uniform - 0.1).clamp_min(0) / 0.9).to(device)


def random_state(
    rule: ExitRule, rows: int, classes: int, generator: torch.Generator, *, device: Device = "cpu"
) -> dict:
    """The row state that ``rule`` needs, as after some layers: counters up to the patience, any previous answer."""
    state = rule.initial_state(rows, torch.device("cpu"))
    if not state:
        return {}
    state["counter"] = torch.randint(0, 4, (rows,), generator=generator, dtype=torch.int32)
    if classes == 1:
        state["previous"] = torch.randn(rows, generator=generator)
    else:
        state["previous"] = torch.randint(0, classes, (rows,), generator=generator).float()
    return {name: value.to(device) for name, value in state.items()}


def qkv_views(
    tokens: int,
    heads: int,
    head_size: int,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
    layout: str = "fused",
    gain: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[tokens, heads, head_size]``.

    layout: "fused" views of one ``[tokens, 3 * heads * head_size]`` (query, key, value side by side), "interleaved"
    views of ``[tokens, heads, 3 * head_size]``, "separate" contiguous tensors, "misaligned" contiguous rows that start
    one element after an allocation.
    """
    width = heads * head_size
    values = (torch.randn(tokens, 3, heads, head_size, generator=generator) * gain).to(dtype).to(device)
    q, k, v = values.unbind(1)
    if layout == "fused":
        parts = values.reshape(tokens, 3 * width).split(width, dim=1)
        q, k, v = (part.view(tokens, heads, head_size) for part in parts)
    elif layout == "interleaved":
        q, k, v = torch.cat((q, k, v), dim=2).split(head_size, dim=2)
    elif layout == "separate":
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    elif layout == "misaligned":
        q, k, v = (_misaligned(part) for part in (q, k, v))
    else:
        raise ValueError(f"layout: expected fused, interleaved, separate or misaligned, got {layout!r}")
    return q, k, v


def _misaligned(value: Tensor) -> Tensor:
    buffer = value.new_empty(value.numel() + 1)
    buffer[1:] = value.reshape(-1)
    return buffer[1:].view(value.shape)
