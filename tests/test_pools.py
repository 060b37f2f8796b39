"""Survivor pools: launches stay full, nobody starves, and who is merged with whom changes no answer."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from system_cases import CASES, Reference, config_of, randomised
from tiny import impls, native_built, one_thread, random_rows, tiny_deebert  # noqa: F401  (one_thread: autouse)
from torch import Tensor

import ragged_exit as rx
from ragged_exit.batch import RaggedBatch, token_bucket
from ragged_exit.executor import RaggedExecutor, Stage
from ragged_exit.heads import HeadOutput
from ragged_exit.pools import Finished, SurvivorPools
from ragged_exit.testing import quiet_threshold

LAYERS = 12


class FakeEncoder:
    """Layers that only count the live tokens of every launch. Row ids travel as the hidden state."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, int, int]] = []  # (layer, rows, tokens)

    def embed(self, batch: RaggedBatch, buffers: object = None) -> RaggedBatch:
        hidden = torch.zeros(token_bucket(batch.tokens), 1)
        hidden[: batch.tokens, 0] = batch.input_ids.float()
        return batch.with_hidden(hidden)

    def layer(self, index: int, batch: RaggedBatch, *, with_means: bool) -> None:
        assert bool((batch.hidden[batch.tokens :] == 0).all())
        self.launches.append((index, batch.rows, batch.tokens))


class PlannedHead:
    """Sure of a row from its planned layer on; the row is told by its first token, which is its number."""

    def __init__(self, plan: Tensor, layer: int) -> None:
        self.plan, self.layer = plan, layer

    def __call__(self, batch: RaggedBatch) -> HeadOutput:
        rows = batch.hidden[batch.cu_seqlens[:-1].long(), 0].long()
        sure = (self.plan[rows] <= self.layer).float()
        return HeadOutput(torch.stack([sure * 20, torch.zeros_like(sure)], 1))


def planned(plan: Tensor) -> tuple[FakeEncoder, RaggedExecutor]:
    encoder, rule = FakeEncoder(), rx.MaxProb(0.9)
    stages = [
        Stage(encoder, [layer], PlannedHead(plan, layer + 1), rule, layer, layer + 1, layer + 1, restart=layer == 0)
        for layer in range(LAYERS)
    ]
    return encoder, RaggedExecutor(stages, impl="reference")


def batch_of(numbers: list[int], lengths: list[int]) -> RaggedBatch:
    batch = RaggedBatch.from_seqlens(torch.tensor(lengths))
    batch.input_ids = torch.tensor(numbers).repeat_interleave(torch.tensor(lengths))
    batch.position_ids = torch.zeros_like(batch.input_ids)
    return batch


def workload(rows: int, seed: int) -> tuple[Tensor, list[int]]:
    """Exit layers with mean 4 of 12 (3x), a few rows to the end; lengths like sentences."""
    generator = torch.Generator().manual_seed(seed)
    plan = (
        torch.multinomial(torch.tensor([12, 18, 20, 16, 11, 8, 5, 3, 2, 2, 1, 2.0]), rows, True, generator=generator)
        + 1
    )
    return plan, torch.randint(4, 60, (rows,), generator=generator).tolist()


def test_launches_stay_full_where_they_ran_empty():
    plan, lengths = workload(8000, 1)
    assert float(plan.double().mean()) == pytest.approx(LAYERS / 3, rel=0.1)
    budget = 2048
    parts = [part.tolist() for part in torch.arange(8000).split(budget // 32)]
    encoder, executor = planned(plan)
    for part in parts:
        executor.run(batch_of(part, [lengths[row] for row in part]))
    alone = statistics.mean(tokens for _, _, tokens in encoder.launches)

    encoder, executor = planned(plan)
    pools = SurvivorPools(executor, budget)
    finished = [done for part in parts for done in pools.put(batch_of(part, [lengths[row] for row in part]))]
    finished += pools.flush()
    assert sorted(done.number for done in finished) == list(range(len(parts)))
    pooled = [tokens for layer, _, tokens in encoder.launches if layer > 0]  # how full batches enter is the caller's
    assert max(pooled) <= budget
    assert statistics.mean(pooled) >= 0.8 * budget > 2 * 0.8 * alone
    for number, record in finished:
        assert torch.equal(record.exit_layer, plan[parts[number]])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=25),
    budget=st.integers(1, 200),
    max_wait=st.integers(0, 6),
    seed=st.integers(0, 1000),
    on_host=st.booleans(),
)
def test_nobody_starves_and_everybody_is_answered_once(sizes, budget, max_wait, seed, on_host):
    with pytest.MonkeyPatch.context() as patch:
        if not on_host:  # as on a device: two stages in flight
            patch.setattr(RaggedBatch, "live_on_host", False)
        check_nobody_starves(sizes, budget, max_wait, seed)


