"""MlpHead: what it says of itself, what it refuses, and how it moves."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ragged_exit.heads import MlpHead
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
        ({"prototypes": torch.zeros(3, 4)}, "prototypes: expected together with prototype_weight"),
        (
            {"prototypes": torch.zeros(3, 4), "prototype_weight": torch.zeros(4, 6)},
            r"prototype_weight: expected \[4, 5\]",
        ),
        (
            {"prototypes": torch.zeros(3, 4), "prototype_weight": torch.zeros(4, 5), "prototype_bias": torch.zeros(3)},
            r"prototype_bias: expected \[4\], got \[3\]",
        ),
        ({"classifier_bias": torch.zeros(2)}, r"classifier_bias: expected \[3\], got \[2\]"),
        ({"pooler_weight": torch.zeros(5, 12), "pooler_bias": torch.zeros(12)}, r"pooler_bias: expected \[5\]"),
        ({"uncertainty_weight": torch.zeros(1, 5)}, r"uncertainty_weight: expected \[5\], got \[1, 5\]"),
        ({"uncertainty_bias": torch.zeros(())}, r"uncertainty_bias: expected \[1\], got \[\]"),
        (
            {"classifier_bias": torch.zeros(3).double()},
            "classifier_bias: expected torch.float32 .* torch.float64",
        ),
        (
            {"pooler_weight": torch.zeros(5, 5, device="meta")},
            "pooler_weight: expected torch.float32 on cpu .* meta",
        ),
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
