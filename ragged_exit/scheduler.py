"""Which rows run together: sorted by length, cut into batches of at most a token budget."""

from __future__ import annotations

from collections.abc import Sequence

TOKEN_BUDGET = 8192  # tokens a batch, where the caller does not say


def token_budget_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices into ``lengths``, longest first, in batches whose tokens sum to at most ``token_budget``.

    A sequence longer than the budget is a batch of its own. Raises ValueError for a budget below 1.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget: expected at least 1, got {token_budget}")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    room = 0
    for index in order:
        if not batches or lengths[index] > room:
            batches.append([])
            room = token_budget
        batches[-1].append(index)
        room -= lengths[index]
    return batches
