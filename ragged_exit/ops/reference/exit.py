"""Reference exit step: pool, head, score, comparison, row state and the compaction plan."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ragged_exit.heads import HeadWeights
from ragged_exit.ops.common import ExitTensors
from ragged_exit.ops.reference import scores
from ragged_exit.rules import ScoreSpec


def exit_step(
    hidden: Tensor,  # [Tcap, H]
    means: Tensor | None,  # [Bcap, H], where the head is on the mean and they are known
    cu_seqlens: Tensor,  # [Bcap + 1]
    live: Tensor,  # [2]
    head: HeadWeights,
    counter: Tensor | None,  # [Bcap]
    previous: Tensor | None,  # [Bcap]
    threshold: Tensor,  # [1] or [Bcap]
    spec: ScoreSpec,
    final: bool,
) -> ExitTensors:
    # [Bcap, H]
    pooled_hidden = pool_rows(hidden, cu_seqlens, head.pooling) if means is None else means.to(hidden.dtype)
    pooled = pooled_hidden
    if head.pooler_weight is not None:
        pooled = torch.tanh(F.linear(pooled, head.pooler_weight, head.pooler_bias))  # [Bcap, P]
    logits = F.linear(pooled, head.classifier_weight, head.classifier_bias)  # [Bcap, C]
    signal = None
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if spec.score == "uncertainty":
        assert head.uncertainty_weight is not None
        signal = torch.sigmoid(F.linear(pooled, head.uncertainty_weight[None], head.uncertainty_bias)[:, 0].to(wide))
    elif spec.score == "distance_entropy":
        assert head.prototype_weight is not None and head.prototypes is not None
        projected = F.linear(pooled_hidden, head.prototype_weight, head.prototype_bias)  # [Bcap, D]
        signal = scores.cosine_distances(projected.to(wide), head.prototypes.to(wide))
    return exit_decide(logits, signal, cu_seqlens, live, counter, previous, threshold, spec, final)


def exit_decide(
    logits: Tensor,  # [Bcap, C]
    signal: Tensor | None,  # [Bcap] uncertainty, [Bcap, C] distances
    cu_seqlens: Tensor,  # [Bcap + 1]
    live: Tensor,  # [2]
    counter: Tensor | None,  # [Bcap]
    previous: Tensor | None,  # [Bcap]
    threshold: Tensor,  # [1] or [Bcap]
    spec: ScoreSpec,
    final: bool,
) -> ExitTensors:
    wide = torch.promote_types(logits.dtype, torch.float32)
    alive = torch.arange(logits.shape[0], device=logits.device) < live[0]  # [Bcap]
    logits = torch.where(alive[:, None], logits.to(wide), 0.0)
    score, counter, previous = _score(logits, signal, counter, previous, spec)
    score = torch.where(alive, score, 0.0)
    early = compare(score, threshold.to(score.device), spec.compare)
    exits = alive if final else alive & early
    survivors, new_cu_seqlens, new_live = _plan(alive & ~exits, cu_seqlens)
    return ExitTensors(logits, score, exits.clone(), survivors, new_cu_seqlens, new_live, counter, previous)


def pool_rows(hidden: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """[CLS] or the mean of each row's tokens: ``[Tcap, H]`` -> ``[Bcap, H]``; rows past ``live``: anything finite."""
    if pooling == "cls":  # a dead row has no token: take any, it is masked later
        return hidden[cu_seqlens[:-1].long().clamp_max(hidden.shape[0] - 1)]
    return mean_rows(hidden, cu_seqlens).to(hidden.dtype)


def mean_rows(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean of each row's tokens, zeros without any: ``[Tcap, H]`` -> at least float32 ``[Bcap, H]``."""
    lengths = cu_seqlens.diff().long()
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    sums = torch.zeros(len(lengths), hidden.shape[1], dtype=wide, device=hidden.device)
    sums.index_add_(0, rows, hidden[: len(rows)].to(wide))
    return sums / lengths.clamp_min(1)[:, None]


def _score(
    logits: Tensor, signal: Tensor | None, counter: Tensor | None, previous: Tensor | None, spec: ScoreSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """The score ``[B]`` and the new counter and previous, empty where the rule keeps none."""
    if spec.counts:
        assert counter is not None and previous is not None
        broken = logits.isnan().any(1)
        if spec.score == "confident_patience":
            agrees = scores.entropy(logits, "categorical") < spec.tolerance
            current = previous
        elif logits.shape[1] == 1:
            current = logits[:, 0]
            agrees = (previous - current).abs() < spec.tolerance
        else:
            current = logits.argmax(1).to(logits.dtype)
            agrees = current == previous
        counter = torch.where(agrees & ~broken, counter + 1, 0)
        current = torch.where(broken, math.nan, current).to(previous.dtype)  # nothing agrees with a NaN row next time
        return counter.to(logits.dtype), counter, current
    empty_counter = torch.empty(0, dtype=torch.int32, device=logits.device)
    empty_previous = torch.empty(0, dtype=torch.float32, device=logits.device)
    if spec.score == "uncertainty":
        assert signal is not None
        score = signal.to(logits.dtype)
    elif spec.score == "distance_entropy":
        assert signal is not None
        score = scores.distance_entropy(logits, signal.to(logits.dtype), spec.lam, spec.dr_order)
    else:
        score = scores.of_logits(logits, spec)
    return score.clone(), empty_counter, empty_previous


def compare(score: Tensor, threshold: Tensor | float, sign: str) -> Tensor:
    """``score <sign> threshold``; False for NaN, in every comparison."""
    compares = {"<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge}
    return compares[sign](score, threshold)


def _plan(stays: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """survivors (their old row numbers in order, then -1), new cu_seqlens and live for the rows that stay."""
    rows = stays.shape[0]
    place = torch.cumsum(stays, 0)  # 1-based place among the survivors
    survivors = torch.full((rows + 1,), -1, dtype=torch.int32, device=stays.device)
    target = torch.where(stays, place - 1, rows)  # the others all write to a slot that is cut off
    survivors.scatter_(0, target, torch.arange(rows, dtype=torch.int32, device=stays.device))
    survivors = survivors[:rows].clone()
    lengths = cu_seqlens.diff()
    kept = torch.where(survivors >= 0, lengths[survivors.long().clamp_min(0)], 0)
    new_cu_seqlens = torch.zeros_like(cu_seqlens)
    new_cu_seqlens[1:] = torch.cumsum(kept, 0)
    new_live = torch.stack((place[-1].to(torch.int32), new_cu_seqlens[-1]))
    return survivors, new_cu_seqlens, new_live
