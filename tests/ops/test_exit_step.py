"""exit_step against the float64 oracle: drawn shapes, all rules, bad rows, odd memory, capacity, batch invariance.

Tolerances (ragged_exit.testing.compare): decisions agree outside max(1e-5, 4 x plain PyTorch's own error); values are
within 2 x plain PyTorch's error in the same dtype.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import INTERPRETED, check_step, has_ties, step_cases

from ragged_exit.batch import RaggedBatch
from ragged_exit.heads import MlpHead
from ragged_exit.ops import ExitDecision, exit_decide, exit_step
from ragged_exit.ops.exit_step import packed_for
from ragged_exit.ops.reference.exit import mean_rows
from ragged_exit.rules import (
    COMPARISONS,
    DistanceEntropy,
    Entropy,
    ExitRule,
    LearnedUncertainty,
    MaxProb,
    Patience,
)
from ragged_exit.testing import (
    ENOUGH_ROWS,
    MarginTally,
    assert_error_budget,
    assert_plan,
    assert_same_decisions,
    assert_same_values,
    decision_margin,
    every_rule,
    random_batch,
    random_head,
    random_lengths,
    random_state,
    seeded,
    step_oracle,
)

TALLY = MarginTally()
RULES = every_rule()
# of hidden and pooled rows: odd ones, and those that fit matrix tiles
WIDTHS = [(65, None), (65, 45), (64, 32)] if INTERPRETED else [(129, None), (129, 45), (128, 96), (768, 768)]


def full_head(hidden_size: int, classes: int, seed: int, **kwargs) -> MlpHead:
    """A head that serves every rule."""
    return random_head(hidden_size, classes, seeded(seed), uncertainty=True, prototype_size=6, **kwargs)


def batch_for(rule: ExitRule, lengths: list[int], hidden_size: int, classes: int, seed: int, **kwargs) -> RaggedBatch:
    generator = seeded(seed)
    batch = random_batch(lengths, hidden_size, generator, **kwargs)
    device = kwargs.get("device", "cpu")
    batch.state = random_state(rule, batch.row_capacity, classes, generator, device=device)
    return batch


def name(rule: ExitRule) -> str:
    return rule.spec.score + (f"_{rule.dr_order}" if isinstance(rule, DistanceEntropy) else "")


def rows_of(decision: ExitDecision, rows: list[int] | slice) -> list[torch.Tensor]:
    """What a decision says of these rows alone."""
    values = [decision.logits, decision.score, decision.exits, *decision.state.values()]
    return [value[rows] for value in values]


@given(data=st.data())
def test_decides_as_the_oracle(impl, dtype, device, data):
    case = data.draw(step_cases(dtype, device))
    report, decision, oracle = check_step(case, impl)
    if not has_ties(case.rule, dtype):
        TALLY.add(report)
    assert decision.logits.dtype == decision.score.dtype == torch.float32
    assert bool(decision.exits[: case.batch.rows].all()) or not case.final
    if case.how == "none" and not oracle.counts and not case.final:
        assert not decision.exits.any()


def test_rows_inside_the_margin():
    if TALLY.rows < ENOUGH_ROWS:
        pytest.skip(f"{TALLY}: too few to mean anything")
    TALLY.check()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("hidden_size, pooled_size", WIDTHS)
def test_error_budget(impl, dtype, device, pooling, hidden_size, pooled_size):
    """Logits, uncertainty and EDR are at most twice as far from float64 as plain PyTorch in the same dtype."""
    generator = seeded(7)
    rows = 24 if INTERPRETED else 128
    head = random_head(
        hidden_size,
        7,
        generator,
        pooling=pooling,
        pooled_size=pooled_size,
        uncertainty=True,
        prototype_size=31,
        dtype=dtype,
        device=device,
    )
    lengths = random_lengths(rows, 40, generator)
    batch = random_batch(lengths, hidden_size, generator, dtype=dtype, device=device)
    for rule in (Entropy(0.4), LearnedUncertainty(0.4), DistanceEntropy(0.4, dr_order="distance"), MaxProb(0.5)):
        oracle = step_oracle(batch, head, rule)
        plain = exit_step(batch, head, rule, impl="reference")
        actual = exit_step(batch, packed_for(impl, head), rule, impl=impl)
        assert_error_budget(actual.logits, plain.logits, oracle.logits, dtype)
        assert_error_budget(actual.score, plain.score, oracle.score, dtype)


@pytest.mark.parametrize("classes", [1, 1024, 1025, 3001, 50_000])
def test_many_classes(impl, dtype, device, classes):
    generator = seeded(classes)
    head = full_head(9, classes, classes, dtype=dtype, device=device, gain=3.0)
    more = random_batch([1] * 24, 9, generator, dtype=dtype, device=device)
    rules = [Entropy(0.5), MaxProb(0.02), Patience(2)][: 1 if INTERPRETED and classes > 10_000 else 3]
    if classes in (1024, 1025):  # to either side of where another kernel takes over
        rules += [LearnedUncertainty(0.5), DistanceEntropy(0.5, dr_order="distance")]
    for rule in rules:
        batch = random_batch([1, 4, 2], 9, generator, dtype=dtype, device=device)
        for some in (batch, more):
            some.state = random_state(rule, some.rows, classes, generator, device=device)
        oracle = step_oracle(batch, head, rule)
        plain = exit_step(batch, head, rule, impl="reference")
        margin = decision_margin(
            [(plain, oracle), (exit_step(more, head, rule, impl="reference"), step_oracle(more, head, rule))], rule
        )
        decision = exit_step(batch, head, rule, impl=impl)
        assert_same_decisions(decision, oracle, margin)
        assert_plan(batch, decision)
        assert_error_budget(decision.logits, plain.logits, oracle.logits, dtype)
        if not oracle.counts:
            assert_error_budget(decision.score, plain.score, oracle.score, dtype)


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_everyone_and_no_one(impl, device, rule):
    """Thresholds that nobody or everybody passes, and the last layer: the plan's two extremes."""
    head = full_head(12, 3, 1, device=device)
    batch = batch_for(rule, [3, 1, 5, 2], 12, 3, 2, device=device, spare_rows=2, spare_tokens=5)
    if name(rule).endswith("patience"):
        nobody, everybody = rule.__class__(0), rule.__class__(1, tolerance=math.inf)
        batch.state["previous"] = step_oracle(batch, head, rule).logits.argmax(1).float().to(device)
        batch.state["previous"] = torch.cat((batch.state["previous"], torch.zeros(2, device=device)))
    else:
        low, high = dataclasses.replace(rule, threshold=-1.0), dataclasses.replace(rule, threshold=99.0)
        nobody, everybody = (low, high) if rule.compare == "<" else (high, low)
    stays = exit_step(batch, head, nobody, impl=impl)
    assert stays.survivors.tolist() == [0, 1, 2, 3, -1, -1]
    assert stays.cu_seqlens.tolist() == [0, 3, 4, 9, 11, 11, 11] and stays.live.tolist() == [4, 11]
    for decision in (exit_step(batch, head, everybody, impl=impl), exit_step(batch, head, nobody, True, impl=impl)):
        assert decision.exits.tolist() == [True] * 4 + [False] * 2
        assert decision.survivors.tolist() == [-1] * 6
        assert decision.cu_seqlens.tolist() == [0] * 7 and decision.live.tolist() == [0, 0]


