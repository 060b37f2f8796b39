"""exit_step and exit_decide as Triton kernels: what is particular to their tiles, tickets and class tiles.

Every rule against float64 in every dtype: tests/ops.
"""

from __future__ import annotations

import pytest
import torch

from ragged_exit.batch import RaggedBatch
from ragged_exit.heads import MlpHead
from ragged_exit.ops import ExitDecision, exit_decide, exit_step
from ragged_exit.ops.triton import plan
from ragged_exit.rules import DistanceEntropy, Energy, Entropy, ExitRule, MaxProb, Patience
from ragged_exit.testing import (
    assert_plan,
    assert_same_decisions,
    decision_margin,
    every_rule,
    random_batch,
    random_head,
    random_lengths,
    random_logits,
    random_state,
    seeded,
    step_oracle,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinity

HIDDEN = 40  # no power of two


def make(
    rule: ExitRule, classes: int, *, rows: int = 21, hidden: int = HIDDEN, seed: int = 0, **options
) -> tuple[RaggedBatch, MlpHead]:
    generator = seeded(seed)
    dtype = options.pop("dtype", torch.float32)
    batch = random_batch(
        random_lengths(rows, 5, generator), hidden, generator, dtype=dtype, spare_rows=2, spare_tokens=4
    )
    needs = {"uncertainty": rule.needs == "uncertainty", "prototype_size": 33 if rule.needs == "prototypes" else None}
    head = random_head(hidden, classes, generator, dtype=dtype, **needs, **options)
    batch.state = random_state(rule, batch.row_capacity, classes, generator)
    return batch, head


def check(batch: RaggedBatch, head: MlpHead, rule: ExitRule) -> ExitDecision:
    oracle = step_oracle(batch, head, rule)
    margin = decision_margin([(exit_step(batch, head, rule, impl="reference"), oracle)], rule)
    decision = exit_step(batch, head, rule, impl="triton")
    assert_same_decisions(decision, oracle, margin)
    assert_plan(batch, decision)
    return decision


def bits(decision: ExitDecision) -> list[bytes]:
    return [value.numpy().tobytes() for value in (*decision[:-1], *decision.state.values())]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("rule", every_rule(), ids=repr)
def test_rules(rule, pooling):
    batch, head = make(rule, 3, pooling=pooling, pooled_size=24)
    check(batch, head, rule)


@pytest.mark.parametrize("classes", [1, 2, 1024, 1025])
@pytest.mark.parametrize("pooled_size", [None, 70], ids=["no-pooler", "pooler"])  # 70: two tiles, the second ragged
def test_class_counts(classes, pooled_size):
    rules = (Patience(2, tolerance=0.5), MaxProb(0.5)) if classes == 1 else (Entropy(0.5), DistanceEntropy(0.4))
    for rule in rules:
        batch, head = make(rule, classes, pooled_size=pooled_size)
        check(batch, head, rule)


def test_fifty_thousand_classes():
    rule = DistanceEntropy(0.4)
    batch, head = make(rule, 50_000, rows=3, hidden=16)
    check(batch, head, rule)


@pytest.mark.parametrize("rule", [Entropy(0.5), Energy(0.5), DistanceEntropy(0.5)], ids=repr)
def test_thresholds_per_row(rule):
    batch, head = make(rule, 3)
    scores = exit_step(batch, head, rule, impl="triton").score
    side = torch.tensor([0.01, -0.01]).repeat(batch.row_capacity)[: batch.row_capacity]
    batch.state["threshold"] = scores + side
    decision = check(batch, head, rule)
    assert decision.exits.tolist() == [side[row] > 0 and row < batch.rows for row in range(batch.row_capacity)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [3, 1024, 1025])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_batch_invariance(dtype, classes, pooling):
    """A row alone has the bits that it has among 21, wherever it stands."""
    rule = Entropy(0.5)
    batch, head = make(rule, classes, pooling=pooling, dtype=dtype, pooled_size=70)
    together = exit_step(batch, head, rule, impl="triton")
    hidden, bounds = batch.hidden, batch.cu_seqlens.tolist()
    for row in (0, 7, 20):
        tokens = hidden[bounds[row] : bounds[row + 1]]
        alone = exit_step(
            RaggedBatch.from_seqlens(batch.seqlens[row : row + 1], hidden=tokens), head, rule, impl="triton"
        )
        for name in ("logits", "score"):
            assert getattr(alone, name)[0].numpy().tobytes() == getattr(together, name)[row].numpy().tobytes(), name


def test_tickets_are_back_at_zero():
    """The same buffer serves call after call: the last program of each puts it back."""
    rule = DistanceEntropy(0.5)
    batch, head = make(rule, 3, rows=50)
    first = exit_step(batch, head, rule, impl="triton")
    tickets = plan.tickets(1, batch.device)
    assert not tickets.any()
    for _ in range(3):
        assert bits(exit_step(batch, head, rule, impl="triton")) == bits(first)
        assert not tickets.any()
    assert plan.tickets(1, batch.device) is tickets


def test_captured_calls_have_tickets_of_their_own(monkeypatch):
    """Slices of what was zeroed before the capture, none handed out twice, each aligned as an allocation is."""
    arena = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setitem(plan._arenas, arena.device, arena)
    taken = [plan._captured_tickets(count, arena.device) for count in (5, 17, 1)]
    assert [part.numel() >= count for part, count in zip(taken, (5, 17, 1), strict=True)] == [True] * 3
    assert all((part.data_ptr() - arena.data_ptr()) % 16 == 0 for part in taken)
    for part in taken:
        part += 1
    assert int(arena.max()) == 1
    used_up = plan._captured_tickets(50, arena.device)
    assert used_up.numel() >= 50 and not used_up.any()


def test_scan_over_several_blocks():
    """More rows than one block of the prefix scan (1,024), and a chain of survivors across its edge."""
    generator = seeded(3)
    seqlens = torch.tensor(random_lengths(2050, 9, generator))
    batch = RaggedBatch.from_seqlens(seqlens)
    logits = random_logits(2050, 2, generator)
    median = exit_decide(batch, logits, Entropy(0.0), impl="reference").score.median().item()
    for threshold, share in ((-1.0, 0.0), (median, 0.5), (10.0, 1.0)):
        decision = exit_decide(batch, logits, Entropy(threshold), impl="triton")
        assert_plan(batch, decision)
        assert decision.exits.float().mean().item() == pytest.approx(share, abs=0.01)


def test_nobody_lives():
    """A capture may run on after the last row has left."""
    rule = Entropy(0.5)
    batch, head = make(rule, 3)
    batch.live.zero_()
    batch.cu_seqlens.zero_()
    decision = exit_step(batch, head, rule, impl="triton")
    assert not decision.exits.any() and not decision.score.any() and not decision.logits.any()
    assert decision.survivors.eq(-1).all() and not decision.cu_seqlens.any() and not decision.live.any()
