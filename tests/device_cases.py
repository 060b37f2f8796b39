"""Whole tiny models with row capacities that stay, as on a GPU, against the path on which the host sees every count."""

from __future__ import annotations

import pytest
import torch
from system_cases import CASES, LAYERS, Reference, config_of, randomised
from tiny import random_rows
from torch import Tensor

import ragged_exit as rx
from ragged_exit.accelerate import AcceleratedModel
from ragged_exit.batch import RaggedBatch
from ragged_exit.executor import ExitRecord
from ragged_exit.ops import ExitDecision

# [CLS] and mean pooling, patience state, prototypes, a head outside the fused step, restarts; each with a seed that
# makes rows leave at several exits
SYSTEMS = {"deebert": 3, "deebert_mean": 3, "pabee": 3, "de3bert": 2, "fastbert": 1, "cascade": 3}
ARMS = (0.4, 0.6, 0.9)
Run = tuple[ExitRecord, list[ExitDecision]]


def run(
    fast: AcceleratedModel, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch, *, on_host: bool, spare: int = 0
) -> Run:
    """``fast`` on ``rows``; ``spare``: how much larger the row capacity is than what lives."""
    batch = fast.encoder.pack_sequences(rows)
    if spare:
        batch.cu_seqlens = torch.cat((batch.cu_seqlens, batch.cu_seqlens[-1:].expand(spare)))
        batch.sample_ids = torch.cat((batch.sample_ids, batch.sample_ids.new_full((spare,), -1)))
    seen: list[ExitDecision] = []
    with monkeypatch.context() as patch:
        if not on_host:
            patch.setattr(RaggedBatch, "live_on_host", False)
        with torch.inference_mode():
            record = fast.executor.run(batch, seen.append)
    if not on_host:
        assert {len(decision.exits) for decision in seen} == {len(rows) + spare}, "the row capacity did not stay"
    return record, seen


def assert_same_runs(device: Run, host: Run, *, exact: bool) -> None:
    """Every stage's decision on the rows that it was asked about, and every row's answer; ``exact``: to the bit."""
    limit = 0.0 if exact else 2e-5

    def assert_same(one: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(one, other, rtol=0, atol=limit if one.is_floating_point() else 0)

    for one, other in zip(device[0], host[0], strict=True):
        assert_same(one, other)
    asked = len(host[1][0].exits)
    for ours, theirs in zip(device[1], host[1], strict=True):
        assert not ours.exits[asked:].any() and not ours.logits[asked:].any()
        assert ours.live.tolist() == theirs.live.tolist()
        left = int(ours.live[0])
        for name in ("exits", "logits", "score"):
            assert_same(getattr(ours, name)[:asked], getattr(theirs, name)[:asked])
        assert_same(ours.survivors[:left], theirs.survivors[:left])
        assert ours.survivors[left:].eq(-1).all()
        assert_same(ours.cu_seqlens[: left + 1], theirs.cu_seqlens[: left + 1])
        assert ours.state.keys() == theirs.state.keys()
        for name in theirs.state:
            assert_same(ours.state[name][:asked], theirs.state[name][:asked])
        asked = left


def check_system(name: str, impl: str, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that leave at several exits, with a capacity larger than what lives from the start."""
    model = build(name)
    fast = rx.accelerate(model, rule=Reference(model, rows).quiet(0.3), impl=impl)
    host = run(fast, rows, monkeypatch, on_host=True)
    assert host[0].executed_layers.unique().numel() > 1
    for spare in (0, 3):
        device = run(fast, rows, monkeypatch, on_host=False, spare=spare)
        assert_same_runs(device, host, exact=impl == "native")


def check_ends(name: str, impl: str, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows leave at the first exit, or none before the last; and one row alone."""
    model = build(name)
    stages = []
    for threshold in (-1e9, 1e9):
        fast = rx.accelerate(model, threshold=threshold, impl=impl)
        for some in (rows, rows[:1]):
            host = run(fast, some, monkeypatch, on_host=True)
            device = run(fast, some, monkeypatch, on_host=False)
            assert_same_runs(device, host, exact=impl == "native")
            stages.append(len(device[1]))
    assert sorted(stages) == [1, 1] + [len(fast.executor.stages)] * 2


def build(name: str) -> rx.EarlyExitModel:
    case = next(case for case in CASES if case.name == name)
    return case.build(case.backbones[0], SYSTEMS[name])


def check_online(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member whose rule learns hears of the rows that reached it, not of the places that others left behind."""
    states = []
    for on_host in (True, False):
        rule = rx.UcbMaxProb(ARMS)
        config = config_of("bert")
        small = config_of("bert", hidden_size=16, num_attention_heads=2, num_hidden_layers=2)
        members = [rx.FullDepth(small), rx.ElasticBert(config, rule, exit_layers=[2, LAYERS])]
        model = randomised(rx.CascadeBert.from_members(members, rx.MaxProb(0.0)), seed=2)
        rows = random_rows(9, seed=2, longest=8)
        model.rule = Reference(model, rows).quiet(0.5)
        record, _ = run(rx.accelerate(model, impl=impl), rows, monkeypatch, on_host=on_host)
        states.append(rule.state_dict())
        assert sum(rule.pulls) == int((record.exit_member == 2).sum())
    assert states[0] == states[1] and 0 < sum(states[0]["pulls"]) < 9
