"""Copies between host and device for which nobody waits: through pinned memory, with an event where one must know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class ToHost:
    """Device tensors on their way to the host in one copy; ``read`` waits for it, and for nothing queued later.

    values: contiguous, those with the larger elements first, so that each lies aligned behind the others. On a CPU they
    are only held.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        self._values = list(values)
        self._sent: tuple[Tensor, Any] | None = None
        if values[0].device.type != "cpu":
            self._sent = _send(torch.cat([value.reshape(-1).view(torch.uint8) for value in values]))

    def read(self) -> list[Tensor]:
        """The values in host memory."""
        if self._sent is not None:
            landed, event = self._sent
            event.synchronize()
            sizes = [value.numel() * value.element_size() for value in self._values]
            parts = zip(landed.split(sizes), self._values, strict=True)
            self._values = [part.view(value.dtype).view(value.shape) for part, value in parts]
            self._sent = None
        return self._values


def _send(packed: Tensor) -> tuple[Tensor, Any]:
    """Queue the copy of uint8 ``[bytes]`` to pinned memory: where it lands, and the event after it."""
    landing = torch.empty(packed.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
    landing.copy_(packed, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(packed.device))
    return landing, event


def to_device(value: Tensor, device: torch.device | str) -> Tensor:
    """``value`` on ``device``; from the host, without waiting for what the device has still to do."""
    device = torch.device(device)
    if value.device == device:
        return value
    on_host = value.device.type == "cpu"
    if on_host and device.type == "cuda":
        value = value.pin_memory()  # from pageable memory the copy would wait
    return value.to(device, non_blocking=on_host)
