"""Memory that is used again: who gets which, and how much is kept."""

from __future__ import annotations

import copy

import torch
from tiny import one_thread, random_rows, tiny_deebert  # noqa: F401  (one_thread: autouse)

import ragged_exit as rx
from ragged_exit.buffers import Buffers


def test_what_came_back_is_lent_again_to_whoever_needs_its_like() -> None:
    buffers = Buffers(2)
    narrow, wide = torch.empty(0, 3), torch.empty(0, 5)
    first = buffers.take(33, narrow)
    assert first.shape == (64, 3) and first.dtype == torch.float32
    buffers.give_back(first)
    others = (buffers.take(33, wide), buffers.take(33, narrow.bfloat16()), buffers.take(65, narrow))
    assert [tuple(other.shape) for other in others] == [(64, 5), (64, 3), (96, 3)]
    assert all(other.data_ptr() != first.data_ptr() for other in others)
    assert buffers.take(40, narrow) is first  # as large, once rounded up
    assert buffers.take(40, narrow) is not first  # it is lent


def test_only_so_many_are_kept_the_newest() -> None:
    like = torch.empty(0, 2)
    for most in (0, 2):
        buffers = Buffers(most)
        given = [buffers.take(tokens, like) for tokens in (32, 64, 96)]
        for buffer in given:
            buffers.give_back(buffer)
        again = [buffers.take(tokens, like) is buffer for tokens, buffer in zip((32, 64, 96), given, strict=True)]
        assert again == [False, most > 0, most > 0]


def test_inference_mode_has_buffers_of_its_own() -> None:
    """Outside of it nothing may be written into a tensor that was made within."""
    fast = rx.accelerate(tiny_deebert(), threshold=0.9)
    rows = random_rows(30)
    for _ in range(2):
        streamed = [row.exit_layer for row in fast.stream(rows, token_budget=64)]
        assert fast.executor.run(fast.pack_sequences(rows)).exit_layer.tolist() == streamed


def test_a_copy_shares_no_memory() -> None:
    buffers, like = Buffers(3), torch.empty(0, 2)
    buffer = buffers.take(32, like)
    buffers.give_back(buffer)
    other = copy.deepcopy(buffers)
    assert other.take(32, like) is not buffer
    assert buffers.take(32, like) is buffer