def test_one_row_of_one_token(impl, dtype, device):
    head = full_head(5, 2, 3, dtype=dtype, device=device)
    batch = random_batch([1], 5, seeded(4), dtype=dtype, device=device)
    left = exit_step(batch, head, Entropy(99.0), impl=impl)
    stays = exit_step(batch, head, Entropy(-1.0), impl=impl)
    assert left.exits.tolist() == [True] and left.survivors.tolist() == [-1] and left.live.tolist() == [0, 0]
    assert stays.exits.tolist() == [False] and stays.survivors.tolist() == [0] and stays.live.tolist() == [1, 1]
    assert_same_values(left.logits, stays.logits)


def test_thresholds_per_exit_and_per_row(impl, device):
    head = full_head(12, 3, 5, device=device)
    batch = random_batch([2, 3, 1, 4], 12, seeded(6), device=device)
    rule = Entropy((-1.0, 99.0, -1.0))
    exits = [exit_step(batch, head, rule, exit_index=index, impl=impl).exits.tolist() for index in range(3)]
    assert exits == [[False] * 4, [True] * 4, [False] * 4]
    batch.state["threshold"] = torch.tensor([99.0, -1.0, 99.0, -1.0], device=device)
    decision = exit_step(batch, head, rule, exit_index=0, impl=impl)  # the batch's own thresholds win
    assert decision.exits.tolist() == [True, False, True, False]
    assert decision.survivors.tolist() == [1, 3, -1, -1]
    assert decision.cu_seqlens.tolist() == [0, 3, 7, 7, 7] and decision.live.tolist() == [2, 7]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    ("rule", "compare"),
    [
        pytest.param(rule, compare, id=f"{name(rule)}-{compare}")
        for rule in RULES
        for compare in (COMPARISONS if not name(rule).endswith("patience") else (">=",))
    ],
)
def test_nan_never_exits_early(impl, device, rule, compare, pooling):
    """One NaN in a row's hidden state: it stays at every threshold, others do not notice, and all leave at the end."""
    if name(rule).endswith("patience"):
        low, high = rule.__class__(1, tolerance=math.inf), rule.__class__(3, tolerance=math.inf)
    else:
        low = dataclasses.replace(rule, threshold=-5.0, compare=compare)
        high = dataclasses.replace(rule, threshold=99.0, compare=compare)
    head = full_head(12, 3, 8, pooled_size=10, pooling=pooling, device=device)
    clean = batch_for(rule, [3, 4, 2, 3], 12, 3, 9, device=device)
    broken = clean.with_hidden(clean.hidden.clone())
    broken.hidden[3, 5] = math.nan  # the [CLS] token of row 1
    for some in (low, high):
        before, after = (exit_step(batch, head, some, impl=impl) for batch in (clean, broken))
        assert not after.exits[1]
        assert after.logits[1].isnan().all()
        if after.state:
            assert after.state["counter"][1] == 0 and after.state["previous"][1].isnan() and after.score[1] == 0
        else:
            assert after.score[1].isnan()
        for a, b in zip(rows_of(before, [0, 2, 3]), rows_of(after, [0, 2, 3]), strict=True):
            assert_same_values(a, b)
        assert_plan(broken, after)
        assert exit_step(broken, head, some, final=True, impl=impl).exits.all()


