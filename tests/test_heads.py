"""MlpHead: what it says of itself, what it refuses, and how it moves."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ragged_exit.heads import HeadOutput, MlpHead
from ragged_exit.testing import random_head, seeded


def test_sizes():
    plain = random_head(12, 3, seeded(1))
    pooled = random_head(12, 3, seeded(1), pooled_size=7)
    assert (plain.hidden_size, plain.num_labels) == (12, 3)
    assert (pooled.hidden_size, pooled.num_labels) == (12, 3) and pooled.classifier_weight.shape == (3, 7)


def test_what_a_head_offers():
    assert random_head(4, 2, seeded(1)).offers == set()
    assert random_head(4, 2, seeded(1), uncertainty=True).offers == {"uncertainty"}
    assert random_head(4, 2, seeded(1), prototype_size=3).offers == {"prototypes"}
    assert random_head(4, 2, seeded(1), uncertainty=True, prototype_size=3).offers == {"uncertainty", "prototypes"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "max"}, r"pooling: expected one of \('cls', 'mean'\), got 'max'"),
        ({"pooler_weight": torch.zeros(6, 12)}, r"pooler_weight: expected \[5, H\].* got \[6, 12\]"),
        ({"prototypes": torch.zeros(2, 4)}, r"prototypes: expected 3 rows \(classes\), got 2"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        MlpHead(torch.zeros(3, 5), **fields)


def test_moving_copies_everything():
    """``to``: another dtype, detached and contiguous, always a copy, and no stale packed weights."""
    head = random_head(12, 3, seeded(2), pooled_size=7, uncertainty=True, prototype_size=5, pooling="mean")
    weight = head.pooler_weight.T.contiguous().T.requires_grad_()
    head = dataclasses.replace(head, pooler_weight=weight, packed_pooler=torch.ones(9))
    for dtype in (torch.float32, torch.bfloat16):
        moved = head.to(dtype, torch.device("cpu"))
        assert moved.packed_pooler is None and moved.pooling == "mean"
        for item in dataclasses.fields(head):
            before, after = getattr(head, item.name), getattr(moved, item.name)
            if not isinstance(before, torch.Tensor) or item.name == "packed_pooler":
                continue
            assert after.dtype == dtype and after.is_contiguous() and not after.requires_grad
            assert torch.equal(after, before.detach().to(dtype))
            assert after.data_ptr() != before.data_ptr()
    bare = random_head(4, 2, seeded(3), bias=False).to(torch.float32, torch.device("cpu"))
    assert bare.classifier_bias is None and bare.pooler_weight is None


def test_heads_are_frozen_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        random_head(4, 2, seeded(4)).pooling = "mean"
    assert HeadOutput(torch.zeros(2, 3)).signal is None
