"""compact: the survivors' tokens and rows, exactly; the expected values come from Python lists."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import MOST_ROWS, seeds
from torch import Tensor

from ragged_exit.batch import RaggedBatch
from ragged_exit.ops import ExitDecision, compact, exit_decide
from ragged_exit.rules import LearnedUncertainty
from ragged_exit.testing import assert_compacted, assert_same_values, random_batch, seeded


def decide_by_hand(batch: RaggedBatch, exits: list[bool]) -> ExitDecision:
    """A decision made without any op: these rows leave."""
    stay = [row for row in range(batch.rows) if not exits[row]]
    spare = batch.row_capacity - len(stay)
    bounds = torch.tensor([0, *batch.seqlens[stay].tolist()], dtype=torch.int32).cumsum(0).tolist()
    device = batch.device
    return ExitDecision(
        logits=torch.zeros(batch.row_capacity, 2, device=device),
        score=torch.zeros(batch.row_capacity, device=device),
        exits=torch.tensor(exits + [False] * (batch.row_capacity - batch.rows), device=device),
        survivors=torch.tensor(stay + [-1] * spare, dtype=torch.int32, device=device),
        cu_seqlens=torch.tensor(bounds + [bounds[-1]] * spare, dtype=torch.int32, device=device),
        live=torch.tensor([len(stay), bounds[-1]], dtype=torch.int32, device=device),
        state={},
    )


def add_state(batch: RaggedBatch, generator: torch.Generator) -> None:
    """Row state of many shapes and dtypes."""
    rows, device = batch.row_capacity, batch.device
    batch.state = {
        "counter": torch.randint(0, 9, (rows,), generator=generator, dtype=torch.int32).to(device),
        "flag": (torch.rand(rows, generator=generator) < 0.5).to(device),
        "past": torch.randn(rows, 2, 3, generator=generator).to(device),
        "wide": torch.randn(rows, 5, generator=generator).double().to(device),
        "low": torch.randn(rows, 7, generator=generator).bfloat16().to(device),
    }


@given(
    rows=st.lists(st.tuples(st.integers(1, 24), st.booleans()), min_size=1, max_size=MOST_ROWS),
    hidden_size=st.integers(1, 130),
    spare=st.sampled_from((0, 1, 9)),
    spare_tokens=st.sampled_from((0, 5, 70)),
    extra=st.sampled_from((None, 0, 1, 40)),
    seed=seeds,
)
def test_gathers_the_survivors(impl, dtype, device, rows, hidden_size, spare, spare_tokens, extra, seed):
    generator = seeded(seed)
    batch = random_batch(
        [length for length, _ in rows],
        hidden_size,
        generator,
        dtype=dtype,
        device=device,
        spare_rows=spare,
        spare_tokens=spare_tokens,
        tail=math.nan,
        token_ids=True,
    )
    add_state(batch, generator)
    exits = [left for _, left in rows]
    if all(exits):
        exits[len(exits) // 2] = False
    decision = decide_by_hand(batch, exits)
    tokens = int(decision.live[1])
    capacity = None if extra is None and device == "cpu" else tokens + (extra or 0)
    compacted = compact(batch, decision, capacity, impl=impl)
    assert_compacted(batch, decision, compacted, capacity)
    if device == "cpu":
        assert compacted.row_capacity == compacted.rows == exits.count(False)
        assert all(len(value) == compacted.rows for value in [compacted.sample_ids, *compacted.state.values()])


def test_special_values_travel_unchanged(impl, device):
    batch = random_batch([2, 1, 3], 4, seeded(1), device=device)
    values = torch.tensor([math.nan, math.inf, -math.inf, 1e-42], device=device)
    batch.hidden[:] = values
    batch.state = {"previous": torch.tensor([math.nan, 1.0, math.inf], device=device)}
    compacted = compact(batch, decide_by_hand(batch, [False, True, False]), 8, impl=impl)
    assert_same_values(compacted.hidden[:5], values.expand(5, 4))
    assert not compacted.hidden[5:].any()
    assert_same_values(compacted.state["previous"][:2], torch.tensor([math.nan, math.inf], device=device))


def test_updated_state_wins(impl, device):
    """What the decision says of the row state replaces what the batch says."""
    batch = random_batch([2, 1, 3], 4, seeded(2), device=device)
    batch.state = {"counter": torch.tensor([1, 2, 3], dtype=torch.int32, device=device)}
    decision = decide_by_hand(batch, [True, False, False])
    decision = decision._replace(state={"counter": torch.tensor([7, 8, 9], dtype=torch.int32, device=device)})
    compacted = compact(batch, decision, 4, impl=impl)
    assert compacted.state["counter"][:2].tolist() == [8, 9]


def test_everyone_stays(impl, device):
    batch = random_batch([2, 1, 3], 5, seeded(3), device=device, token_ids=True)
    compacted = compact(batch, decide_by_hand(batch, [False] * 3), 6, impl=impl)
    assert_same_values(compacted.hidden, batch.hidden)
    assert compacted.seqlens.tolist() == [2, 1, 3]
    pairs = ((compacted.hidden, batch.hidden), (compacted.sample_ids, batch.sample_ids))
    for new, old in pairs:  # an op never returns an input, even when nothing changes
        assert new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr()


@pytest.mark.parametrize("start, stop", [(0, 3), (0, 1), (1, 3), (2, 3)])
def test_some_of_the_survivors_go_where_they_are_told(impl, dtype, device, start, stop):
    """A slice of the plan, into a place within a larger buffer: what is around stays, and nothing is copied twice."""
    batch = random_batch([3, 1, 5, 2], 13, seeded(5), dtype=dtype, device=device, token_ids=True)
    add_state(batch, seeded(5))
    decision = decide_by_hand(batch, [False, True, False, False])
    whole = compact(batch, decision, 10, impl=impl)
    first, last = decision.cu_seqlens[[start, stop]].tolist()
    some = decision._replace(
        survivors=decision.survivors[start:stop],
        cu_seqlens=decision.cu_seqlens[start : stop + 1] - first,
        live=torch.tensor([stop - start, last - first], dtype=torch.int32, device=device),
    )
    buffer = torch.full((20, 13), 7.0, dtype=dtype, device=device)
    place = buffer[4 : 4 + last - first]
    part = compact(batch, some, last - first, out=place, impl=impl)
    assert part.hidden is place
    assert_same_values(place, whole.hidden[first:last])
    assert (buffer[:4] == 7).all() and (buffer[4 + last - first :] == 7).all()
    assert_same_values(part.input_ids, whole.input_ids[first:last])
    assert part.live.tolist() == [stop - start, last - first]
    assert_same_values(part.sample_ids[: stop - start], whole.sample_ids[start:stop])
    for name, value in part.state.items():
        assert_same_values(value[: stop - start], whole.state[name][start:stop])


def test_a_place_that_does_not_fit_is_refused(impl, device):
    batch = random_batch([2, 1, 3], 4, seeded(6), device=device)
    decision = decide_by_hand(batch, [True, False, False])
    for out in (
        torch.empty(5, 4, device=device),
        torch.empty(4, 5, device=device),
        torch.empty(4, 8, device=device)[:, :4],
        torch.empty(4, 4, dtype=torch.float64, device=device),
        torch.empty(4, 4, device="meta"),
    ):
        with pytest.raises(ValueError, match=r"out: expected contiguous torch\.float32 \[4, 4\]"):
            compact(batch, decision, 4, out=out, impl=impl)
    with pytest.raises(ValueError, match="out: expected None"):
        compact(batch.with_hidden(None), decision, 4, out=torch.empty(4, 4, device=device), impl=impl)


def test_odd_memory(impl, dtype, device):
    """Strided, transposed and misaligned sources."""
    batch = random_batch([3, 1, 5, 2], 13, seeded(4), dtype=dtype, device=device)
    decision = decide_by_hand(batch, [False, True, False, True])
    expected = compact(batch, decision, 10, impl=impl)
    wide = torch.full((11, 20), math.nan, dtype=dtype, device=device)
    wide[:, 3:16] = batch.hidden
    shifted = torch.empty(11 * 13 + 1, dtype=dtype, device=device)
    shifted[1:] = batch.hidden.reshape(-1)
    for hidden in (wide[:, 3:16], batch.hidden.T.contiguous().T, shifted[1:].view(11, 13)):
        assert_same_values(compact(batch.with_hidden(hidden), decision, 10, impl=impl).hidden, expected.hidden)
    past = torch.arange(24.0, device=device).view(3, 2, 4).permute(2, 0, 1)  # [4, 3, 2], strided
    batch.state = {"past": past, "counter": torch.arange(8, dtype=torch.int32, device=device)[::2]}
    state = compact(batch, decision, 10, impl=impl).state
    assert_same_values(state["past"][:2], past[[0, 2]])
    assert state["counter"][:2].tolist() == [0, 4]


def test_twice(impl, device):
    """Compacting what was compacted: the op's own outputs are good inputs, and sample ids tell who is left."""
    generator = seeded(5)
    batch = random_batch([3, 1, 5, 2, 4, 1], 9, generator, device=device, token_ids=True, spare_rows=2, spare_tokens=3)
    add_state(batch, generator)
    original = batch
    for signal in ([0.0, 1, 0, 0, 1, 0, 0, 0], [1.0, 0, 1, 0, 0, 0, 0, 0]):
        values = torch.tensor(signal[: batch.row_capacity], device=device)
        logits = torch.zeros(batch.row_capacity, 2, device=device)
        decision = exit_decide(batch, logits, LearnedUncertainty(0.5, compare=">"), signal=values, impl=impl)
        after = compact(batch, decision, int(decision.live[1]) + 4, impl=impl)
        assert_compacted(batch, decision, after, int(decision.live[1]) + 4)
        batch = after
    assert batch.sample_ids[:2].tolist() == [2, 5] and batch.cu_seqlens[:3].tolist() == [0, 5, 6]
    assert_same_values(batch.hidden[:5], original.hidden[4:9])
    assert_same_values(batch.hidden[5:6], original.hidden[15:16])


