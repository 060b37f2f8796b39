"""How results are compared: a float64 oracle, error budgets, and decisions outside a margin.

The oracle is written with other formulas than ``ops.reference`` and shares no code with it, so that the two check
each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ragged_exit.batch import RaggedBatch
from ragged_exit.heads import MlpHead
from ragged_exit.ops import ExitDecision
from ragged_exit.rules import ExitRule, ScoreSpec

SMALLEST_MARGIN = 1e-5
MARGIN_FACTOR = 4.0  # times plain PyTorch's own error
BUDGET_FACTOR = 2.0  # times plain PyTorch's own error
MOST_INSIDE = 0.01  # of the rows, inside the margin
ENOUGH_ROWS = 400  # before that share means anything; CI compares more


class OracleDecision(NamedTuple):
    """What an exit decides in float64, for the live rows only.

    logits: f64 ``[B, C]``. score, threshold: f64 ``[B]``. gap: f64 ``[B]``, how far what a rule *chooses by* is from a
    tie (top two logits, ||change| - tolerance|, |entropy - tolerance|), infinite where nothing is chosen. exits: bool
    ``[B]``. counter, previous: f64 ``[B]`` for patience rules, else None.
    """

    logits: Tensor
    score: Tensor
    threshold: Tensor
    gap: Tensor
    exits: Tensor
    counter: Tensor | None
    previous: Tensor | None
    counts: bool


class Margin(NamedTuple):
    """Half widths of what counts as a tie: of |score - threshold|, and of ``OracleDecision.gap``."""

    score: float = SMALLEST_MARGIN
    gap: float = SMALLEST_MARGIN


SMALLEST = Margin()


class MarginReport(NamedTuple):
    """How many rows were compared, and how many of them lay inside the margin."""

    rows: int
    inside: int


class MarginTally:
    """The reports of a whole run, added up. One batch says little: its threshold may lie where scores are dense."""

    def __init__(self) -> None:
        self.rows = self.inside = self.batches = 0

    def add(self, report: MarginReport) -> None:
        self.rows += report.rows
        self.inside += report.inside
        self.batches += 1

    def __str__(self) -> str:
        share = self.inside / max(self.rows, 1)
        return f"{self.rows} rows in {self.batches} batches, {self.inside} ({share:.3%}) inside the margin"

    def check(self) -> None:
        """Raise AssertionError when more than 1 % of the rows lie inside, where there are ``ENOUGH_ROWS``."""
        if self.rows >= ENOUGH_ROWS and self.inside > MOST_INSIDE * self.rows:
            raise AssertionError(f"{self}: too many to mean anything")


def step_oracle(
    batch: RaggedBatch, head: MlpHead, rule: ExitRule, final: bool = False, *, exit_index: int = 0
) -> OracleDecision:
    """What ``exit_step`` should decide."""
    assert batch.hidden is not None
    hidden = batch.hidden.detach().cpu().double()
    lengths = live_lengths(batch)
    pieces = hidden[: sum(lengths)].split(lengths)
    pooled = torch.stack([piece[0] if head.pooling == "cls" else piece.mean(0) for piece in pieces])  # [B, H]
    features = pooled
    if head.pooler_weight is not None:
        features = torch.tanh(_linear(pooled, head.pooler_weight, head.pooler_bias))
    signal = None
    if rule.needs == "uncertainty":
        assert head.uncertainty_weight is not None
        signal = torch.sigmoid(_linear(features, head.uncertainty_weight[None], head.uncertainty_bias)[:, 0])
    elif rule.needs == "prototypes":
        assert head.prototype_weight is not None and head.prototypes is not None
        projected = _linear(pooled, head.prototype_weight, head.prototype_bias)
        prototypes = head.prototypes.detach().cpu().double()
        signal = 1 - F.cosine_similarity(projected[:, None], prototypes[None], dim=2, eps=1e-300)
    logits = _linear(features, head.classifier_weight, head.classifier_bias)
    return decide_oracle(batch, logits, rule, final, signal=signal, exit_index=exit_index)


def decide_oracle(
    batch: RaggedBatch,
    logits: Tensor,
    rule: ExitRule,
    final: bool = False,
    *,
    signal: Tensor | None = None,
    exit_index: int = 0,
) -> OracleDecision:
    """What ``exit_decide`` should decide. ``hf`` and ``castorini`` stand for the true entropy (finite logits)."""
    rows, spec = int(batch.live[0]), rule.spec
    logits = logits[:rows].detach().cpu().double()
    signal = None if signal is None else signal[:rows].detach().cpu().double()
    if "threshold" in batch.state:
        threshold = batch.state["threshold"][:rows].cpu().double()
    else:
        threshold = torch.full((rows,), rule.threshold_at(exit_index)).double()  # rounded to fp32, as the ops see it
    counter = previous = None
    if spec.counts:
        old_counter = batch.state["counter"][:rows].cpu().double()
        old_previous = batch.state["previous"][:rows].cpu().double()
        agrees, gap, current = _agreement(logits, old_previous, spec)
        counter = torch.where(agrees, old_counter + 1, 0.0)
        previous = torch.where(logits.isnan().any(1), math.nan, current)
        score = counter
    else:
        score = oracle_score(logits, signal, spec)
        gap = torch.full_like(score, math.inf)
        if spec.score == "distance_entropy" and spec.dr_order == "prob":
            gap = _choice_gap(logits, 2)
    early = {
        "<": score < threshold,
        "<=": score <= threshold,
        ">": score > threshold,
        ">=": score >= threshold,
    }[spec.compare]
    exits = torch.ones_like(early) if final else early
    return OracleDecision(logits, score, threshold, gap, exits, counter, previous, spec.counts)


def oracle_score(logits: Tensor, signal: Tensor | None, spec: ScoreSpec) -> Tensor:
    """The score f64 ``[B]`` of f64 logits ``[B, C]``, for rules that do not count."""
    classes = logits.shape[1]
    scaled = logits / spec.temperature
    entropy = torch.special.entr(logits.softmax(1)).sum(1)
    if spec.score in ("entropy_exact", "entropy_hf", "entropy_castorini"):
        return entropy
    if spec.score == "entropy_normalised":
        return entropy / math.log(classes) if classes > 1 else torch.full_like(entropy, math.nan)
    if spec.score == "entropy_categorical":
        return _categorical(logits)
    if spec.score == "max_prob":
        return (scaled.amax(1) - scaled.logsumexp(1)).exp()
    if spec.score == "energy":
        return torch.sigmoid(-spec.temperature * scaled.logsumexp(1))
    assert signal is not None
    if spec.score == "uncertainty":
        return signal
    assert spec.score == "distance_entropy"
    if spec.dr_order == "prob":
        likeliest = logits.sort(dim=1, descending=True, stable=True).indices[:, :2]
        near, far = signal.gather(1, likeliest).unbind(1)
    else:
        near, far = signal.sort(dim=1).values[:, :2].unbind(1)
    largest = torch.maximum(near, far)
    ratio = torch.where(largest == 0, 0.5, (1 + (near - far) / largest) / 2)
    spread = entropy / math.log(classes)
    harmonic = (spec.lam + 1) / (spec.lam / ratio + 1 / spread)  # the paper's form; 0 and infinity sort themselves out
    if spec.lam == 0:  # 0 / 0 where the ratio is 0; the limit is E
        return torch.where((spread == 0) & (ratio == 0), 0.0, spread)
    return torch.where((spread == 0) & (ratio == 0), 0.0, harmonic)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x @ weight.detach().cpu().double().T
    return out if bias is None else out + bias.detach().cpu().double()


def _categorical(logits: Tensor) -> Tensor:
    probs = logits.softmax(1)
    eps = 2.0**-23  # the published code ran in fp32
    nats = -(probs * probs.clamp(eps, 1 - eps).log()).sum(1)
    return nats / math.log(logits.shape[1]) if logits.shape[1] > 1 else torch.full_like(nats, math.inf)


def _choice_gap(logits: Tensor, choices: int) -> Tensor:
    """Smallest difference between neighbours among the ``choices + 1`` largest logits."""
    top = logits.sort(dim=1, descending=True).values[:, : choices + 1]
    if top.shape[1] < 2:
        return torch.full((len(top),), math.inf, dtype=torch.float64)
    return -top.diff(dim=1).amax(1)


def _agreement(logits: Tensor, previous: Tensor, spec: ScoreSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(agrees, distance from a tie, what is remembered) for the patience rules."""
    if spec.score == "confident_patience":
        entropy = _categorical(logits)
        return entropy < spec.tolerance, (entropy - spec.tolerance).abs(), previous
    if logits.shape[1] == 1:
        current = logits[:, 0]
        change = (previous - current).abs()
        return change < spec.tolerance, (change - spec.tolerance).abs(), current
    order = logits.sort(dim=1, descending=True, stable=True)
    current = order.indices[:, 0].double()
    agrees = (current == previous) & ~logits.isnan().any(1)
    return agrees, order.values[:, 0] - order.values[:, 1], current


