"""Layers run by graphs answer as without, for every system; which graphs there are; what they leave behind.

A CPU has no CUDA graphs. The one here is as forgetful: it keeps the ops that it saw and the tensors that they touched,
and runs them again on those.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_cases import SYSTEMS, build
from fake_device import DEVICE, fake_device
from system_cases import Reference
from tiny import impls, one_thread, random_rows, tiny_deebert  # noqa: F401  (one_thread: autouse)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import ragged_exit as rx
from ragged_exit.batch import RaggedBatch, token_bucket
from ragged_exit.encoder import run_layers
from ragged_exit.executor import ExitRecord, RaggedExecutor
from ragged_exit.graphs import LayerGraphs, Size

ROWS = random_rows(40, seed=3, longest=12)


class Tape(TorchDispatchMode):
    """Keeps every op with the very tensors that it took and gave; ``replay`` fills the latter anew."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, _tensors(out)))
        return out

    def replay(self) -> None:
        for func, args, kwargs, outs in self.ops:
            taken = {value.untyped_storage().data_ptr() for value in _tensors((args, kwargs))}
            again = _tensors(func(*args, **kwargs))
            for kept, new in zip(outs, again, strict=True):
                if kept.untyped_storage().data_ptr() not in taken:  # else a view, or written in place
                    kept.copy_(new)


def _tensors(value: Any) -> list[Tensor]:
    """Without oneDNN's packed weights, which have no memory to speak of."""
    return [item for item in tree_flatten(value)[0] if isinstance(item, Tensor) and not item.is_mkldnn]


class Captures:
    """Stands in for CudaCapture. ``tapes``: what was captured; ``replays``: how often anything was replayed."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.replays = 0

    def __call__(self, run: Any, device: torch.device) -> Any:
        run()  # the warm-up
        tape = Tape()
        with tape:
            run()
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay


def graphed(fast: rx.AcceleratedModel, **options: Any) -> tuple[RaggedExecutor, Captures]:
    captures = Captures()
    graphs = LayerGraphs(capture=captures, **options)
    return RaggedExecutor(fast.executor.stages, impl=fast.impl, graphs=graphs), captures


def assert_same(found: ExitRecord, expected: ExitRecord, limit: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=limit if one.is_floating_point() else 0)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("name", SYSTEMS)
def test_answers_are_those_without_graphs(name: str, impl: str) -> None:
    """Batches of other rows and lengths each time, so that buffers hold what larger ones left there."""
    model = build(name)
    fast = rx.accelerate(model, rule=Reference(model, ROWS).quiet(0.3), impl=impl)
    executor, captures = graphed(fast)
    for start, stop in ((0, 40), (3, 40), (0, 12), (4, 15), (0, 39), (20, 21), (21, 22), (1, 40)):
        rows = ROWS[start:stop]
        expected = fast.executor.run(fast.pack_sequences(rows))
        assert_same(executor.run(fast.pack_sequences(rows)), expected, 0.0 if impl == "native" else 2e-5)
    assert 1 < len(captures.tapes) < captures.replays


def test_two_cohorts_on_a_device(monkeypatch) -> None:
    """Buffers are shared by the cohorts; and neither a capture's ops nor the copies make the host wait."""
    monkeypatch.setattr("ragged_exit.executor.COHORT_TOKENS", 8)
    model = tiny_deebert()
    host = rx.accelerate(model, threshold=0.9, impl="reference")
    expected = host.executor.run(host.pack_sequences(ROWS))
    with fake_device(monkeypatch) as device:
        fast = rx.accelerate(model, threshold=0.9, impl="reference", device=DEVICE)
        executor = RaggedExecutor(fast.executor.stages, impl="reference", graphs=LayerGraphs(capture=called_again))
        for _ in range(3):
            with device.watched(), torch.inference_mode():
                record = executor.run(fast.pack_sequences(ROWS))
            assert_same(record, expected, 2e-5)
    assert max(device.in_flight()) == 2


def called_again(run: Any, device: torch.device) -> Any:
    """What CudaCapture comes to where there are no graphs: a warm-up, then the layers themselves."""
    run()
    return run


@pytest.fixture
def fast() -> rx.AcceleratedModel:
    return rx.accelerate(tiny_deebert(), threshold=0.9, impl="reference")


def embedded(fast: rx.AcceleratedModel, rows: int, longest: int, seed: int) -> RaggedBatch:
    lengths = [longest] + [3] * (rows - 1)
    sequences = [[4 + (seed + row) % 80] * length for row, length in enumerate(lengths)]
    return fast.encoder.embed(fast.pack_sequences(sequences))