def test_nan_beside_the_cls_token(impl, dtype, device):
    """A token that is not [CLS] is nobody's business under cls pooling, and all of its row's under mean pooling."""
    clean = random_batch([3, 4, 2], 12, seeded(10), dtype=dtype, device=device)
    broken = clean.with_hidden(clean.hidden.clone())
    broken.hidden[5, 0] = math.nan
    for pooling, hit in (("cls", []), ("mean", [1])):
        head = full_head(12, 3, 11, pooling=pooling, dtype=dtype, device=device)
        before, after = (exit_step(batch, head, Entropy(0.4), impl=impl) for batch in (clean, broken))
        assert after.score.isnan().nonzero()[:, 0].tolist() == hit
        keep = [row for row in range(3) if row not in hit]
        for a, b in zip(rows_of(before, keep), rows_of(after, keep), strict=True):
            assert_same_values(a, b)


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_infinite_hidden_states(impl, device, rule):
    """Infinities decide as plain PyTorch does with them, in fp32, and stay in their row."""
    head = full_head(12, 3, 12, device=device)
    clean = batch_for(rule, [3, 4, 2, 3], 12, 3, 13, device=device)
    broken = clean.with_hidden(clean.hidden.clone())
    broken.hidden[3, 5] = math.inf
    broken.hidden[7, 5], broken.hidden[7, 6] = math.inf, -math.inf
    before, after = (exit_step(batch, head, rule, impl=impl) for batch in (clean, broken))
    plain = exit_step(broken, head, rule, impl="reference")
    assert after.exits[1:3].tolist() == plain.exits[1:3].tolist()
    assert_same_values(after.score[1:3].isnan(), plain.score[1:3].isnan())
    for a, b in zip(rows_of(before, [0, 3]), rows_of(after, [0, 3]), strict=True):
        assert_same_values(a, b)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_odd_memory(impl, dtype, device, pooling):
    """Strided, transposed and misaligned inputs give the values of contiguous ones, bit for bit."""
    batch = random_batch([3, 1, 5, 2], 13, seeded(14), dtype=dtype, device=device)
    head = full_head(13, 3, 15, pooled_size=11, pooling=pooling, dtype=dtype, device=device)
    wide = torch.full((11, 20), math.nan, dtype=dtype, device=device)
    wide[:, 3:16] = batch.hidden
    shifted = torch.empty(11 * 13 + 1, dtype=dtype, device=device)
    shifted[1:] = batch.hidden.reshape(-1)
    hiddens = [wide[:, 3:16], batch.hidden.T.contiguous().T, shifted[1:].view(11, 13)]
    strided = {
        item.name: value.T.contiguous().T if value.ndim == 2 else value.repeat_interleave(2)[::2]
        for item in dataclasses.fields(head)
        if isinstance(value := getattr(head, item.name), torch.Tensor)
    }
    for rule in (Entropy(0.4), LearnedUncertainty(0.4), DistanceEntropy(0.4)):
        expected = exit_step(batch, head, rule, impl=impl)
        for hidden in hiddens:
            for a, b in zip(expected[:6], exit_step(batch.with_hidden(hidden), head, rule, impl=impl)[:6], strict=True):
                assert_same_values(b, a)
        actual = exit_step(batch, dataclasses.replace(head, **strided), rule, impl=impl)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5 if impl == "reference" else 0)
        assert actual.exits.tolist() == expected.exits.tolist()


