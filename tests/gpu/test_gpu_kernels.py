"""The Triton kernels on a real GPU: CUDA graphs and the bits of repeated calls. The op suite: `make gpu-tests`."""

from __future__ import annotations

import pytest
import torch

from ragged_exit.batch import RaggedBatch
from ragged_exit.heads import MlpHead
from ragged_exit.ops import ExitDecision, compact, exit_step
from ragged_exit.rules import DistanceEntropy, Entropy, ExitRule, Patience
from ragged_exit.testing import assert_plan, random_batch, random_head, random_lengths, random_state, seeded

RULES = (Entropy(0.5), Patience(2), DistanceEntropy(0.5))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def make(rule: ExitRule, rows: int = 300, classes: int = 3, dtype: torch.dtype = torch.bfloat16):
    generator = seeded(rows)
    batch = random_batch(random_lengths(rows, 40, generator), 768, generator, dtype=dtype, device="cuda")
    prototype_size = 768 if rule.needs == "prototypes" else None
    head = random_head(
        768, classes, generator, pooled_size=768, prototype_size=prototype_size, dtype=dtype, device="cuda"
    )
    batch.state = random_state(rule, rows, classes, generator, device="cuda")
    return batch, head


def decided(batch: RaggedBatch, head: MlpHead, rule: ExitRule) -> ExitDecision:
    return exit_step(batch, head, rule, impl="triton")


def captured(
    batch: RaggedBatch, head: MlpHead, rule: ExitRule
) -> tuple[torch.cuda.CUDAGraph, ExitDecision, RaggedBatch]:
    """A graph of an exit step and its compaction, both compiled and loaded before the capture, which allows neither."""
    compact(batch, decided(batch, head, rule), batch.tokens, impl="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decision = decided(batch, head, rule)
        compacted = compact(batch, decision, batch.tokens, impl="triton")
    return graph, decision, compacted


def tensors(decision: ExitDecision) -> list[torch.Tensor]:
    return [*decision[:-1], *decision.state.values()]


def bits(values: list[torch.Tensor]) -> list[bytes]:
    return [value.reshape(-1).view(torch.uint8).cpu().numpy().tobytes() for value in values]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("classes", [3, 1024, 5000])
def test_hundred_replays_have_the_same_bits(rule, classes):
    """Programs finish in another order each time; the tickets must be back at zero each time."""
    batch, head = make(rule, classes=classes)
    eager = decided(batch, head, rule)
    assert_plan(batch, eager)
    graph, decision, compacted = captured(batch, head, rule)
    expected = None
    for _ in range(100):
        for value in tensors(decision):
            value.zero_()  # what the replay does not write again shows
        compacted.hidden.fill_(1)
        graph.replay()
        found = bits([*tensors(decision), compacted.hidden, compacted.sample_ids])
        assert expected is None or found == expected
        expected = found
    assert bits(tensors(decision)) == bits(tensors(eager))


def test_a_replay_follows_its_inputs():
    """Other hidden states and fewer live rows in the captured buffers: the plan and the zero tail follow."""
    rule = Entropy(0.5)
    batch, head = make(rule, rows=64)
    graph, decision, compacted = captured(batch, head, rule)
    other, _ = make(rule, rows=40)
    batch.hidden.zero_()
    batch.hidden[: other.tokens] = other.hidden
    batch.cu_seqlens[:41] = other.cu_seqlens
    batch.cu_seqlens[41:] = other.tokens
    batch.live.copy_(other.live)
    graph.replay()
    expected = decided(other, head, rule)
    rows, tokens = expected.live.tolist()
    assert decision.live.tolist() == [rows, tokens]
    assert bits([decision.score[:40], decision.survivors[:rows]]) == bits([expected.score, expected.survivors[:rows]])
    survivors = compact(other, expected, tokens, impl="triton")
    assert torch.equal(compacted.hidden[:tokens], survivors.hidden) and not compacted.hidden[tokens:].any()


def test_two_graphs_replay_at_once():
    """Two captures on one stream, replayed on two: their tickets are not the same."""
    rule = Entropy(0.5)
    batch, head = make(rule, rows=2000)
    expected = bits(tensors(decided(batch, head, rule)))
    graphs, decisions, _ = zip(*(captured(batch, head, rule) for _ in range(2)), strict=True)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for decision in decisions:
            assert bits(tensors(decision)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [2, 1024, 5000])
def test_a_row_alone_has_the_same_bits(dtype, classes):
    rule = Entropy(0.5)
    batch, head = make(rule, classes=classes, dtype=dtype)
    together = decided(batch, head, rule)
    bounds = batch.cu_seqlens.tolist()
    for row in (0, 17, 299):
        hidden = batch.hidden[bounds[row] : bounds[row + 1]].clone()
        alone = decided(RaggedBatch.from_seqlens(batch.seqlens[row : row + 1], "cuda", hidden=hidden), head, rule)
        for name in ("logits", "score"):
            assert bits([getattr(alone, name)[0]]) == bits([getattr(together, name)[row]]), name
