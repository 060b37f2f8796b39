"""RaggedExecutor on ragged batches gives every row what it gets alone: a walk through the stages, row by row.

The walk takes hidden states from Hugging Face (batch of one) and decides in float64. A row whose score lies within 1e-4
of a threshold somewhere on its way is a tie: it may leave elsewhere and is not compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    bert_config,
    impls,
    one_thread,  # noqa: F401
    packed_encoder,
    random_rows,
    tiny_backbone,
)
from torch import Tensor

import ragged_exit as rx
from ragged_exit.batch import RaggedBatch
from ragged_exit.encoder import PackedEncoder
from ragged_exit.executor import ExitRecord, RaggedExecutor, Stage
from ragged_exit.heads import HeadOutput, MlpHead
from ragged_exit.ops import ExitDecision
from ragged_exit.rules import ENTROPY_DIALECTS, ExitRule
from ragged_exit.testing.compare import decide_oracle, oracle_score
from ragged_exit.testing.factories import random_head, seeded

CLASSES = 3
TIE = 1e-4
PLACES = ("exit_layer", "exit_member", "executed_layers")
CLOSE = {"rtol": 0, "atol": 1e-4}
# the second one is a cascade's other member: another width and depth
CONFIGS = (bert_config(), bert_config(hidden_size=24, num_attention_heads=3, num_hidden_layers=3))
ROWS = random_rows(32, seed=5)


@cache
def encoder(member: int, impl: str) -> PackedEncoder:
    return packed_encoder(tiny_backbone(CONFIGS[member], seed=member), impl)


@cache
def head(member: int, depth: int, number: int) -> MlpHead:
    """One of three heads (number) for the states after ``depth`` layers."""
    width = CONFIGS[member].hidden_size
    generator = seeded(100 * member + 10 * depth + number)
    pooled_size = (width, None, 16)[number]
    return random_head(
        width,
        CLASSES,
        generator,
        pooling=("cls", "mean", "cls")[number],
        pooled_size=pooled_size,
        gain=(3.0, 1.0, 2.0)[number],
    )


@cache
def alone(member: int) -> list[list[Tensor]]:
    """For every row of ``ROWS`` its states after 0, 1, ... layers, each f64 ``[T, H]``, from a batch of one."""
    backbone = tiny_backbone(CONFIGS[member], seed=member)
    states = []
    with torch.no_grad():
        for row in ROWS:
            hidden = backbone(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
            states.append([state[0].double() for state in hidden])
    return states


def apply(head: MlpHead, states: Tensor) -> Tensor:
    """f64 logits ``[C]`` of one row's states ``[T, H]``."""
    x = states[0] if head.pooling == "cls" else states.mean(0)
    if head.pooler_weight is not None:
        x = torch.tanh(head.pooler_weight.double() @ x + head.pooler_bias.double())
    return head.classifier_weight.double() @ x + head.classifier_bias.double()


@cache
def logits_alone(member: int, depth: int, number: int, row: int) -> Tensor:
    """f64 ``[C]``: what head ``number`` says of row ``row`` of ``ROWS`` after ``depth`` layers."""
    return apply(head(member, depth, number), alone(member)[row][depth])


@dataclass(frozen=True)
class Step:
    """A stage in the test's own words: after ``depth`` layers of ``member``, head ``number``, the ``rule``-th rule."""

    member: int
    depth: int
    number: int
    rule: int = 0


def stages_of(steps: list[Step], rules: list[ExitRule], impl: str) -> list[Stage]:
    stages, done, before = [], 0, 0
    for index, step in enumerate(steps):
        restart = index == 0 or step.member != steps[index - 1].member
        if restart and index:
            before += done  # layers that the first member ran in vain
        done = 0 if restart else done
        stages.append(
            Stage(
                encoder=encoder(step.member, impl),
                layers=range(done, step.depth),
                head=head(step.member, step.depth, step.number),
                rule=rules[step.rule],
                exit_index=index,
                exit_layer=step.depth,
                executed_layers=before + step.depth,
                member=step.member + 1,
                restart=restart,
            )
        )
        done = step.depth
    return stages


