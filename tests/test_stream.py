"""stream: any number of sequences, in order, in bounded memory; a bad one is reported and the others answered."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from accelerate_cases import (
    CLOSE,
    assert_results,
    exiting,
    fast_model,
)
from system_cases import config_of, randomised
from tiny import (
    LONGEST,
    VOCAB,
    bert_config,
    impls,
    one_thread,  # noqa: F401
    padded,
    random_rows,
    randomise,
    roberta_config,
    tiny_deebert,
)
from transformers import BatchEncoding

import ragged_exit as rx
from ragged_exit.batch import RaggedBatch
from ragged_exit.pools import MAX_WAIT, Finished, SurvivorPools
from ragged_exit.stream import WINDOW_BATCHES


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("budget", [1, 30, 100, 8192])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_stream_answers_in_order_what_the_batch_forward_answers(kind: str, budget: int, impl: str) -> None:
    config = roberta_config() if kind == "roberta" else bert_config()
    model = exiting(tiny_deebert(config, pooling="mean"))
    rows = random_rows(60, seed=4)
    fast = rx.accelerate(model, impl=impl)
    expected = fast(*padded(rows, fill=config.pad_token_id))
    assert expected.exit_layer.unique().numel() > 2
    results = list(fast.stream(rows, token_budget=budget))
    assert len(results) == 60
    assert_results(results, expected)


def test_stream_takes_mappings_with_and_without_token_types() -> None:
    model = exiting(tiny_deebert())
    rows = random_rows(20, seed=6)
    types = [[place % 2 for place in range(len(row))] if index % 3 else None for index, row in enumerate(rows)]
    items: list[Any] = []
    for index, (row, kinds) in enumerate(zip(rows, types, strict=True)):
        if kinds is None:
            items.append(row if index % 2 else {"input_ids": row})
        else:
            items.append({"input_ids": row, "token_type_ids": kinds, "attention_mask": [1] * len(row)})
    ids, mask = padded(rows)
    padded_types = torch.zeros_like(ids)
    for index, kinds in enumerate(types):
        if kinds is not None:
            padded_types[index, : len(kinds)] = torch.tensor(kinds)
    fast = rx.accelerate(model, impl="reference")
    expected = fast(ids, mask, padded_types)
    assert not torch.allclose(expected.logits, fast(ids, mask).logits, atol=1e-3)
    assert_results(list(fast.stream(items, token_budget=50)), expected)
    arrays = [np.array(row) if index % 2 else torch.tensor(row) for index, row in enumerate(rows)]
    assert_results(list(fast.stream(arrays)), fast(ids, mask))  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", impls())
def test_uer_segments_are_taken_as_the_forward_takes_them(impl: str) -> None:
    """FastBERT's own 1 and 2 in place of 0 and 1; rows with and without them, and with token types, in one batch."""
    model = randomised(rx.FastBert(config_of("uer")))
    model.rule = model.rule.with_threshold(0.35)
    rows = random_rows(9, seed=2, longest=12)
    types = [[int(place > len(row) // 2) for place in range(len(row))] for row in rows]
    ids, mask = padded(rows)
    fast = rx.accelerate(model, impl=impl)
    expected = fast(ids, token_type_ids=(padded(types)[0] + 1) * mask)
    assert expected.exit_layer.unique().numel() > 1
    segments = [[kind + 1 for kind in kinds] for kinds in types]
    mixed = [types[row] if row % 2 else segments[row] for row in range(9)]
    for given in (types, segments, mixed):
        items = [{"input_ids": row, "token_type_ids": kinds} for row, kinds in zip(rows, given, strict=True)]
        assert_results(list(fast.stream(items, token_budget=20)), expected)
    (bad,) = fast.stream([{"input_ids": [5, 6], "token_type_ids": [1, 0]}])
    assert (
        bad.error == "ValueError: token_type_ids: expected segments 1 and 2, got 0, padding; give sequences without it"
    )


def watch_runs(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths in every batch that enters the pools from now on."""
    runs: list[list[int]] = []
    put = SurvivorPools.put

    def watched(self: SurvivorPools, batch: rx.RaggedBatch) -> Any:
        runs.append(batch.seqlens.tolist())
        return put(self, batch)

    monkeypatch.setattr(SurvivorPools, "put", watched)
    return runs


def test_stream_keeps_the_budget_and_sorts_by_length_inside_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fast_model()
    runs = watch_runs(monkeypatch)
    rows = random_rows(300, seed=1)
    budget = 60
    list(fast.stream(rows, token_budget=budget))
    assert all(sum(lengths) <= budget for lengths in runs)
    tokens = sum(map(len, rows))
    assert len(runs) <= 1.5 * tokens / budget + 2  # batches are full, up to a row and the windows' ends
    falls = [max(after) > min(before) for before, after in itertools.pairwise(runs)]
    windows = tokens / (WINDOW_BATCHES * budget)
    assert 2 <= sum(falls) <= windows + 1  # lengths only fall, and start again where a window starts


def test_a_sequence_longer_than_the_budget_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fast_model()
    runs = watch_runs(monkeypatch)
    rows = [[5] * 3, [6] * 20, [7] * 4]
    results = list(fast.stream(rows, token_budget=8))
    assert runs == [[20], [4, 3]]
    assert_results(results, fast(*padded(rows)))


def counted(rows: Iterator[Any], seen: list[int]) -> Iterator[Any]:
    for number, row in enumerate(rows):
        seen.append(number)
        yield row


def test_stream_reads_lazily_and_no_further_than_survivors_may_wait() -> None:
    fast = fast_model()
    seen: list[int] = []
    budget, length = 40, 10
    endless = counted(([5 + number % 50] * length for number in itertools.count()), seen)
    results = fast.stream(endless, token_budget=budget)
    assert not seen  # nothing before the first answer is asked for
    window, wait = WINDOW_BATCHES * budget // length, MAX_WAIT * budget // length
    for number in range(30 * window):
        assert next(results).index == number
        assert len(seen) <= (number // window + 2) * window + wait


def test_between_answers_the_caller_is_not_in_inference_mode() -> None:
    results = fast_model().stream([[5, 6], [7]])
    assert not next(results).logits.requires_grad
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_bad_rows_do_not_pile_up() -> None:
    """A long run of bad rows: each is reported without reading far ahead."""
    fast = fast_model()
    seen: list[int] = []
    results = fast.stream(counted(itertools.repeat([], 5000), seen), token_budget=16)
    for number in range(300):
        result = next(results)
        assert result.index == number and "at least one token" in result.error
        assert len(seen) <= number + WINDOW_BATCHES * 16


class Lazy:
    """A row that is read from somewhere when it is iterated."""

    def __iter__(self) -> Iterator[int]:
        yield 5
        raise OSError("the disk is gone")


BAD = {
    "empty": ([], "ValueError: input_ids: expected at least one token"),
    "too long": ([5] * (LONGEST + 1), f"ValueError: input_ids: expected at most {LONGEST} tokens"),
    "vocabulary": ([5, VOCAB], f"ValueError: input_ids: expected values in [0, {VOCAB})"),
    "negative": ([5, -1], "ValueError: input_ids: expected values"),
    "huge": ([2**70], "ValueError: input_ids: expected values"),
    "floats": ([5.0, 6.0], "TypeError: input_ids: expected integers, got float"),
    "nan": ([float("nan")], "TypeError: input_ids: expected integers"),
    "strings": (["good", "film"], "TypeError: input_ids: expected integers, got str"),
    "text": ("good film", "TypeError: input_ids: expected a sequence of integers, got str"),
    "bytes": (b"\5\6", "TypeError: input_ids: expected a sequence of integers, got bytes"),
    "bytearray": ({"input_ids": bytearray(b"\5\6")}, "TypeError: input_ids: expected a sequence of integers"),
    "set": ({5, 6}, "TypeError: input_ids: expected a sequence of integers, got set"),
    "frozenset": (frozenset({5, 6}), "TypeError: input_ids: expected a sequence of integers, got frozenset"),
    "type bytes": (
        {"input_ids": [5], "token_type_ids": b"\1"},
        "TypeError: token_type_ids: expected a sequence of integers, got bytes",
    ),
    "positions": ({"input_ids": [5, 6], "position_ids": [1, 0]}, "ValueError: position_ids: expected None"),
    "embeddings": ({"input_ids": [5], "inputs_embeds": torch.ones(1, 32)}, "ValueError: inputs_embeds: expected None"),
    "none": (None, "TypeError: input_ids: expected a sequence of integers, got None"),
    "no sequence": ({"input_ids": None}, "TypeError: input_ids: expected a sequence of integers, got None"),
    "number": (5, "TypeError: input_ids: expected a sequence of integers, got int"),
    "scalar": (torch.tensor(5), "TypeError: input_ids: expected a sequence of integers, got int"),
    "no data": (torch.ones(3, dtype=torch.int64, device="meta"), "NotImplementedError: "),
    "unreadable": (Lazy(), "OSError: the disk is gone"),
    "nested": ([[5, 6]], "TypeError: input_ids: expected integers, got list"),
    "no ids": ({"ids": [5]}, "KeyError: 'input_ids'"),
    "types": ({"input_ids": [5, 6], "token_type_ids": [0, 2]}, "ValueError: token_type_ids: expected values in [0, 2)"),
    "type count": ({"input_ids": [5, 6], "token_type_ids": [0]}, "ValueError: token_type_ids: expected 2 values"),
    "type floats": ({"input_ids": [5], "token_type_ids": [0.5]}, "TypeError: token_type_ids: expected integers"),
    "padding": ({"input_ids": [5, 0], "attention_mask": [1, 0]}, "ValueError: attention_mask: expected 2 times 1"),
    "mask count": ({"input_ids": [5], "attention_mask": [1, 1]}, "ValueError: attention_mask: expected 1 times 1"),
    "mask of a batch": (
        {"input_ids": [5, 6], "attention_mask": torch.ones(1, 2)},
        "ValueError: attention_mask: expected 2 times 1",
    ),
}


@pytest.mark.parametrize("place", [0, 7, 24])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_reported_and_the_others_are_answered(kind: str, place: int) -> None:
    fast = fast_model(threshold=0.5)
    bad, message = BAD[kind]
    rows: list[Any] = random_rows(24, seed=8, longest=12)
    expected = fast(*padded(rows))
    rows.insert(place, bad)
    results = list(fast.stream(rows, token_budget=20))
    reported = results.pop(place)
    assert reported.index == place and reported.error.startswith(message)
    assert all(getattr(reported, item.name) is None for item in fields(reported) if item.name not in ("index", "error"))
    assert_results(results[:place], expected)
    assert [result.index for result in results[place:]] == list(range(place + 1, 25))
    for row, result in enumerate(results):
        assert result.error is None
        torch.testing.assert_close(result.logits, expected.logits[row], **CLOSE)


@pytest.mark.parametrize("budget", [20, 8192])
@pytest.mark.parametrize("before", [0, 1, 200])
def test_what_came_before_the_source_failed_is_answered_first(before: int, budget: int) -> None:
    """20 tokens: windows are behind it and rows wait in the pools; 8,192: all are in the window being read."""
    fast = rx.accelerate(exiting(tiny_deebert()), impl="reference")
    rows = random_rows(200, seed=3)
    failure = OSError("the disk is gone")

    def failing() -> Iterator[list[int]]:
        yield from rows[:before]
        raise failure

    results = []
    with pytest.raises(OSError, match="the disk is gone") as raised:
        results.extend(fast.stream(failing(), token_budget=budget))  # extend keeps what came
    assert raised.value is failure and len(results) == before
    assert_results(results, fast(*padded(rows)))


def test_a_breakdown_is_told_to_the_rows_that_have_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 8 batches, of which some have answered when a launch fails; the rest of the source is not read."""
    fast = rx.accelerate(exiting(tiny_deebert()), impl="reference")
    rows = random_rows(400, seed=3)
    real, entered = SurvivorPools.put, []

    def put(pools: SurvivorPools, batch: RaggedBatch) -> list[Finished]:
        entered.append(batch.rows)
        if len(entered) == 40:
            raise MemoryError("no room")
        return real(pools, batch)

    monkeypatch.setattr(SurvivorPools, "put", put)
    results: list[rx.RowResult] = []
    with pytest.raises(MemoryError, match="no room"):
        results.extend(fast.stream(iter(rows), token_budget=60))
    monkeypatch.undo()
    assert sum(entered) <= len(results) < len(rows) and [row.index for row in results] == list(range(len(results)))
    lost = [row for row in results if row.error is not None]
    assert lost and all(row.error == "MemoryError: no room" and row.logits is None for row in lost)
    expected = fast(*padded(rows))
    kept = [row for row in results if row.error is None]
    assert len(kept) > sum(entered) // 2
    for row in kept:
        assert row.exit_layer == expected.exit_layer[row.index]
        torch.testing.assert_close(row.logits, expected.logits[row.index], **CLOSE)


@pytest.mark.parametrize("sequences", [None, 5], ids=repr)
def test_what_cannot_be_iterated_is_no_sequences(sequences: Any) -> None:
    with pytest.raises(TypeError, match=f"sequences: expected an iterable of sequences, got {sequences}"):
        next(fast_model().stream(sequences))


def test_types_that_no_table_reads_may_be_anything_that_fits() -> None:
    """DistilBERT has no token types; what lies beyond 64 bits cannot be packed, and must not end the stream."""
    fast = rx.accelerate(rx.DeeBert(config_of("distilbert")).eval(), impl="reference")
    good = {"input_ids": [5, 6], "token_type_ids": [7, 0]}
    first, bad, last = fast.stream([good, {"input_ids": [5], "token_type_ids": [2**70]}, good])
    assert bad.error.startswith("ValueError: token_type_ids: expected values in [0, 9223372036854775808)")
    assert torch.equal(first.logits, last.logits)


def test_an_interrupt_in_the_source_and_a_stream_that_is_closed_run_nothing_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast, rows = fast_model(), random_rows(100, seed=3)
    runs = watch_runs(monkeypatch)

    def interrupted() -> Iterator[list[int]]:
        yield from rows
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(fast.stream(interrupted()))
    assert not runs
    results = fast.stream(rows, token_budget=20)
    next(results)
    ran = len(runs)
    flushes: list[None] = []
    monkeypatch.setattr(SurvivorPools, "flush", lambda self: flushes.append(None))
    results.close()
    assert ran and len(runs) == ran and not flushes


def test_all_rows_bad_and_no_rows() -> None:
    fast = fast_model()
    results = list(fast.stream([[], "", None]))
    assert [result.index for result in results] == [0, 1, 2] and all(result.error for result in results)
    assert list(fast.stream([])) == []


def test_what_a_tokenizer_gives_besides_is_ignored() -> None:
    fast = fast_model()
    beside = {"labels": 1, "special_tokens_mask": [1, 0], "position_ids": None, "inputs_embeds": None}
    one, other = fast.stream([{"input_ids": [5, 6], **beside}, [5, 6]])
    assert one.error is None and torch.equal(one.logits, other.logits)


@pytest.mark.parametrize(
    "sequences",
    [{"input_ids": [[5, 6], [7]]}, BatchEncoding({"input_ids": [[5, 6]]}), "good film", b"good film"],
    ids=lambda value: type(value).__name__,
)
def test_a_whole_batch_or_text_in_place_of_rows(sequences: Any) -> None:
    with pytest.raises(TypeError, match=f"sequences: expected an iterable .* got one {type(sequences).__name__}"):
        next(fast_model().stream(sequences))


def test_a_bad_budget_is_an_error() -> None:
    for budget in (0, 10**9):
        with pytest.raises(ValueError, match=r"token_budget: expected 1 to 1,048,560, got"):
            list(fast_model().stream([[5]], token_budget=budget))
    with pytest.raises(TypeError, match="token_budget: expected an integer, got float"):
        list(fast_model().stream([[5]], token_budget=100.0))


@pytest.mark.parametrize("budget", [np.int64(8), torch.tensor(8)], ids=["numpy", "torch"])
def test_a_budget_of_any_integer_type(budget: Any) -> None:
    rows = random_rows(9, 5)
    for one, other in zip(fast_model().stream(rows, budget), fast_model().stream(rows, 8), strict=True):
        assert one.error is None and torch.equal(one.logits, other.logits)


def test_rows_may_be_given_in_one_buffer_again_and_again() -> None:
    """Rows wait for others: what the caller does with his memory meanwhile is his business."""
    fast, rows, buffer = fast_model(), random_rows(30, 5), []

    def reusing() -> Iterator[list[int]]:
        for row in rows:
            buffer[:] = row
            yield buffer

    for one, other in zip(fast.stream(reusing()), fast.stream(rows), strict=True):
        assert torch.equal(one.logits, other.logits)


def test_ids_of_any_integer_type_may_meet_in_a_batch() -> None:
    fast, rows = fast_model(), random_rows(20, 5)
    kinds: list[Any] = [int, np.uint64, np.int8, np.uint8]
    mixed = [[kinds[(row + place) % 4](token) for place, token in enumerate(ids)] for row, ids in enumerate(rows)]
    for one, other in zip(fast.stream(mixed), fast.stream(rows), strict=True):
        assert one.error is None and torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("impl", impls())
def test_several_threads_share_one_model(impl: str) -> None:
    fast, rows = rx.accelerate(exiting(tiny_deebert()), impl=impl), random_rows(60, 5)
    expected = list(fast.stream(rows, token_budget=50))

    def work(number: int) -> list[rx.RowResult]:
        torch.set_num_threads(1)  # a thread's own
        found = []
        for _ in range(5):
            found = list(fast.stream(rows, token_budget=50))
            fast(*padded(rows[number : number + 7]))
        return found

    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(work, range(4)):
            for one, other in zip(found, expected, strict=True):
                assert one.exit_layer == other.exit_layer
                torch.testing.assert_close(one.logits, other.logits, **CLOSE)


def test_what_a_stream_leaves_behind_is_bounded() -> None:
    fast, budget = rx.accelerate(exiting(tiny_deebert())), 64
    list(fast.stream(random_rows(300, 5), token_budget=budget))
    kept = sum(buffer.numel() for buffer, _ in fast.executor.buffers._spare)
    assert 0 < kept <= (len(fast.executor.stages) + 2) * budget * 32


def test_a_refresh_in_mid_stream_is_for_the_next_one() -> None:
    """The rows that are still to come are read, too, as the model was when the stream began."""
    model = exiting(tiny_deebert())
    fast, rows = rx.accelerate(model), random_rows(30, 5)
    expected = [row.logits for row in fast.stream(rows)]

    def refreshing() -> Iterator[list[int]]:
        yield from rows[:20]
        model.backbone.resize_token_embeddings(VOCAB + 20)
        randomise(model, seed=5)
        fast.refresh()
        yield from rows[20:]
        yield [VOCAB + 10]

    *results, beyond = fast.stream(refreshing(), token_budget=30)
    for result, logits in zip(results, expected, strict=True):
        assert torch.equal(result.logits, logits)
    assert f"expected values in [0, {VOCAB})" in beyond.error
    assert next(fast.stream([[VOCAB + 10]])).error is None


def test_answers_are_ordinary_tensors() -> None:
    """Not inference tensors, which no loss can be computed from and nothing be written into."""
    fast = fast_model()
    (row,) = fast.stream([[5, 6]])
    for logits in (row.logits, fast(torch.tensor([[5, 6]])).logits):
        assert not logits.is_inference()
        logits.add_(1)
        (logits * torch.ones(3, requires_grad=True)).sum().backward()