def test_only_token_ids(impl, device):
    """A cascade compacts before the embeddings: no hidden states, ids alone."""
    batch = RaggedBatch.from_sequences([[5, 6], [7], [8, 9, 10]], device=device)
    compacted = compact(batch, decide_by_hand(batch, [True, False, False]), 4, impl=impl)
    assert compacted.hidden is None and compacted.token_type_ids is None
    assert compacted.input_ids.tolist() == [7, 8, 9, 10] and compacted.position_ids.tolist() == [0, 0, 1, 2]


def test_another_batchs_decision_or_state_is_refused(impl, device):
    batch = random_batch([2, 1, 3], 4, seeded(6), device=device)
    decision = decide_by_hand(batch, [True, False, False])
    with pytest.raises(ValueError, match=r"decision: expected one of 3 rows, got \[2\]"):
        compact(batch, decision._replace(exits=decision.exits[:2]), 4, impl=impl)
    with pytest.raises(ValueError, match=r"decision: expected cu_seqlens int32 \[3\] on .*, got torch.int32 \[4\]"):
        compact(batch, decision._replace(survivors=decision.survivors[:2]), 4, impl=impl)
    for name in ("survivors", "cu_seqlens", "live"):
        value = getattr(decision, name)
        for bad in (value.long(), value.to(torch.int8), value[None], value[:-1], value.to("meta")):
            with pytest.raises(ValueError, match=r"decision: expected \w+ int32 \[\d\] on"):
                compact(batch, decision._replace(**{name: bad}), 4, impl=impl)
    if batch.live_on_host:
        few = decision._replace(survivors=decision.survivors[:1], cu_seqlens=decision.cu_seqlens[:2])
        with pytest.raises(ValueError, match="decision: expected at most 1 live rows, as it has survivors, got 2"):
            compact(batch, few, 4, impl=impl)
    for bad in (torch.zeros(2, 5, device=device), torch.zeros((), device=device), torch.zeros(3, device="meta")):
        batch.state = {"past": bad}
        with pytest.raises(ValueError, match=r'state."past".: expected \[3, ...\]'):
            compact(batch, decision, 4, impl=impl)