@dataclass
class Fate:
    """What the walk says of a row."""

    logits: Tensor
    score: float
    stage: Stage
    tie: bool


def walk(row: int, steps: list[Step], stages: list[Stage], thresholds: float | None = None) -> Fate:
    """Take row ``row`` of ``ROWS`` alone through the stages."""
    state: dict[str, Tensor] = {}
    rule, tie = None, False
    for index, (step, stage) in enumerate(zip(steps, stages, strict=True)):
        if stage.rule is not rule:
            rule = stage.rule
            state = rule.initial_state(1, torch.device("cpu"))
            if thresholds is not None:
                state["threshold"] = torch.tensor([thresholds], dtype=torch.float32)
        logits = logits_alone(step.member, step.depth, step.number, row)
        batch = RaggedBatch.from_seqlens(torch.tensor([len(ROWS[row])]), state=state)
        final = index == len(steps) - 1
        decision = decide_oracle(batch, logits[None], rule, final, exit_index=stage.exit_index)
        tie |= float(decision.gap) <= TIE
        if not decision.counts and not final:
            tie |= abs(float(decision.score) - float(decision.threshold)) <= TIE
        if bool(decision.exits):
            return Fate(logits, float(decision.score), stage, tie)
        if decision.counts:
            state |= {"counter": decision.counter.int(), "previous": decision.previous.float()}
    raise AssertionError("the last stage lets everybody go")


def batch_of(rows: list[int], impl: str, sample_ids: list[int] | None = None) -> RaggedBatch:
    batch = encoder(0, impl).pack_sequences([ROWS[row] for row in rows])
    return batch if sample_ids is None else replace(batch, sample_ids=torch.tensor(sample_ids))


def assert_fates(record: ExitRecord, fates: list[Fate]) -> None:
    """``fates`` in the order of the caller's rows."""
    assert record.logits.dtype == record.score.dtype == torch.float32
    assert record.logits.shape == (len(fates), CLASSES)
    for name in PLACES:
        assert getattr(record, name).dtype == torch.int64 and getattr(record, name).shape == (len(fates),)
    for row, fate in enumerate(fates):
        if fate.tie:
            continue
        left = tuple(int(getattr(record, name)[row]) for name in PLACES)
        stage = fate.stage
        assert left == (stage.exit_layer, stage.member, stage.executed_layers), f"row {row}"
        torch.testing.assert_close(record.logits[row].double(), fate.logits, **CLOSE)
        torch.testing.assert_close(float(record.score[row]), fate.score, **CLOSE)


# every row as alone -------------------------------------------------------------------------------------------------
@st.composite
def plans(draw: st.DrawFn) -> list[Step]:
    """Exits after any layers of the first member (zero-layer stages included), then perhaps of the second."""
    depths = sorted(draw(st.lists(st.integers(0, 4), min_size=1, max_size=5)))  # equal depths: no layer in between
    steps = [Step(0, depth, draw(st.integers(0, 2))) for depth in depths]
    if draw(st.booleans()):
        other = sorted(draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)))
        rule = draw(st.integers(0, 1))
        steps += [Step(1, depth, draw(st.integers(0, 2)), rule) for depth in other]
    elif draw(st.booleans()):
        turn = draw(st.integers(0, len(steps)))
        steps = steps[:turn] + [replace(step, rule=1) for step in steps[turn:]]
    return steps


def rules_without_threshold() -> st.SearchStrategy[ExitRule]:
    zero = st.just(0.0)
    return st.one_of(
        st.builds(
            rx.Entropy, st.just(0.0), dialect=st.sampled_from(ENTROPY_DIALECTS), compare=st.sampled_from(["<", "<="])
        ),
        st.builds(
            rx.MaxProb, st.just(0.0), compare=st.sampled_from([">", ">="]), temperature=st.sampled_from([1.0, 2.0])
        ),
        st.builds(rx.Energy, zero, temperature=st.sampled_from([1.0, 0.5])),
        st.builds(rx.Patience, st.integers(0, 3)),
        st.builds(rx.ConfidentPatience, st.integers(1, 2), st.sampled_from([0.3, 0.7])),
    )


