"""Memory for hidden states that is used again: on a CPU new memory costs its page faults, more than a copy into it."""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

from ragged_exit.batch import token_bucket


class Buffers:
    """Lends memory and keeps what comes back, at most ``most`` buffers; any thread may take and give."""

    def __init__(self, most: int) -> None:
        # with the stream that may have work left on it; the oldest goes where one comes too many
        self._spare: deque[tuple[Tensor, int]] = deque(maxlen=most)
        self._lock = threading.Lock()

    def take(self, tokens: int, like: Tensor) -> Tensor:
        """``[token_bucket(tokens), H]``, not initialised, as wide as ``like``, of its dtype and on its device."""
        shape = (token_bucket(tokens), *like.shape[1:])
        mode = torch.is_inference_mode_enabled()  # each mode has tensors of its own
        wanted = (shape, like.dtype, like.device, mode, _stream(like.device))
        with self._lock:
            for place, (buffer, stream) in enumerate(self._spare):
                if (buffer.shape, buffer.dtype, buffer.device, buffer.is_inference(), stream) == wanted:
                    del self._spare[place]
                    return buffer
        return like.new_empty(shape)

    def give_back(self, buffer: Tensor) -> None:
        """Nobody reads it any more, but for what a device's stream has still to do."""
        with self._lock:
            self._spare.append((buffer, _stream(buffer.device)))

    def __reduce__(self) -> tuple[type[Buffers], tuple[int | None]]:
        return Buffers, (self._spare.maxlen,)  # a copy has memory of its own


def _stream(device: torch.device) -> int:
    """The current stream of a GPU, whose work comes in order; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
