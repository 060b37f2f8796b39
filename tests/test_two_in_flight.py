"""On a device the host queues one cohort's stage before it reads the other's, and waits for nothing else.

There is no GPU here: fake_device.py stands in, and raises where the host would wait for a real one.
"""

from __future__ import annotations

import pytest
import torch
from device_cases import SYSTEMS, build
from fake_device import DEVICE, FakeDevice, HostWaits, OnDevice, fake_device
from system_cases import Reference
from tiny import one_thread, random_rows, tiny_deebert  # noqa: F401  (one_thread: autouse)

import ragged_exit as rx
from ragged_exit import executor as executing
from ragged_exit.batch import RaggedBatch
from ragged_exit.executor import ExitRecord
from ragged_exit.transfer import ToHost, to_device

ROWS = random_rows(30, seed=3, longest=12)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(executing, "COHORT_TOKENS", 8)
    with fake_device(monkeypatch) as device:
        yield device


def on_host_and_device(model: rx.EarlyExitModel, rule: rx.ExitRule) -> list[rx.AcceleratedModel]:
    return [rx.accelerate(model, rule=rule, impl="reference", device=place) for place in ("cpu", DEVICE)]


def assert_same(found: ExitRecord, expected: ExitRecord) -> None:
    for name in ("exit_layer", "exit_member", "executed_layers"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("logits", "score"):
        value = getattr(found, name)
        assert not isinstance(value, OnDevice)
        torch.testing.assert_close(value, getattr(expected, name), rtol=0, atol=2e-5)


# one forward call ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SYSTEMS)
def test_two_halves_take_turns_and_nothing_else_waits(name: str, device: FakeDevice) -> None:
    model = build(name)
    host, fast = on_host_and_device(model, Reference(model, ROWS).quiet(0.3))
    expected = host.executor.run(host.pack_sequences(ROWS))
    assert expected.executed_layers.unique().numel() > 1
    batch = fast.pack_sequences(ROWS)
    with device.watched():
        record = fast.executor.run(batch)
    assert_same(record, expected)
    stages = len(device.log_of("queued"))
    assert device.log_of("read") == list(range(stages))  # in the order of queueing
    flying = device.in_flight()
    alone = flying.count(1)  # after one half has ended
    assert flying == [2] * (stages - alone) + [1] * alone and stages - alone > alone


def test_a_call_with_padding_is_packed_on_the_host(device: FakeDevice) -> None:
    model = tiny_deebert()
    host, fast = on_host_and_device(model, rx.Entropy(0.9))
    ids = torch.randint(1, 90, (16, 9))
    mask = (torch.arange(9) < torch.randint(1, 10, (16, 1))).long()
    expected = host(ids, mask)
    with device.watched():
        found = fast(ids, mask)
    assert expected.exit_layer.unique().numel() > 1
    assert torch.equal(found.exit_layer, expected.exit_layer)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=2e-5)


def test_a_small_batch_is_not_split(device: FakeDevice, monkeypatch) -> None:
    monkeypatch.setattr(executing, "COHORT_TOKENS", sum(map(len, ROWS)))
    _, fast = on_host_and_device(tiny_deebert(), rx.Entropy(0.9))
    fast.executor.run(fast.pack_sequences(ROWS))
    assert set(device.in_flight()) == {1}


def test_calibration_sees_whole_stages(device: FakeDevice) -> None:
    _, fast = on_host_and_device(tiny_deebert(), rx.Entropy(-1.0))
    seen: list = []
    fast.executor.run(fast.pack_sequences(ROWS), seen.append)
    assert [len(decision.exits) for decision in seen] == [len(ROWS)] * len(fast.executor.stages)