def with_thresholds(draw: st.DrawFn, rule: ExitRule, rows: list[int], steps: list[Step]) -> ExitRule:
    """Thresholds away from every score, one for all exits or one an exit, that let a drawn share of rows go."""
    if isinstance(rule, rx.Patience | rx.ConfidentPatience):
        return rule
    scores = torch.stack([scores_at(rule, rows, step) for step in steps])  # [exits, rows]
    if draw(st.booleans()):
        return replace(rule, threshold=clear_threshold(scores.flatten(), draw(st.floats(0, 1))))  # type: ignore[type-var]
    return replace(rule, threshold=[clear_threshold(score, draw(st.floats(0, 1))) for score in scores])  # type: ignore[type-var]


def clear_threshold(scores: Tensor, share: float) -> float:
    """A threshold in a gap between ``scores``, or past their ends; 0 is below them all, 1 above."""
    ordered = scores.flatten().unique()
    gaps = ordered.diff() > 4 * TIE
    between = ((ordered[1:] + ordered[:-1]) / 2)[gaps]
    candidates = [float(ordered[0]) - 0.1, *between.tolist(), float(ordered[-1]) + 0.1]
    return candidates[round(share * (len(candidates) - 1))]


def scores_at(rule: ExitRule, rows: list[int], step: Step) -> Tensor:
    logits = [logits_alone(step.member, step.depth, step.number, row) for row in rows]
    return oracle_score(torch.stack(logits), None, rule.spec)


@pytest.mark.parametrize("impl", impls())
@given(data=st.data())
def test_every_row_leaves_where_it_leaves_alone(impl: str, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=10), "rows")
    sample_ids = data.draw(st.permutations(range(len(rows))), "sample ids")
    steps = data.draw(plans(), "steps")
    drawn = [data.draw(rules_without_threshold(), "rule") for _ in range(2)]
    rules = [with_thresholds(data.draw, rule, rows, steps) for rule in drawn]
    stages = stages_of(steps, rules, impl)
    record = RaggedExecutor(stages, impl=impl).run(batch_of(rows, impl, sample_ids))
    fates = [walk(row, steps, stages) for row in rows]
    if not any(rule.initial_state(1, torch.device("cpu")) for rule in rules):
        assert not any(fate.tie for fate in fates)
    assert_fates(record, [fates[sample_ids.index(place)] for place in range(len(rows))])


FOUR = [Step(0, depth, depth % 3) for depth in (1, 2, 3, 4)]


@dataclass(frozen=True)
class Watching(rx.Entropy):
    """An online rule: thresholds per row from a table, and a diary of what it is told."""

    table: tuple[float, ...] = ()
    diary: list[Any] = field(default_factory=list, compare=False)

    def start(self, sample_ids: Tensor) -> Tensor | None:
        self.diary.append(("start", sample_ids.tolist()))
        return torch.tensor(self.table, dtype=torch.float64)[sample_ids] if self.table else None

    def finish(self, sample_ids: Tensor, scores: Tensor, exit_layer: Tensor) -> None:
        self.diary.append(("finish", sample_ids.tolist(), scores, exit_layer))


@pytest.mark.parametrize("impl", impls())
def test_thresholds_of_start_belong_to_their_rows(impl: str) -> None:
    rows = list(range(10))
    scores = torch.stack([scores_at(rx.Entropy(0.0), rows, step) for step in FOUR])
    table = tuple(clear_threshold(scores.flatten(), share) for share in torch.linspace(0, 1, 10).tolist())
    rule = Watching(0.0, table=table)
    stages = stages_of(FOUR, [rule], impl)
    sample_ids = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    record = RaggedExecutor(stages, impl=impl).run(batch_of(rows, impl, sample_ids))
    fates = {sample: walk(row, FOUR, stages, table[sample]) for row, sample in zip(rows, sample_ids, strict=True)}
    assert_fates(record, [fates[sample] for sample in range(10)])
    assert record.exit_layer.unique().numel() > 2
    assert rule.diary[0] == ("start", sample_ids)