def check_nobody_starves(sizes: list[int], budget: int, max_wait: int, seed: int) -> None:
    plan, lengths = workload(sum(sizes), seed)
    encoder, executor = planned(plan)
    pools = SurvivorPools(executor, budget, max_wait=max_wait)
    rows = torch.arange(sum(sizes)).split(sizes)
    answered: dict[int, Tensor] = {}

    def note(finished: list[Finished]) -> None:
        for number, record in finished:
            assert number not in answered
            answered[number] = record.exit_layer

    for number, part in enumerate(rows):
        note(pools.put(batch_of(part.tolist(), [lengths[row] for row in part])))
        assert all(earlier in answered for earlier in range(number - max_wait + 1))  # it saw max_wait batches enter
    note(pools.flush())
    assert torch.equal(torch.cat([answered[number] for number in range(len(rows))]), plan)
    assert pools.flush() == []
    for layer, count, tokens in encoder.launches:
        assert layer == 0 or tokens <= budget or count == 1
    # no row runs a layer twice, or one after it left
    assert sum(count for _, count, _ in encoder.launches) == int(plan.sum())


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_merging_changes_no_answer_of_any_system(case, impl):
    model = case.build(case.backbones[0], seed=3)
    rows = random_rows(40, 5, longest=12)
    model.rule = Reference(model, rows).quiet(0.3)
    results = list(rx.accelerate(model, impl=impl).stream(rows, token_budget=48))
    fast = rx.accelerate(model, impl=impl)
    record = fast.executor.run(fast.pack_sequences(rows))
    assert [result.exit_layer for result in results] == record.exit_layer.tolist()
    assert [result.exit_member for result in results] == record.exit_member.tolist()
    assert [result.executed_layers for result in results] == record.executed_layers.tolist()
    torch.testing.assert_close(torch.stack([result.logits for result in results]), record.logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("typed", [{0, 1}, {0}, {1}], ids=["all", "even", "odd"])
def test_rows_that_wait_for_a_restart_start_again_together(typed, impl, monkeypatch):
    """A cascade's next member begins with the token ids and types of rows of many batches, ``typed`` or without any."""
    small = config_of("bert", hidden_size=16, num_attention_heads=2, num_hidden_layers=2)
    members = [randomised(rx.FullDepth(config)) for config in (small, config_of("bert"))]
    model = rx.CascadeBert.from_members(members, rx.MaxProb(0.0))
    rows = random_rows(80, 5, longest=12)
    parts = [rows[at : at + 8] for at in range(0, 80, 8)]
    pairs = [
        (part, [[0] + [1] * (len(row) - 1) for row in part] if number % 2 in typed else None)
        for number, part in enumerate(parts)
    ]
    first = rx.accelerate(model, impl=impl)
    sure = torch.cat([first.executor.run(first.pack_sequences(*pair)).score for pair in pairs])  # of the first member
    fast = rx.accelerate(model, threshold=quiet_threshold(sure.double(), 0.5), impl=impl)
    second = fast.encoders[1]
    restarts: list[RaggedBatch] = []
    embed = second.embed
    monkeypatch.setattr(second, "embed", lambda batch, *more: restarts.append(batch) or embed(batch, *more))

    alone = [fast.executor.run(fast.pack_sequences(*pair)) for pair in pairs]
    apart = [batch.rows for batch in restarts]
    restarts.clear()
    pools = SurvivorPools(fast.executor, 128)
    finished = [done for pair in pairs for done in pools.put(fast.pack_sequences(*pair))] + pools.flush()

    assert {member for record in alone for member in record.exit_member.tolist()} == {1, 2}
    assert sorted(done.number for done in finished) == list(range(len(pairs)))
    for number, record in finished:
        assert torch.equal(record.exit_member, alone[number].exit_member)
        torch.testing.assert_close(record.logits, alone[number].logits, atol=2e-5, rtol=0)
    assert sum(batch.rows for batch in restarts) == sum(apart)
    assert len(restarts) <= len(apart) / 2 and all(batch.tokens <= 128 for batch in restarts)


@pytest.mark.skipif(not native_built(), reason="the C++ extension is not built")
def test_merging_changes_no_bit_on_the_native_path():
    fast = rx.accelerate(tiny_deebert(), threshold=0.9, impl="native")
    rows = random_rows(300, 7)
    small, large = (list(fast.stream(rows, token_budget=budget)) for budget in (64, 100_000))
    assert len({row.exit_layer for row in small}) > 1
    for one, other in zip(small, large, strict=True):
        assert one.exit_layer == other.exit_layer and one.score == other.score
        assert torch.equal(one.logits, other.logits)


def test_an_online_rule_learns_from_every_row_once():
    rule = rx.UcbMaxProb((0.4, 0.6, 0.9))
    model = tiny_deebert()
    rows = random_rows(200, 3)
    list(rx.accelerate(model, rule=rule).stream(rows, token_budget=64))
    assert sum(rule.pulls) == sum(rule.rewarded) == 200


def test_rules_hear_of_batches_as_they_entered():
    heard = []

    class Listener(rx.Entropy):
        def finish(self, sample_ids, scores, exit_layer):
            heard.append((sample_ids.tolist(), exit_layer.tolist()))

    fast = rx.accelerate(tiny_deebert(), rule=Listener(0.9))
    rows = random_rows(30, 4)
    pools = SurvivorPools(fast.executor, 40)
    with torch.inference_mode():
        finished = [
            done for part in (rows[:10], rows[10:20], rows[20:]) for done in pools.put(fast.pack_sequences(part))
        ]
        finished += pools.flush()
    assert len(heard) == 3 and all(ids == list(range(10)) for ids, _ in heard)
    assert [layers for _, layers in heard] == [record.exit_layer.tolist() for _, record in finished]


def test_a_rule_gives_thresholds_to_the_ids_that_entered():
    class Picky(rx.Entropy):
        def start(self, sample_ids):
            return torch.where(sample_ids % 5 == 0, 10.0, -1.0)  # these leave at once, the others never

    fast = rx.accelerate(tiny_deebert(), rule=Picky(0.0))
    rows = random_rows(21, 4)
    parts = rows[:7], rows[7:14], rows[14:]
    alone = [fast.executor.run(fast.pack_sequences(part)).exit_layer for part in parts]
    pools = SurvivorPools(fast.executor, 40)
    with torch.inference_mode():
        finished = [done for part in parts for done in pools.put(fast.pack_sequences(part))] + pools.flush()
    for number, record in finished:
        assert torch.equal(record.exit_layer, alone[number])
        assert record.exit_layer.tolist() == [1 if row % 5 == 0 else fast.encoder.num_layers for row in range(7)]


def test_a_later_members_rule_sees_the_ids_that_entered():
    """The second member starts on rows of several batches, merged."""

    class Picky(rx.MaxProb):
        def start(self, sample_ids):
            return torch.where(sample_ids % 2 == 0, -1.0, 2.0)  # these leave at once, the others never

    never = rx.MaxProb(2.0)
    members = [rx.DeeBert(config_of("bert"), rule).eval() for rule in (never, Picky(0.0))]
    fast = rx.accelerate(rx.CascadeBert.from_members(members, never))
    parts = [random_rows(7, seed) for seed in range(3)]
    alone = [fast.executor.run(fast.pack_sequences(part)).exit_layer for part in parts]
    pools = SurvivorPools(fast.executor, 300)
    with torch.inference_mode():
        finished = [done for part in parts for done in pools.put(fast.pack_sequences(part))] + pools.flush()
    assert len(finished) == 3 and set(alone[0].tolist()) == {1, 4}
    for number, record in finished:
        assert torch.equal(record.exit_layer, alone[number])


def test_parts_with_other_row_state_are_refused():
    first, second = batch_of([0, 1], [2, 3]), batch_of([2], [1])
    second.state["threshold"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"parts: expected the row state \[\], got \['threshold'\]"):
        RaggedBatch.merge([first, second])


def test_parts_and_merger_give_the_batch_back():
    batch = batch_of([0, 1, 2, 3], [3, 1, 4, 2])
    batch = replace(batch, hidden=torch.randn(32, 5), state={"counter": torch.arange(4)})
    again = RaggedBatch.merge([batch.part(0, 1), batch.part(1, 1), batch.part(1, 4)])
    assert torch.equal(again.cu_seqlens, batch.cu_seqlens) and torch.equal(again.seqlens, batch.seqlens)
    assert torch.equal(again.live, batch.live) and torch.equal(again.sample_ids, batch.sample_ids)
    assert again.hidden is None
    assert torch.equal(again.state["counter"], batch.state["counter"])
    assert torch.equal(again.input_ids, batch.input_ids)


@pytest.mark.parametrize(("budget", "max_wait", "name"), [(0, 1, "token_budget"), (5, -1, "max_wait")])
def test_bad_arguments(budget, max_wait, name):
    _, executor = planned(torch.ones(1))
    with pytest.raises(ValueError, match=name):
        SurvivorPools(executor, budget, max_wait=max_wait)
