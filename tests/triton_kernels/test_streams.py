"""What is kept between calls on a GPU, and what threads on streams of their own find there; without a GPU."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ragged_exit.batch import RaggedBatch
from ragged_exit.ops import exit_decide
from ragged_exit.ops.exit_step import row_threshold
from ragged_exit.rules import Entropy


class Cuda:
    """Stands in for torch.cuda: a current device, and of each device the current stream and whether it captures."""

    def __init__(self) -> None:
        self.current = 0
        self.streams = {0: 7, 1: 8}
        self.capturing = {0: False, 1: False}

    @contextmanager
    def device(self, device: torch.device):
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before

    def is_current_stream_capturing(self) -> bool:
        return self.capturing[self.current]

    def current_stream(self) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=self.streams[self.current])


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    found = Cuda()
    for name in ("device", "is_current_stream_capturing", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *args, device, **kwargs: full(*args, **kwargs))
    return found


def threshold_on(device: int, value: float = 0.625) -> Tensor:
    batch = SimpleNamespace(state={}, device=torch.device("cuda", device))
    found = row_threshold(batch, Entropy(value), 0)
    assert found.tolist() == [value] and found.dtype == torch.float32
    return found


def test_a_threshold_is_kept_for_the_stream_that_filled_it(cuda):
    first = threshold_on(1)
    assert threshold_on(1) is first and threshold_on(0) is not first
    cuda.streams[0] = 9  # of the current device, not of the batch's
    assert threshold_on(1) is first
    cuda.streams[1] = 9
    assert threshold_on(1) is not first
    cuda.streams[1] = 8
    assert threshold_on(1) is first


def test_a_capture_on_the_batchs_device_keeps_none(cuda):
    kept = threshold_on(1)
    cuda.capturing[0] = True
    assert threshold_on(1) is kept
    cuda.capturing[1] = True
    assert threshold_on(1) is not kept


def test_a_threshold_of_an_export_is_not_kept():
    """It is fake."""

    class Decides(torch.nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            batch = RaggedBatch(
                cu_seqlens=torch.arange(4, dtype=torch.int32),
                live=torch.tensor([3, 3], dtype=torch.int32),
                seqlens=torch.ones(3, dtype=torch.int32),
                sample_ids=torch.arange(3),
            )
            return exit_decide(batch, logits, Entropy(0.515625), impl="reference").exits

    logits = torch.tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 5.0]])
    exported = torch.export.export(Decides(), (logits,))
    for decides in (Decides(), exported.module()):
        assert decides(logits).tolist() == [True, False, True]


def test_no_ticket_is_handed_to_two_captures(monkeypatch):
    """Threads that capture at once, each giving way between reading what is left and writing it back."""
    plan = pytest.importorskip("ragged_exit.ops.triton.plan")

    class Arena:
        def __init__(self, left: range) -> None:
            self.left = left

        def numel(self) -> int:
            return len(self.left)

        def split(self, sizes: tuple[int, int]) -> tuple[range, Arena]:
            time.sleep(0.01)
            return self.left[: sizes[0]], Arena(self.left[sizes[0] :])

    device = torch.device("cuda", 0)
    monkeypatch.setitem(plan._arenas, device, Arena(range(64)))
    taken: list[range] = []
    threads = [threading.Thread(target=lambda: taken.append(plan._captured_tickets(4, device))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for part in taken for number in part) == list(range(32))