def test_strided_row_state(impl, device):
    batch = random_batch([3, 1, 5, 2], 13, seeded(16), device=device)
    head = full_head(13, 3, 17, device=device)
    counter = torch.tensor([0, 7, 1, 7, 2, 7, 3, 7], dtype=torch.int32, device=device)[::2]
    previous = torch.tensor([0.0, 9, 1, 9, 2, 9, 0, 9], device=device)[::2]
    batch.state = {"counter": counter, "previous": previous}
    actual = exit_step(batch, head, Patience(2), impl=impl)
    batch.state = {"counter": counter.contiguous(), "previous": previous.contiguous()}
    expected = exit_step(batch, head, Patience(2), impl=impl)
    assert actual.exits.tolist() == expected.exits.tolist()
    for key in expected.state:
        assert_same_values(actual.state[key], expected.state[key])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("tail", [0.0, math.nan])
def test_capacity_beyond_live(impl, dtype, device, pooling, tail):
    """Spare rows and tokens change nothing, whatever stands in them."""
    head = full_head(12, 3, 18, pooling=pooling, dtype=dtype, device=device)
    kwargs = {"dtype": dtype, "device": device}
    exact = random_batch([3, 1, 5, 2], 12, seeded(19), **kwargs)
    spare = random_batch([3, 1, 5, 2], 12, seeded(19), **kwargs, spare_rows=5, spare_tokens=21, tail=tail)
    for rule in (Entropy(0.5), Patience(2)):
        spare.state = random_state(rule, spare.row_capacity, 3, seeded(20), device=device)
        exact.state = {key: value[:4] for key, value in spare.state.items()}
        expected, actual = (exit_step(batch, head, rule, impl=impl) for batch in (exact, spare))
        for a, b in zip(rows_of(actual, slice(0, 4)), rows_of(expected, slice(0, 4)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0.05 if impl == "reference" else 0)  # F.linear, see below
        assert_plan(spare, actual)


def test_batch_invariance(impl, dtype, device):
    """A row's logits and score do not depend on its neighbours or its place, bit for bit (kernels only)."""
    if impl == "reference":
        pytest.skip("F.linear picks other kernels for other row counts: the reference makes no such promise")
    generator = seeded(21)
    rows = 11 if INTERPRETED else 70
    for pooling, pooled_size, classes in (("cls", 33, 3), ("mean", None, 3), ("cls", 20, 130)):
        head = random_head(
            37,
            classes,
            generator,
            pooling=pooling,
            pooled_size=pooled_size,
            uncertainty=True,
            prototype_size=5,
            dtype=dtype,
            device=device,
        )
        lengths = random_lengths(rows, 20, generator)
        batch = random_batch(lengths, 37, generator, dtype=dtype, device=device)
        pieces = list(batch.hidden.split(lengths))
        order = torch.randperm(rows, generator=generator).tolist()
        for rule in (Entropy(0.4), LearnedUncertainty(0.4), DistanceEntropy(0.4)):
            together = exit_step(batch, head, rule, impl=impl)
            for some in (order, order[:2], order[:1], order[:7]):
                hidden = torch.cat([pieces[row] for row in some])
                part = RaggedBatch.from_seqlens(batch.seqlens[some], device, hidden=hidden)
                alone = exit_step(part, head, rule, impl=impl)
                assert_same_values(alone.logits, together.logits[some])
                assert_same_values(alone.score, together.score[some])


def test_inputs_are_left_alone_and_never_returned(impl, device):
    rule = Patience(2)
    head = full_head(12, 3, 22, device=device)
    batch = batch_for(rule, [3, 1, 5], 12, 3, 23, device=device)
    inputs = [batch.hidden, batch.cu_seqlens, batch.live, *batch.state.values()]
    copies = [value.clone() for value in inputs]
    decision = exit_step(batch, head, rule, impl=impl)
    for value, copy in zip(inputs, copies, strict=True):
        assert_same_values(value, copy)
    outputs = [*decision[:6], *decision.state.values()]
    storages = [value.untyped_storage().data_ptr() for value in [*inputs, *outputs]]
    assert len(set(storages)) == len(storages)


def test_the_reference_agrees_with_the_oracle_in_float64():
    """Two texts of one specification: 1e-9 apart in float64, for every rule."""
    generator = seeded(24)
    for pooling in ("cls", "mean"):
        for pooled_size in (None, 21):
            head = random_head(
                30,
                4,
                generator,
                pooling=pooling,
                pooled_size=pooled_size,
                uncertainty=True,
                prototype_size=9,
                dtype=torch.float64,
            )
            batch = random_batch(random_lengths(50, 9, generator), 30, generator, dtype=torch.float64)
            for rule in RULES:
                batch.state = random_state(rule, 50, 4, generator)
                oracle, reference = step_oracle(batch, head, rule), exit_step(batch, head, rule, impl="reference")
                torch.testing.assert_close(reference.logits, oracle.logits, rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(reference.score, oracle.score, rtol=1e-9, atol=1e-9)
                assert reference.exits.tolist() == oracle.exits.tolist()


def test_zero_vectors_are_at_distance_one(impl, device):
    """A zero projection, or a zero prototype, has cosine distance 1: then DR = 1/2 and EDR follows from E alone."""
    head = random_head(6, 2, seeded(25), prototype_size=4, bias=False, device=device)
    batch = random_batch([2, 3], 6, seeded(26), device=device)
    batch.hidden[0] = 0  # row 0: logits 0, so E = 1; projection 0, so r1 = r2 = 1
    zeroed = dataclasses.replace(head, prototypes=torch.zeros_like(head.prototypes))
    rule = DistanceEntropy(0.5)
    entropy = exit_step(batch, zeroed, Entropy(0.5, dialect="normalised"), impl="reference").score
    expected = 2 * 0.5 * entropy / (entropy + 0.5)
    assert float(expected[0]) == pytest.approx(2 / 3, abs=1e-6)
    score = exit_step(batch, zeroed, rule, impl=impl).score
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-6)
    assert float(exit_step(batch, head, rule, impl=impl).score[0]) == pytest.approx(2 / 3, abs=1e-6)
    prototypes = head.prototypes.clone()
    prototypes[0] = 0  # now the two distances of row 1 differ, so that 1 is told from any other constant
    half = dataclasses.replace(head, prototypes=prototypes)
    score, oracle = exit_step(batch, half, rule, impl=impl).score.cpu().double(), step_oracle(batch, half, rule)
    torch.testing.assert_close(score, oracle.score, rtol=0, atol=1e-5)


def test_errors_name_the_argument(impl, device):
    head = random_head(12, 3, seeded(27), device=device)
    batch = random_batch([2, 3], 12, seeded(28), device=device)
    entropy = Entropy(0.4)
    with pytest.raises(ValueError, match="batch: expected hidden states"):
        exit_step(RaggedBatch.from_seqlens(torch.tensor([1]), device), head, entropy, impl=impl)
    nothing = torch.zeros(3, dtype=torch.int32, device=device)
    empty = dataclasses.replace(batch, cu_seqlens=nothing[:1], live=nothing[:2], sample_ids=batch.sample_ids[:0])
    with pytest.raises(ValueError, match="batch: expected at least one row, got none"):
        exit_step(empty, head, entropy, impl=impl)
    with pytest.raises(ValueError, match="batch: expected at least one row, got none"):
        exit_decide(empty, torch.zeros(0, 3, device=device), entropy, impl=impl)
    with pytest.raises(ValueError, match=r"head: expected hidden size 12, got 11"):
        exit_step(batch, random_head(11, 3, seeded(1), device=device), entropy, impl=impl)
    with pytest.raises(TypeError, match="head: expected the dtype of hidden"):
        exit_step(batch, head.to(torch.bfloat16, torch.device(device)), entropy, impl=impl)
    with pytest.raises(ValueError, match="needs a head with uncertainty"):
        exit_step(batch, head, LearnedUncertainty(0.4), impl=impl)
    with pytest.raises(ValueError, match="needs a head with prototypes"):
        exit_step(batch, head, DistanceEntropy(0.4), impl=impl)
    with pytest.raises(ValueError, match="at least 2 classes"):
        one = random_head(12, 1, seeded(1), prototype_size=4, device=device)
        exit_step(batch, one, DistanceEntropy(0.4), impl=impl)
    with pytest.raises(ValueError, match=r"row state \['counter', 'previous'\]"):
        exit_step(batch, head, Patience(2), impl=impl)
    for bad in (torch.zeros(3, device=device), torch.zeros(2, device=device, dtype=torch.float64)):
        batch.state["threshold"] = bad
        with pytest.raises(ValueError, match=r'state\["threshold"\]: expected torch.float32'):
            exit_step(batch, head, entropy, impl=impl)


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_means_that_are_known_stand_for_the_tokens(impl, dtype, device, rule):
    """A head on the mean reads them instead; to one on [CLS] they say nothing."""
    lengths, classes = [5, 1, 40, 3], 3
    batch = batch_for(rule, lengths, 128, classes, 31, dtype=dtype, device=device, spare_rows=2, spare_tokens=3)
    means = mean_rows(batch.hidden, batch.cu_seqlens)  # float32
    for pooling in ("mean", "cls"):
        head = full_head(128, classes, 32, pooled_size=96, pooling=pooling, dtype=dtype, device=device)
        expected = exit_step(batch, head, rule, impl=impl)
        found = exit_step(batch, head, rule, means=means, impl=impl)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02  # a mean may round to the next bfloat16
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=tolerance if pooling == "mean" else 0)
        found = exit_step(batch, head, rule, means=means * 0, impl=impl)
        assert torch.equal(found.logits, expected.logits) == (pooling == "cls")
    for bad in (means[1:], means.double(), means.T.contiguous().T, means.to("meta")):
        with pytest.raises(ValueError, match="means: expected"):
            exit_step(batch, head, rule, means=bad, impl=impl)