def test_a_rule_that_chooses_sees_the_batch_as_it_came(device: FakeDevice) -> None:
    """Were it asked for each half, the arms would be chosen, and the rewards come, in another order."""
    model, states, heard = tiny_deebert(), [], []
    for place in ("cpu", DEVICE):
        rule = rx.UcbMaxProb((0.4, 0.6, 0.9))
        fast = rx.accelerate(model, rule=rule, impl="reference", device=place)
        for _ in range(3):
            batch = fast.pack_sequences(ROWS)
            with device.watched():
                heard.append(fast.executor.run(batch))
        states.append(rule.state_dict())
    assert states[0]["pulls"] == states[1]["pulls"] and sum(states[1]["rewarded"]) == 3 * len(ROWS)
    assert states[0]["reward_sum"] == pytest.approx(states[1]["reward_sum"], abs=1e-4)
    for found, expected in zip(heard[3:], heard[:3], strict=True):
        assert_same(found, expected)


# streams ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_stream_keeps_two_stages_in_flight(name: str, device: FakeDevice) -> None:
    model = build(name)
    rows = random_rows(80, seed=4, longest=12)
    host, fast = on_host_and_device(model, Reference(model, rows).quiet(0.3))
    expected = list(host.stream(rows, token_budget=48))
    with device.watched():
        found = list(fast.stream(rows, token_budget=48))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.exit_layer, ours.exit_member, ours.executed_layers) == (
            theirs.exit_layer,
            theirs.exit_member,
            theirs.executed_layers,
        )
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=2e-5)
    flying = device.in_flight()
    assert max(flying) == 2
    assert flying.count(2) > 0.7 * len(flying)  # one alone: only where nothing else is left to queue, in the flush


def test_a_rule_that_learns_hears_of_every_row_of_a_stream_once(device: FakeDevice) -> None:
    rule = rx.UcbMaxProb((0.4, 0.6, 0.9))
    fast = rx.accelerate(tiny_deebert(), rule=rule, impl="reference", device=DEVICE)
    with device.watched():
        list(fast.stream(random_rows(100, 3), token_budget=64))
    assert sum(rule.pulls) == sum(rule.rewarded) == 100


def test_on_the_cpu_every_stage_is_read_at_once(monkeypatch) -> None:
    order = []
    for name in ("launch", "settle"):
        real = getattr(executing.RaggedExecutor, name)

        def noted(self, *arguments, name=name, real=real, **options):
            order.append(name)
            return real(self, *arguments, **options)

        monkeypatch.setattr(executing.RaggedExecutor, name, noted)
    monkeypatch.setattr(executing, "COHORT_TOKENS", 1)
    fast = rx.accelerate(tiny_deebert(), threshold=0.9, impl="reference")
    list(fast.stream(ROWS, token_budget=40))
    fast.executor.run(fast.pack_sequences(ROWS))
    assert order == ["launch", "settle"] * (len(order) // 2) and len(order) > 20


# the transfer -------------------------------------------------------------------------------------------------------
def test_values_travel_in_one_copy_and_arrive_as_they_were(device: FakeDevice) -> None:
    values = [
        torch.arange(5),
        torch.randn(5, 3),
        torch.tensor([float("nan"), -0.0]),
        torch.tensor([2, 7], dtype=torch.int32),
        torch.tensor([True, False, True]),
    ]
    found = ToHost([to_device(value, DEVICE) for value in values]).read()
    assert device.log == [("queued", 0), ("read", 0)]
    for one, other in zip(found, values, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.view(torch.uint8).tolist() == other.view(torch.uint8).tolist()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: int(x[0]),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x[x > 2],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: bool((x > 2).any()),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(x),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: torch.arange(4).to(DEVICE),
        lambda x: x + torch.arange(4),
    ],
)
def test_the_fake_device_notices_who_waits(wait, device: FakeDevice) -> None:
    value = to_device(torch.arange(4), DEVICE)
    with device.watched(), pytest.raises(HostWaits):
        wait(value)


def test_batches_are_cut_and_joined_without_waiting(device: FakeDevice) -> None:
    host = RaggedBatch.from_sequences(ROWS)
    batch = host.to(DEVICE)
    with device.watched():
        again = RaggedBatch.merge([batch.part(0, 4), batch.part(4, 5), batch.part(5, len(ROWS))])
    for name in ("cu_seqlens", "live", "sample_ids", "input_ids", "position_ids"):
        assert torch.equal(getattr(again, name).inner, getattr(host, name)), name
    assert torch.equal(again.seqlens, host.seqlens)