def test_a_size_is_captured_when_it_comes_again(fast) -> None:
    captures = Captures()
    graphs = LayerGraphs(capture=captures)
    counts = []
    for rows, longest in ((20, 9), (20, 9), (30, 12), (10, 17), (16, 17), (20, 9)):
        graphs.run(fast.encoder, [0], embedded(fast, rows, longest, 0))
        counts.append((len(captures.tapes), captures.replays))
    # 30 rows are more tokens; rows beyond 16 and a row beyond 16 tokens are another size
    assert counts == [(0, 0), (1, 1), (1, 1), (1, 1), (2, 2), (2, 3)]
    graphs.run(fast.encoder, [1], embedded(fast, 20, 9, 0))
    graphs.run(fast.encoder, [], embedded(fast, 20, 9, 0))
    assert captures.replays == 3  # another layer has graphs of its own; no layers have none


def test_there_are_never_more_than_asked_for(fast) -> None:
    captures = Captures()
    graphs = LayerGraphs(2, capture=captures)
    for longest in (5, 20) * 3:
        for layer in (0, 1, 2):
            pair = embedded(fast, 8, longest, 0), embedded(fast, 8, longest, 0)
            for run, batch in zip((graphs.run, run_layers), pair, strict=True):
                run(fast.encoder, [layer], batch)
            found, expected = (batch.hidden[: batch.tokens] for batch in pair)
            assert torch.allclose(found, expected, atol=1e-5)
    assert len(captures.tapes) == 2 and captures.replays == 4
    with pytest.raises(ValueError, match="most"):
        LayerGraphs(0)


def test_an_answer_outlives_the_next_replay(fast) -> None:
    graphs = LayerGraphs(capture=Captures())
    found, expected = ([embedded(fast, 12, 8, seed) for seed in range(4)] for _ in range(2))
    for batch in found:
        graphs.run(fast.encoder, [0, 1], batch)
    for one, other in zip(found, expected, strict=True):
        run_layers(fast.encoder, [0, 1], other)
        torch.testing.assert_close(one.hidden[: one.tokens], other.hidden[: one.tokens], rtol=0, atol=1e-5)


class Watched:
    """An encoder that keeps what its layer is given: row ends, and the longest row that it may meet."""

    hidden_size, dtype, device = 2, torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        self.given: list[tuple[list[int], int, int]] = []

    def layer(self, index: int, batch: RaggedBatch, *, with_means: bool) -> None:
        self.given.append((batch.cu_seqlens.tolist(), len(batch.hidden), batch.max_seqlen))
        batch.hidden += 1


def test_a_graph_is_given_the_rows_and_nothing_that_others_left() -> None:
    """Row ends past the buffer would make a kernel read past it, in the warm-up too."""
    encoder, graphs = Watched(), LayerGraphs(capture=called_again)
    lengths = [[40] * 16, [40] * 16, [2, 16], [3, 1, 9], [2, 2]]  # two sizes of tokens, one of rows
    for row_lengths in lengths:
        tokens = sum(row_lengths)
        hidden = torch.randn(token_bucket(tokens), 2)
        batch = RaggedBatch.from_seqlens(torch.tensor(row_lengths), hidden=hidden.clone())
        encoder.given.clear()
        graphs.run(encoder, [0], batch)
        assert torch.equal(batch.hidden, hidden + 1)
        for ends, _, _ in encoder.given[:-1]:
            assert set(ends) == {0}  # the warm-up
        ends, capacity, longest = encoder.given[-1]
        rows = len(row_lengths)
        assert ends[: rows + 1] == batch.cu_seqlens.tolist() and set(ends[rows:]) == {tokens}
        assert capacity >= len(hidden) and longest >= max(row_lengths)
    assert len(ends) == 17 and capacity == 32


def test_sizes_are_few_and_large_enough(fast) -> None:
    for tokens in [*range(1, 3000, 7), 8192, 8193, 100_000]:
        batch = RaggedBatch.from_seqlens(torch.tensor([tokens]), hidden=torch.empty(token_bucket(tokens), 1))
        size = Size.of(batch)
        assert size.tokens >= token_bucket(tokens) and size.rows == 16 and size.longest >= tokens
        assert size.tokens % 32 == 0 and size.tokens <= max(token_bucket(tokens) + 31, 1.25 * token_bucket(tokens))
    sizes = {
        Size.of(RaggedBatch.from_seqlens(torch.ones(rows), hidden=torch.empty(32, 1))).rows for rows in range(1, 4097)
    }
    assert len(sizes) == 9