def decision_margin(plain: Iterable[tuple[ExitDecision, OracleDecision]], rule: ExitRule) -> Margin:
    """max(1e-5, 4 x plain PyTorch's own error), the error measured on decisions of the reference in that dtype."""
    score_error = gap_error = 0.0
    for decision, oracle in plain:
        logits = decision.logits[: len(oracle.logits)].cpu().double()
        if rule.spec.score == "confident_patience":
            gap_error = max(gap_error, _largest(_categorical(logits) - _categorical(oracle.logits)))
        elif oracle.gap.isfinite().any():
            gap_error = max(gap_error, _largest(logits - oracle.logits))
        if not oracle.counts:
            settled = oracle.gap > MARGIN_FACTOR * gap_error
            score = decision.score[: len(oracle.score)].cpu().double()
            score_error = max(score_error, _largest((score - oracle.score)[settled]))
    return Margin(max(SMALLEST_MARGIN, MARGIN_FACTOR * score_error), max(SMALLEST_MARGIN, MARGIN_FACTOR * gap_error))


def _largest(error: Tensor) -> float:
    finite = error.abs()[error.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def assert_same_decisions(
    decision: ExitDecision, oracle: OracleDecision, margin: Margin = SMALLEST, *, final: bool = False
) -> MarginReport:
    """Exits, NaN scores and counters equal the oracle's in every row outside the margin.

    How many lie inside is the caller's to judge over all that it compares: see ``MarginTally``.
    """
    rows = len(oracle.score)
    exits = decision.exits[:rows].cpu()
    score = decision.score[:rows].cpu().double()
    tie = oracle.gap <= margin.gap
    if not oracle.counts:
        tie = tie | ((oracle.score - oracle.threshold).abs() <= margin.score)
    wrong = (exits != oracle.exits) & (~tie if not final else torch.ones_like(tie))
    wrong = wrong | ((score.isnan() != oracle.score.isnan()) & ~tie)
    if oracle.counts:
        assert oracle.counter is not None and oracle.previous is not None
        counter, previous = decision.state["counter"][:rows].cpu(), decision.state["previous"][:rows].cpu().double()
        wrong = wrong | ((counter != oracle.counter) & ~tie) | ((score != counter) & ~score.isnan())
        far = (previous - oracle.previous).abs() > max(margin.gap, 1e-6 * _largest(oracle.previous))
        wrong = wrong | ((far | (previous.isnan() != oracle.previous.isnan())) & ~tie)
    if wrong.any():
        lines = [
            f"  row {row}: exits {bool(exits[row])}, score {score[row]:.9g}; "
            f"oracle exits {bool(oracle.exits[row])}, score {oracle.score[row]:.9g}, "
            f"threshold {oracle.threshold[row]:.9g}, gap {oracle.gap[row]:.3g}"
            for row in wrong.nonzero()[:8, 0].tolist()
        ]
        raise AssertionError(
            f"{int(wrong.sum())} of {rows} rows decided otherwise outside {margin}:\n" + "\n".join(lines)
        )
    return MarginReport(rows, int(tie.sum()))


def live_lengths(batch: RaggedBatch) -> list[int]:
    """How many tokens each live row has, read from the device: ``seqlens`` may be those of an earlier batch."""
    return batch.cu_seqlens.diff()[: int(batch.live[0])].tolist()


def assert_plan(batch: RaggedBatch, decision: ExitDecision) -> None:
    """The plan follows from the decision's own exits: survivors, their cu_seqlens and live; nothing lives past live."""
    exits = decision.exits.tolist()
    assert len(exits) == batch.row_capacity
    lengths = live_lengths(batch)
    rows = len(lengths)
    assert not any(exits[rows:]), "a row past live exits"
    stay = [row for row in range(rows) if not exits[row]]
    bounds = [0]
    for row in stay:
        bounds.append(bounds[-1] + lengths[row])
    padding = batch.row_capacity - len(stay)
    assert decision.survivors.tolist() == stay + [-1] * padding
    assert decision.cu_seqlens.tolist() == bounds + [bounds[-1]] * padding
    assert decision.live.tolist() == [len(stay), bounds[-1]]
    for name, dtype in (("exits", torch.bool), ("survivors", torch.int32), ("cu_seqlens", torch.int32)):
        assert getattr(decision, name).dtype == dtype, name
    assert decision.live.dtype == torch.int32
    assert not decision.logits[rows:].any() and not decision.score[rows:].any()  # NaN is truthy


def assert_compacted(
    batch: RaggedBatch, decision: ExitDecision, compacted: RaggedBatch, token_capacity: int | None = None
) -> None:
    """``compacted`` holds exactly the survivors' tokens and row state, then zeros; bit for bit, NaN equal to NaN."""
    stay = [row for row, left in enumerate(decision.exits.tolist()) if not left and row < int(batch.live[0])]
    bounds = batch.cu_seqlens.tolist()
    lengths = [bounds[row + 1] - bounds[row] for row in stay]
    source = [token for row in stay for token in range(bounds[row], bounds[row + 1])]
    assert compacted.cu_seqlens[: len(stay) + 1].tolist() == [0, *accumulate(lengths)]
    assert not compacted.live_on_host or compacted.seqlens.tolist() == lengths
    assert compacted.live.tolist() == [len(stay), len(source)]
    for name in ("hidden", "input_ids", "token_type_ids", "position_ids"):
        before, after = getattr(batch, name), getattr(compacted, name)
        if before is None:
            assert after is None, name
            continue
        assert len(after) == (len(source) if token_capacity is None else token_capacity), name
        assert_same_values(after[: len(source)], before[source])
        assert not after[len(source) :].any(), f"{name}: tokens past live are not zero"  # NaN is truthy
    rows = {"sample_ids": batch.sample_ids, **batch.state, **decision.state}
    after_rows = {"sample_ids": compacted.sample_ids, **compacted.state}
    assert rows.keys() == after_rows.keys()
    for name, before in rows.items():
        assert_same_values(after_rows[name][: len(stay)], before[stay])
        assert not after_rows[name][len(stay) :].any(), f"{name}: rows past live are not zero"


def assert_same_values(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, apart from the sign of zero; NaN equals NaN; dtypes and shapes equal."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_error_budget(actual: Tensor, plain: Tensor, oracle: Tensor, dtype: torch.dtype) -> None:
    """Error against float64 <= 2 x plain PyTorch's in that dtype, plus half a unit in the last place of the largest.

    The half unit (for fp32 16 units: sums of other orders) keeps a lucky plain result from becoming the budget.
    """
    actual, plain, oracle = actual.cpu().double(), plain.cpu().double(), oracle.double()
    error = _largest(actual - oracle)
    allowed = BUDGET_FACTOR * _largest(plain - oracle)
    units = 16.0 if dtype == torch.float32 else 0.5
    allowed += units * torch.finfo(dtype).eps * max(_largest(oracle), torch.finfo(torch.float32).tiny)
    assert not (actual.isnan() ^ oracle.isnan()).any(), "NaN in other places than the oracle"
    infinite = actual.isinf() | oracle.isinf()
    assert_same_values(actual[infinite], torch.where(oracle.isinf(), oracle, plain)[infinite])  # else it overflows too
    assert error <= allowed, f"error {error:.3g} against float64, budget {allowed:.3g} ({dtype})"


def attention_oracle(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """Attention within each sequence in float64 -> ``[sum of lengths, N, D]``."""
    parts = []
    for queries, keys, values in zip(
        *(x[: sum(lengths)].cpu().double().split(lengths) for x in (q, k, v)), strict=True
    ):
        scores = torch.einsum("snd,tnd->nst", queries, keys) * scale
        weights = (scores - scores.logsumexp(2, keepdim=True)).exp()
        parts.append(torch.einsum("nst,tnd->snd", weights, values))
    return torch.cat(parts)


def quiet_threshold(scores: Tensor, share: float, margin: float = SMALLEST_MARGIN) -> float:
    """A threshold in the widest gap between neighbouring ``scores`` near the quantile ``share`` (0 to 1).

    Where no gap there is wider than two margins, it is a little above all scores.
    """
    ordered = scores[scores.isfinite()].sort().values
    if ordered.numel() == 0:
        return 0.5
    above = float(ordered[-1]) + 2.5 * margin + 0.01
    if ordered.numel() == 1:
        return above
    low = int(max(0.0, share - 0.15) * (len(ordered) - 2))
    high = int(min(1.0, share + 0.15) * (len(ordered) - 2)) + 1
    gaps = ordered.diff()[low:high]
    if float(gaps.max()) <= 2 * margin:
        return above
    place = low + int(gaps.argmax())
    return float((ordered[place] + ordered[place + 1]) / 2)
