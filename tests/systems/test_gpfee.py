"""A new system in one file: GPFEE, whose exits see all past pooled vectors (row state) and imagine the future ones."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from system_cases import Reference, batch_of, config_of, randomised
from test_accelerated_systems import assert_same
from tiny import impls, random_rows
from torch import nn

import ragged_exit as rx


class Gpfee(rx.LayeredModel):
    """Logits at layer i: 2 g past + (2 - 2 g) future, from pooled vectors 0..i and predicted ones of i+1..L-1."""

    system = "gpfee_of_the_test"

    def __init__(self, config, rule=None, **options):
        super().__init__(config, rule or rx.Entropy(0.0, dialect="castorini"), **options)
        depth, hidden, labels = config.num_hidden_layers, config.hidden_size, config.num_labels
        self.poolers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
        self.predict = nn.Parameter(torch.randn(depth, hidden, hidden))  # from this layer's pooled vector to layer l's
        self.classify = nn.Parameter(torch.randn(depth, hidden, 2 * labels))
        self.gate = nn.Linear(labels, labels)

    def layer_exits(self):
        return [rx.LayerExit(PooledOnly(self, layer), layer + 1, layer) for layer in range(self.num_exits)]

    def exit_points(self, *inputs):
        points = super().exit_points(*inputs)
        pooled = torch.stack([point.output.features for point in points], 1)  # [B, L, H]
        logits = [self.logits(pooled[:, : layer + 1], layer) for layer in range(len(points))]
        return [replace(point, output=rx.HeadOutput(own)) for point, own in zip(points, logits, strict=True)]

    def logits(self, past, layer):
        """past ``[B, layer + 1, H]`` -> ``[B, C]``."""
        future = torch.tanh(torch.einsum("bh,lhk->blk", past[:, -1], self.predict[layer + 1 :]))
        answers, gates = torch.einsum("blh,lhc->blc", torch.cat((past, future), 1), self.classify).chunk(2, -1)
        weight = 2 * torch.sigmoid(self.gate(torch.tanh(gates[:, : layer + 1].mean(1))))
        return weight * answers[:, : layer + 1].sum(1) + (2 - weight) * answers[:, layer + 1 :].sum(1)


class PooledOnly(NamedTuple):
    model: Gpfee  # one exit of the padded reference: the pooled vector, of which exit_points makes logits
    layer: int

    def __call__(self, hidden, attention_mask):
        return rx.HeadOutput(hidden[:, 0, :0], features=torch.tanh(self.model.poolers[self.layer](hidden[:, 0])))

    def packed(self, encoder):
        return PackedHead(*self)


class PackedHead(NamedTuple):
    model: Gpfee  # the same exit on the rows that are left; their past pooled vectors are row state
    layer: int

    def __call__(self, batch):
        own = torch.tanh(self.model.poolers[self.layer](batch.hidden[batch.cu_seqlens[:-1].long()]))[:, None]
        batch.state["past"] = own if self.layer == 0 else torch.cat((batch.state["past"], own), 1)  # [B, layer + 1, H]
        return rx.HeadOutput(self.model.logits(batch.state["past"], self.layer))


@pytest.mark.parametrize("impl", impls())
def test_a_new_system_needs_no_change_to_the_package(impl: str) -> None:
    model = randomised(Gpfee(config_of("bert")), seed=5)
    rows = random_rows(20, seed=5)
    found = Reference(model, rows)
    found.use(found.quiet(0.4))
    assert found.gather("exit_layer").unique().numel() > 2
    assert_same(rx.accelerate(model, rule=found.rule, impl=impl)(*batch_of(rows, "bert")), found)
