"""Every system end to end on a GPU: as its plain model answers on the CPU, row by row, in fp32."""

from __future__ import annotations

import pytest
import torch
from system_cases import CASES, Case, Reference, batch_of
from tiny import random_rows

import ragged_exit as rx

TIE = 2e-3  # on what decides: further apart than fp32 sums of another order and the GPU's fast exp come
ROWS = random_rows(12, seed=7, longest=12)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def without_ties(case: Case) -> tuple[rx.EarlyExitModel, Reference]:
    """A model none of whose rows is near another decision, and what it says of them."""
    for seed in range(50):
        model = case.build(case.backbones[0], seed)
        found = Reference(model, ROWS)
        found.use(found.quiet(0.4))
        if found.closest_tie() > TIE and found.gather("executed_layers").unique().numel() > 1:
            return model, found
    raise AssertionError(f"{case.name}: every seed has a tie")


def assert_same(output, found: Reference, rows: slice = slice(None)) -> None:
    for name in ("exit_layer", "exit_member", "executed_layers"):
        assert torch.equal(getattr(output, name), found.gather(name)[rows]), name
    torch.testing.assert_close(output.logits, found.gather("logits")[rows], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_answers_as_on_the_cpu(case):
    model, found = without_ties(case)
    fast = rx.accelerate(model, rule=found.rule, device="cuda")
    assert fast.impl == "triton"
    ids, mask = batch_of(ROWS, case.backbones[0])
    assert_same(fast(ids, mask), found)
    assert_same(fast(ids[:1], mask[:1]), found, slice(0, 1))


def test_a_stream_of_sequences_answers_as_a_batch():
    model, found = without_ties(next(case for case in CASES if case.name == "deebert"))
    results = list(rx.accelerate(model, rule=found.rule, device="cuda").stream(ROWS, token_budget=32))
    assert [result.exit_layer for result in results] == found.gather("exit_layer").tolist()


def test_the_tensors_device_counts_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("this needs two GPUs")
    model, found = without_ties(next(case for case in CASES if case.name == "deebert"))
    fast = rx.accelerate(model, rule=found.rule, device="cuda:1")
    with torch.cuda.device(0):
        assert_same(fast(*batch_of(ROWS, "bert")), found)
