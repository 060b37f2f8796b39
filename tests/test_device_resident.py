"""The path of a GPU, where row capacities stay and ``live`` does not reach the host for nothing, driven on the CPU.

Triton's kernels go the same way in triton_kernels/interpreted.
"""

from __future__ import annotations

import pytest
import torch
from device_cases import SYSTEMS, build, check_ends, check_online, check_system
from tiny import impls, one_thread, padded, random_rows  # noqa: F401

import ragged_exit as rx
from ragged_exit.batch import RaggedBatch
from ragged_exit.linears import PackedLinear, prepacking_available
from ragged_exit.ops import compact, exit_decide
from ragged_exit.rules import Entropy
from ragged_exit.testing import assert_compacted, random_batch, seeded


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_whole_model_answers_as_on_the_host(name: str, impl: str, monkeypatch) -> None:
    check_system(name, impl, random_rows(12, seed=3, longest=12), monkeypatch)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("name", ["deebert", "deebert_mean", "de3bert", "fastbert"])
def test_all_leave_at_once_or_nobody_does(name: str, impl: str, monkeypatch) -> None:
    check_ends(name, impl, random_rows(5, seed=3, longest=12), monkeypatch)


@pytest.mark.parametrize("impl", impls())
def test_a_rule_that_learns_hears_of_live_rows_only(impl: str, monkeypatch) -> None:
    check_online(impl, monkeypatch)


@pytest.mark.parametrize("impl", impls())
def test_compact_keeps_the_row_capacity(impl: str, monkeypatch) -> None:
    """Twice in a row: the second finds rows and tokens past the live ones. Nobody's survival is no error either."""
    monkeypatch.setattr(RaggedBatch, "live_on_host", False)
    batch = random_batch([3, 1, 4, 2, 5], 8, seeded(0), spare_rows=2, spare_tokens=4, token_ids=True)
    with pytest.raises(ValueError, match="token_capacity"):
        compact(batch, exit_decide(batch, torch.zeros(7, 2), Entropy(0.5), impl=impl), impl=impl)
    for leaving, capacity in (([1, 3], 14), ([0], 12), ([0, 1], 9)):
        logits = torch.zeros(7, 2)  # entropy ln 2: they stay
        logits[leaving, 0] = 20.0
        decision = exit_decide(batch, logits, Entropy(0.5), impl=impl)
        found = compact(batch, decision, capacity, impl=impl)
        assert found.row_capacity == 7 and found.seqlens is batch.seqlens
        rows, tokens = found.live.tolist()
        assert found.cu_seqlens[rows:].eq(tokens).all()
        assert_compacted(batch, decision, found, capacity)
        batch = found
    assert batch.live.tolist() == [0, 0] and not batch.hidden.any()


@pytest.mark.parametrize("impl", impls())
def test_the_default_device_is_nobodys_business(impl: str) -> None:
    """torch.set_default_device is for the caller's own tensors, and the kernels take the addresses of ours."""
    fast = rx.accelerate(build("pabee"), impl=impl)
    ids, mask = padded(random_rows(6, seed=3, longest=12))
    expected = fast(ids, mask)
    prepacking_available.cache_clear()
    with torch.device("meta"):
        found = fast(ids, mask)
        assert prepacking_available() == (PackedLinear(torch.zeros(8, 8, device="cpu"), None).kind == "onednn")
    assert found.executed_layers.unique().numel() > 1
    for one, other in zip(found.to_tuple(), expected.to_tuple(), strict=True):
        assert torch.equal(one, other)
