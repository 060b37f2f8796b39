"""Drawn rules and batches for the exit ops, and the one check that every drawn case goes through."""

from __future__ import annotations

import dataclasses
import os
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from ragged_exit.batch import RaggedBatch
from ragged_exit.heads import MlpHead
from ragged_exit.ops import ExitDecision, exit_decide, exit_step
from ragged_exit.ops.exit_step import packed_for
from ragged_exit.rules import (
    COMPARISONS,
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
from ragged_exit.testing import (
    MarginReport,
    OracleDecision,
    assert_plan,
    assert_same_decisions,
    decide_oracle,
    decision_margin,
    quiet_threshold,
    random_batch,
    random_distances,
    random_head,
    random_lengths,
    random_logits,
    random_state,
    seeded,
    step_oracle,
)

INTERPRETED = "triton" in os.environ.get("RAGGED_EXIT_TEST_IMPL", "") and os.environ.get("TRITON_INTERPRET") == "1"
MOST_ROWS = 9 if INTERPRETED else 40
MOST_HIDDEN = 70 if INTERPRETED else 200
CLASSES = (2, 3, 5, 17, 130) if INTERPRETED else (2, 3, 5, 17, 130, 1025, 2100)

seeds = st.integers(0, 2**32 - 1)
lengths_lists = st.lists(st.integers(1, 24), min_size=1, max_size=MOST_ROWS)


def has_ties(rule: ExitRule, dtype: torch.dtype) -> bool:
    """Does the rule choose the largest logit, in low precision? Its ties are in the logits, not near a threshold."""
    chooses = isinstance(rule, Patience) or (rule.spec.dr_order == "prob" and rule.needs == "prototypes")
    return chooses and dtype != torch.float32


@st.composite
def rules(draw: st.DrawFn, classes: int) -> ExitRule:
    """Any rule that makes sense for so many classes; its threshold is still to be set."""
    compare = draw(st.sampled_from(COMPARISONS))
    temperature = draw(st.sampled_from((0.5, 1.0, 2.5)))
    kinds = ["max_prob", "energy", "uncertainty", "patience", "exact"]
    if classes > 1:
        kinds += ["entropy", "entropy", "distance", "confident"]
    kind = draw(st.sampled_from(kinds))
    if kind == "exact":
        return Entropy(0.5, compare=compare)
    if kind == "entropy":
        return Entropy(0.5, dialect=draw(st.sampled_from(ENTROPY_DIALECTS)), compare=compare)
    if kind == "max_prob":
        return MaxProb(0.5, temperature=temperature, compare=compare)
    if kind == "energy":
        return Energy(0.5, temperature=temperature, compare=compare)
    if kind == "uncertainty":
        return LearnedUncertainty(0.5, compare=compare)
    if kind == "distance":
        lam = draw(st.sampled_from((0.0, 0.3, 1.0, 7.0)))
        return DistanceEntropy(0.5, lam=lam, dr_order=draw(st.sampled_from(("prob", "distance"))), compare=compare)
    if kind == "confident":
        return ConfidentPatience(draw(st.integers(0, 4)), tolerance=draw(st.sampled_from((0.05, 0.3, 0.7))))
    return Patience(draw(st.integers(0, 4)), tolerance=draw(st.sampled_from((0.0, 0.1, 0.8))))


def with_threshold(
    rule: ExitRule, batch: RaggedBatch, oracle: OracleDecision, how: str, exit_index: int, margin: float
) -> ExitRule:
    """``rule`` with a threshold where the oracle's scores make it decide something.

    how: "quiet" (one number in a gap of the scores), "per_exit" (the same, among thresholds that would exit nobody),
    "per_row" (on ``batch``: 2.5 margins above or below each row's score in turn), "all" or "none" exit.
    """
    if oracle.counts:
        return rule
    none = -10.0 if rule.compare.startswith("<") else 1e6
    quiet = quiet_threshold(oracle.score, 0.5, margin)
    if how == "per_row":
        side = 2.5 * margin * torch.tensor([1.0, -1.0]).repeat(batch.rows // 2 + 1)[: batch.rows]
        rows = torch.zeros(batch.row_capacity)
        rows[: batch.rows] = oracle.score.nan_to_num().float() + side
        batch.state["threshold"] = rows.to(batch.device)
        return rule
    threshold: object = {"quiet": quiet, "all": -none if none < 0 else -10.0, "none": none}.get(how)
    if how == "per_exit":
        thresholds = [none] * 4
        thresholds[exit_index] = quiet
        threshold = tuple(thresholds)
    return dataclasses.replace(rule, threshold=threshold)


def widths(most: int) -> st.SearchStrategy[int]:
    """Any up to ``most``, and those that fit matrix tiles."""
    return st.one_of(st.integers(1, most), st.integers(1, most // 32).map(lambda blocks: 32 * blocks))


class StepCase(NamedTuple):
    batch: RaggedBatch
    head: MlpHead
    packed: bool  # the pooler, where the implementation has a layout of its own
    rule: ExitRule
    final: bool
    exit_index: int
    how: str
    more: RaggedBatch  # rows of the same kind, to measure plain PyTorch's error on


@st.composite
def step_cases(draw: st.DrawFn, dtype: torch.dtype, device: str) -> StepCase:
    generator = seeded(draw(seeds))
    classes = draw(st.one_of(st.just(1), st.sampled_from(CLASSES)))
    hidden_size = draw(widths(33 if classes > 200 else MOST_HIDDEN))
    rule = draw(rules(classes))
    head = random_head(
        hidden_size,
        classes,
        generator,
        pooling=draw(st.sampled_from(("cls", "mean"))),
        pooled_size=draw(st.one_of(st.none(), widths(33 if classes > 200 else MOST_HIDDEN))),
        bias=draw(st.booleans()),
        uncertainty=rule.needs == "uncertainty",
        prototype_size=draw(st.integers(2, 40)) if rule.needs == "prototypes" else None,
        dtype=dtype,
        device=device,
    )
    spare_rows = draw(st.sampled_from((0, 0, 1, 7)))
    batch = random_batch(
        draw(lengths_lists),
        hidden_size,
        generator,
        dtype=dtype,
        device=device,
        spare_rows=spare_rows,
        spare_tokens=draw(st.sampled_from((0, 0, 3, 33))) + spare_rows,
    )
    more = random_batch(random_lengths(64, 3, generator), hidden_size, generator, dtype=dtype, device=device)
    for some in (batch, more):
        some.state = random_state(rule, some.row_capacity, classes, generator, device=device)
    return StepCase(
        batch,
        head,
        draw(st.booleans()),
        rule,
        draw(st.sampled_from((False, False, False, True))),
        draw(st.integers(0, 3)),
        draw(st.sampled_from(("quiet", "quiet", "per_row", "per_exit", "all", "none"))),
        more,
    )


def check_step(case: StepCase, impl: str) -> tuple[MarginReport, ExitDecision, OracleDecision]:
    """One exit step of ``impl`` decides as the oracle outside the margin, and its plan follows from its exits."""
    batch, head, packed, rule, final, exit_index, how, more = case
    first = step_oracle(batch, head, rule, exit_index=exit_index)
    plain = [(exit_step(some, head, rule, impl="reference"), step_oracle(some, head, rule)) for some in (batch, more)]
    margin = decision_margin(plain, rule)
    rule = with_threshold(rule, batch, first, how, exit_index, margin.score)
    oracle = step_oracle(batch, head, rule, final, exit_index=exit_index)
    ours = packed_for(impl, head) if packed else head
    decision = exit_step(batch, ours, rule, final, exit_index=exit_index, impl=impl)
    report = assert_same_decisions(decision, oracle, margin, final=final)
    assert_plan(batch, decision)
    return report, decision, oracle


class DecideCase(NamedTuple):
    batch: RaggedBatch
    logits: Tensor
    signal: Tensor | None
    rule: ExitRule
    final: bool
    exit_index: int
    how: str


@st.composite
def decide_cases(draw: st.DrawFn, dtype: torch.dtype, device: str) -> DecideCase:
    generator = seeded(draw(seeds))
    classes = draw(st.one_of(st.just(1), st.sampled_from(CLASSES)))
    rule = draw(rules(classes))
    spare = draw(st.sampled_from((0, 0, 1, 7)))
    batch = random_batch(draw(lengths_lists), 1, generator, device=device, spare_rows=spare, spare_tokens=spare)
    rows = batch.row_capacity
    batch.state = random_state(rule, rows, classes, generator, device=device)
    signal = None
    if rule.needs == "uncertainty":
        signal = torch.rand(rows, generator=generator).to(device)
    elif rule.needs == "prototypes":
        signal = random_distances(rows, classes, generator, device=device)
    return DecideCase(
        batch,
        random_logits(rows, classes, generator, dtype=dtype, device=device),
        signal,
        rule,
        draw(st.sampled_from((False, False, False, True))),
        draw(st.integers(0, 3)),
        draw(st.sampled_from(("quiet", "quiet", "per_row", "per_exit", "all", "none"))),
    )


def check_decide(case: DecideCase, impl: str) -> tuple[MarginReport, ExitDecision, OracleDecision]:
    """The same for exit_decide."""
    batch, logits, signal, rule, final, exit_index, how = case
    first = decide_oracle(batch, logits, rule, signal=signal, exit_index=exit_index)
    plain = exit_decide(batch, logits, rule, signal=signal, impl="reference")
    margin = decision_margin([(plain, first)], rule)
    rule = with_threshold(rule, batch, first, how, exit_index, margin.score)
    oracle = decide_oracle(batch, logits, rule, final, signal=signal, exit_index=exit_index)
    decision = exit_decide(batch, logits, rule, final, signal=signal, exit_index=exit_index, impl=impl)
    report = assert_same_decisions(decision, oracle, margin, final=final)
    assert_plan(batch, decision)
    return report, decision, oracle


def decide(logits: list[list[float]] | Tensor, rule: ExitRule, impl: str, device: str, **kwargs) -> ExitDecision:
    """exit_decide on a batch with one token a row."""
    logits = torch.as_tensor(logits, device=device)
    batch = RaggedBatch.from_seqlens(torch.ones(len(logits), dtype=torch.int32), device)
    batch.state = kwargs.pop("state", {})
    return exit_decide(batch, logits, rule, kwargs.pop("final", False), impl=impl, **kwargs)


def state_of(counter: list[int], previous: list[float], device: str) -> dict[str, Tensor]:
    return {
        "counter": torch.tensor(counter, dtype=torch.int32, device=device),
        "previous": torch.tensor(previous, dtype=torch.float32, device=device),
    }