def test_errors_name_the_argument(impl, device):
    if device != "cpu":
        pytest.skip("on a GPU the counts are not on the host")
    batch = random_batch([2, 1, 3], 4, seeded(6))
    with pytest.raises(ValueError, match=r"token_capacity: expected at least 4 .* got 3"):
        compact(batch, decide_by_hand(batch, [True, False, False]), 3, impl=impl)
    with pytest.raises(ValueError, match="decision: nobody survives"):
        compact(batch, decide_by_hand(batch, [True, True, True]), impl=impl)


def _bits(value: Tensor) -> Tensor:
    return value.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])


def test_bit_patterns(impl, device):
    """A gather copies bits: signed zeros and NaN payloads too, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        batch = random_batch([2, 1, 3], 4, seeded(7), device=device)
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[torch.empty(0, dtype=dtype).element_size()]
        info = torch.iinfo(kind)
        bits = torch.randint(info.min, info.max, (6, 4), generator=seeded(8), dtype=kind).to(device)
        bits[0, 0] = info.min  # -0.0
        batch.hidden = bits.view(dtype)
        compacted = compact(batch, decide_by_hand(batch, [False, True, False]), 5, impl=impl)
        assert torch.equal(_bits(compacted.hidden), bits[[0, 1, 3, 4, 5]])