@pytest.mark.parametrize("impl", impls())
def test_the_callers_thresholds_come_before_the_rules(impl: str) -> None:
    rows = list(range(8))
    rule = Watching(0.0, table=(0.0,) * 8)
    stages = stages_of(FOUR, [rule], impl)
    batch = batch_of(rows, impl)
    table = [0.0, 10.0] * 4
    batch.state["threshold"] = torch.tensor(table)
    record = RaggedExecutor(stages, impl=impl).run(batch)
    assert record.exit_layer.tolist() == [4, 1] * 4
    assert "start" not in [entry[0] for entry in rule.diary]


def test_finish_hears_of_every_row_once_in_the_callers_order() -> None:
    rows, sample_ids = [2, 9, 4, 7, 1, 0], [5, 0, 3, 1, 2, 4]
    scores = torch.stack([scores_at(rx.Entropy(0.0), rows, step) for step in FOUR])
    rule = Watching(clear_threshold(scores.flatten(), 0.4))
    record = RaggedExecutor(stages_of(FOUR, [rule], "reference"), impl="reference").run(
        batch_of(rows, "reference", sample_ids)
    )
    assert record.exit_layer.unique().numel() > 1
    assert [entry[0] for entry in rule.diary] == ["start", "finish"]
    _, ids, heard, layers = rule.diary[1]
    assert ids == list(range(6))
    assert torch.equal(heard, record.score) and torch.equal(layers, record.exit_layer)


def test_every_rule_that_was_asked_hears_the_end_and_no_other() -> None:
    rules = [Watching(0.0), Watching(10.0), Watching(10.0)]
    steps = [replace(step, rule=rule) for step, rule in zip(FOUR, (0, 1, 1, 2), strict=True)]
    RaggedExecutor(stages_of(steps, rules, "reference"), impl="reference").run(batch_of([0, 1], "reference"))
    assert [[entry[0] for entry in rule.diary] for rule in rules] == [["start", "finish"], ["start", "finish"], []]


# ends of the range --------------------------------------------------------------------------------------------------
class Counting:
    """A PackedEncoder that notes which layers ran on how many rows."""

    def __init__(self, inner: PackedEncoder) -> None:
        self.inner, self.calls = inner, []

    def embed(self, batch: RaggedBatch, buffers: object = None) -> RaggedBatch:
        self.calls.append(("embed", batch.rows))
        return self.inner.embed(batch)

    def layer(self, index: int, batch: RaggedBatch, *, with_means: bool = False) -> torch.Tensor | None:
        self.calls.append((index, batch.rows))
        return self.inner.layer(index, batch, with_means=with_means)


def counted(stages: list[Stage]) -> tuple[list[Stage], list[Any]]:
    watch = Counting(stages[0].encoder)
    return [replace(stage, encoder=watch) for stage in stages], watch.calls


@pytest.mark.parametrize("impl", impls())
def test_all_leave_at_the_first_exit_and_nothing_else_runs(impl: str) -> None:
    stages, calls = counted(stages_of(FOUR, [rx.Entropy(10.0)], impl))
    rows = list(range(7))
    record = RaggedExecutor(stages, impl=impl).run(batch_of(rows, impl))
    assert calls == [("embed", 7), (0, 7)]
    assert record.exit_layer.tolist() == record.executed_layers.tolist() == [1] * 7
    assert_fates(record, [walk(row, FOUR, stages) for row in rows])


