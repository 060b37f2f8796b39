"""On a real GPU: transfers, two cohorts in flight, CUDA graphs of layers, half precision; nothing else waits."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from device_cases import SYSTEMS, build
from system_cases import Reference
from tiny import bert_config, random_rows, tiny_deebert

import ragged_exit as rx
from ragged_exit import executor as executing
from ragged_exit.batch import RaggedBatch
from ragged_exit.executor import ExitRecord, RaggedExecutor
from ragged_exit.graphs import LayerGraphs
from ragged_exit.ops.exit_step import row_threshold
from ragged_exit.transfer import ToHost, to_device

ROWS = random_rows(40, seed=3, longest=12)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@contextmanager
def nobody_waits() -> Iterator[None]:
    """PyTorch raises where it would wait for the device; events that one waits for by hand are free."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def small_cohorts(monkeypatch) -> None:
    monkeypatch.setattr(executing, "COHORT_TOKENS", 8)


@functools.cache
def spread(name: str) -> rx.AcceleratedModel:
    """On the GPU in fp32, a model whose rows leave at several exits, none of them near another decision."""
    model = build(name)
    return rx.accelerate(model, rule=Reference(model, ROWS).quiet(0.3), device="cuda")


def assert_same(found: ExitRecord, expected: ExitRecord, limit: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == "cpu"
        torch.testing.assert_close(one, other, rtol=0, atol=limit if one.is_floating_point() else 0)


def test_a_transfer_waits_for_itself_and_not_for_what_follows() -> None:
    values = [torch.arange(5), torch.randn(300, 3), torch.tensor([2, 7], dtype=torch.int32), torch.ones(5).bool()]
    there = [to_device(value, "cuda") for value in values]
    work = torch.randn(8192, 8192, device="cuda")
    work @ work  # cuBLAS is loaded before the watch
    torch.cuda.synchronize()
    with nobody_waits():
        transfer = ToHost(there)
        for _ in range(20):
            work = work @ work * 1e-4
        queued = torch.cuda.Event()
        queued.record()
        found = transfer.read()
        assert not queued.query(), "the read waited for what was queued after it"
    for one, other in zip(found, values, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_a_threshold_is_not_read_before_it_is_filled() -> None:
    """Another stream does not wait for the one that is still to fill it."""
    batch = RaggedBatch.from_seqlens(torch.tensor([1]), "cuda")
    rule = rx.Entropy(0.40625)  # nobody else's
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(busy):
        work = torch.randn(8192, 8192, device="cuda")
        for _ in range(20):
            work = work @ work * 1e-4
        row_threshold(batch, rule, 0)
    with torch.cuda.stream(other):
        assert row_threshold(batch, rule, 0).item() == 0.40625
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", SYSTEMS)
def test_halves_that_take_turns_answer_as_the_whole(name, monkeypatch) -> None:
    fast = spread(name)
    batch = fast.pack_sequences(ROWS)
    with torch.inference_mode():
        fast.executor.run(batch)  # kernels are compiled and loaded before the watch
        with nobody_waits():
            halves = fast.executor.run(batch)
        monkeypatch.setattr(executing, "COHORT_TOKENS", 1 << 30)
        whole = fast.executor.run(batch)
    assert whole.executed_layers.unique().numel() > 1
    assert_same(halves, whole, 1e-4)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_stream_never_stops_the_device(name) -> None:
    fast = spread(name)
    expected = list(fast.stream(ROWS, token_budget=64))  # kernels are compiled and loaded before the watch
    with nobody_waits():
        found = list(fast.stream(ROWS, token_budget=64))
    assert [row.executed_layers for row in found] == [row.executed_layers for row in expected]
    torch.testing.assert_close(
        torch.stack([row.logits for row in found]), torch.stack([row.logits for row in expected]), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", ["deebert", "pabee", "cascade"])
def test_graphs_answer_as_the_layers(name) -> None:
    """Batches of several sizes in turns, small after large, in buffers that they share, by two cohorts."""
    fast = spread(name)
    graphs = LayerGraphs()
    executor = RaggedExecutor(fast.executor.stages, impl=fast.impl, graphs=graphs)
    parts = [ROWS, ROWS[:7], ROWS[5:35], ROWS[20:21], ROWS[:30]] * 3
    with torch.inference_mode():
        for part in parts:
            batch = fast.pack_sequences(part)
            assert_same(executor.run(batch), fast.executor.run(batch), 1e-4)
        with nobody_waits():
            executor.run(batch)
    assert graphs._graphs, "nothing was captured"


def test_graphs_share_their_memory() -> None:
    """Twelve layers of one size need little more than one: temporaries and outcomes are not kept for each."""
    config = bert_config(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    fast = rx.accelerate(tiny_deebert(config), threshold=-1.0, dtype=torch.float16, device="cuda")
    batch = fast.encoder.embed(fast.pack_sequences([[5] * 20] * 800))  # 16,000 tokens: 24 MiB of hidden states
    graphs = LayerGraphs()

    def used(layer: int) -> int:
        for _ in range(2):
            graphs.run(fast.encoder, [layer], batch)
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved()

    first = used(0)
    last = [used(layer) for layer in range(1, 12)][-1]
    assert len(graphs._graphs) == 12 and last - first < 500 << 20  # the temporaries of eleven are 2 GiB


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_no_further_off_than_pytorchs_own(dtype) -> None:
    model = tiny_deebert(bert_config(hidden_size=64, num_hidden_layers=6))
    ids = torch.randint(4, 90, (64, 20))
    mask = torch.ones_like(ids)
    fast = rx.accelerate(model, threshold=-1.0, dtype=dtype, device="cuda")  # to the end
    with torch.inference_mode():
        exact = model.double().exit_points(ids, mask, None)[-1].output.logits
        plain = model.to("cuda", dtype).exit_points(ids.cuda(), mask.cuda(), None)[-1].output.logits
        executor = RaggedExecutor(fast.executor.stages, impl=fast.impl, graphs=LayerGraphs())
        batch = fast.encoder.pack(ids, mask)
        graphed = [executor.run(batch).logits for _ in range(3)][-1]
        found = fast(ids, mask).logits
    own = (plain.cpu().double() - exact).abs().mean()
    for logits in (found, graphed):
        assert (logits.double() - exact).abs().mean() <= 2 * own
