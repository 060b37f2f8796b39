"""token_budget_batches: every sequence once, within the budget, as few batches as filling in order of length allows."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragged_exit.scheduler import token_budget_batches


@given(st.lists(st.integers(1, 50)), st.integers(1, 120))
def test_batches_partition_the_sequences_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = token_budget_batches(lengths, budget)
    order = list(chain.from_iterable(batches))
    assert sorted(order) == list(range(len(lengths)))
    assert all(batches)
    assert all(lengths[one] >= lengths[other] for one, other in pairwise(order))  # longest first
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[index] for index in batch) <= budget
    for one, other in pairwise(batches):
        assert sum(lengths[index] for index in one) + lengths[other[0]] > budget  # no batch ends early


@given(st.lists(st.integers(1, 3)), st.integers(1, 20))
def test_equal_lengths_keep_their_order(lengths: list[int], budget: int) -> None:
    order = list(chain.from_iterable(token_budget_batches(lengths, budget)))
    assert order == sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def test_examples() -> None:
    assert token_budget_batches([], 8) == []
    assert token_budget_batches([3, 9, 5, 2], 8) == [[1], [2, 0], [3]]
    assert token_budget_batches([4, 4, 4], 8) == [[0, 1], [2]]


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_below_one_is_an_error(budget: int) -> None:
    with pytest.raises(ValueError, match=f"token_budget: expected at least 1, got {budget}"):
        token_budget_batches([1], budget)