@pytest.mark.parametrize("impl", impls())
def test_nobody_leaves_early_and_all_answer_at_the_last(impl: str) -> None:
    stages, calls = counted(stages_of(FOUR, [rx.Entropy(-1.0)], impl))
    rows = list(range(7))
    record = RaggedExecutor(stages, impl=impl).run(batch_of(rows, impl))
    assert calls == [("embed", 7), (0, 7), (1, 7), (2, 7), (3, 7)]
    assert_fates(record, [walk(row, FOUR, stages) for row in rows])
    assert record.exit_layer.tolist() == [4] * 7


@pytest.mark.parametrize("impl", impls())
def test_layers_run_on_survivors_only(impl: str) -> None:
    rows = list(range(12))
    scores = torch.stack([scores_at(rx.Entropy(0.0), rows, step) for step in FOUR])
    stages, calls = counted(stages_of(FOUR, [rx.Entropy(clear_threshold(scores.flatten(), 0.3))], impl))
    record = RaggedExecutor(stages, impl=impl).run(batch_of(rows, impl))
    assert record.exit_layer.unique().numel() > 2
    alive = [int((record.exit_layer > depth).sum()) for depth in range(4)]
    assert calls == [("embed", 12), *[(depth, rows) for depth, rows in enumerate(alive) if rows]]


@pytest.mark.parametrize("impl", impls())
def test_nan_never_leaves_early(impl: str) -> None:
    broken = replace(head(0, 1, 0), classifier_bias=torch.full((CLASSES,), math.nan))
    for rule in (rx.Entropy(10.0), rx.MaxProb(-1.0), rx.Entropy(10.0, dialect="hf")):
        stages = stages_of(FOUR[:2], [rule], impl)
        stages[0] = replace(stages[0], head=broken)
        record = RaggedExecutor(stages, impl=impl).run(batch_of([0, 1, 2], impl))
        assert record.exit_layer.tolist() == [2, 2, 2] and not record.logits.isnan().any()


def test_a_cascade_starts_again_from_the_survivors_tokens() -> None:
    steps = [Step(0, 2, 0), Step(1, 1, 0, 1), Step(1, 3, 1, 1)]
    rows = list(range(10))
    first = clear_threshold(scores_at(rx.Entropy(0.0), rows, steps[0]), 0.5)
    stages = stages_of(steps, [rx.Entropy(first), rx.Entropy(0.0)], "reference")
    record = RaggedExecutor(stages, impl="reference").run(batch_of(rows, "reference"))
    assert set(
        zip(record.exit_member.tolist(), record.exit_layer.tolist(), record.executed_layers.tolist(), strict=True)
    ) == {
        (1, 2, 2),
        (2, 3, 5),
    }
    assert_fates(record, [walk(row, steps, stages) for row in rows])


# row state of other heads -------------------------------------------------------------------------------------------
def see(states: Tensor) -> Tensor:
    """``[T, H]`` -> ``[H]``, of the last token and the mean of all."""
    return states[-1] + states.mean(0)


class Ensemble:
    """Logits are the mean of what this and all earlier exits said of the row: a head with row state of its own.

    It looks at all tokens, and its signal is made of the row's memory too.
    """

    def __init__(self, depth: int) -> None:
        generator = seeded(depth)
        self.weight = torch.randn(CLASSES, CONFIGS[0].hidden_size, generator=generator) * 0.5

    def __call__(self, batch: RaggedBatch) -> HeadOutput:
        bounds = batch.cu_seqlens.tolist()
        pieces = [see(batch.hidden[start:end]) for start, end in pairwise(bounds)]
        said = torch.stack(pieces) @ self.weight.T  # [B, C]
        total = batch.state.get("total", torch.zeros_like(said)) + said
        count = batch.state.get("count", torch.zeros(len(said))) + 1
        batch.state["total"], batch.state["count"] = total, count
        return HeadOutput(total / count[:, None], torch.sigmoid(total[:, 0]))


def ensemble_logits(row: int, depths: list[int]) -> tuple[Tensor, Tensor]:
    """(mean logits f64 ``[C]``, signal) of a row after exits at ``depths``."""
    said = torch.stack([Ensemble(depth).weight.double() @ see(alone(0)[row][depth]) for depth in depths])
    return said.mean(0), torch.sigmoid(said.sum(0)[0])


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("score", ["entropy", "uncertainty", "patience"])
def test_a_token_heads_own_state_travels_with_its_rows(score: str, impl: str) -> None:
    rows, sample_ids = list(range(12)), [(7 * row) % 12 for row in range(12)]
    per_row = [[ensemble_logits(row, [1, 2, 3, 4][:count]) for count in (1, 2, 3, 4)] for row in rows]
    rule: ExitRule = rx.Patience(1)
    if score != "patience":
        rule = rx.Entropy(0.0) if score == "entropy" else rx.LearnedUncertainty(0.0)
        scores = [
            oracle_score(logits[None], signal[None], rule.spec) for exits in per_row for logits, signal in exits[:3]
        ]
        rule = replace(rule, threshold=clear_threshold(torch.cat(scores), 0.35))
    stages = [replace(stage, head=Ensemble(depth)) for depth, stage in enumerate(stages_of(FOUR, [rule], impl), 1)]
    batch = batch_of(rows, impl, sample_ids)
    record = RaggedExecutor(stages, impl=impl).run(batch)
    assert record.exit_layer.unique().numel() > (1 if score == "patience" else 2)
    for row, sample in zip(rows, sample_ids, strict=True):
        expected = 4
        for depth in (1, 2, 3):
            logits, signal = per_row[row][depth - 1]
            if score == "patience":
                leaves = depth > 1 and logits.argmax() == per_row[row][depth - 2][0].argmax()
            else:
                leaves = float(oracle_score(logits[None], signal[None], rule.spec)) < rule.threshold
            if leaves:
                expected = depth
                break
        assert int(record.exit_layer[sample]) == expected, f"row {row}"
        torch.testing.assert_close(record.logits[sample].double(), per_row[row][expected - 1][0], **CLOSE)
    assert set(batch.state) == set()  # the caller's own dict is as it was


# the caller's view --------------------------------------------------------------------------------------------------
def test_the_callers_batch_is_not_changed() -> None:
    batch = batch_of([0, 1, 2, 3], "reference")
    tensors = ("cu_seqlens", "live", "seqlens", "sample_ids", "input_ids", "position_ids")
    before = {name: getattr(batch, name).clone() for name in tensors}
    executor = RaggedExecutor(stages_of(FOUR, [rx.Patience(1)], "reference"), impl="reference")
    first = executor.run(batch)
    assert batch.hidden is None and batch.state == {}
    assert all(torch.equal(getattr(batch, name), value) for name, value in before.items())
    assert all(torch.equal(one, other) for one, other in zip(first, executor.run(batch), strict=True))


def test_on_decision_sees_every_stage() -> None:
    decisions: list[ExitDecision] = []
    rows = list(range(9))
    scores = torch.stack([scores_at(rx.Entropy(0.0), rows, step) for step in FOUR])
    rule = rx.Entropy(clear_threshold(scores.flatten(), 0.3))
    executor = RaggedExecutor(stages_of(FOUR, [rule], "reference"), impl="reference")
    record = executor.run(batch_of(rows, "reference"), decisions.append)
    assert [int(decision.exits.sum()) for decision in decisions] == [
        int((record.exit_layer == depth).sum()) for depth in range(1, 1 + len(decisions))
    ]
    assert [len(decision.exits) for decision in decisions] == [
        int((record.exit_layer > depth).sum()) for depth in range(len(decisions))
    ]


def test_stages_are_checked() -> None:
    with pytest.raises(ValueError, match="at least one"):
        RaggedExecutor([])
    stages = stages_of(FOUR, [rx.Entropy(0.0)], "reference")
    with pytest.raises(ValueError, match="restart=True"):
        RaggedExecutor(stages[1:])
