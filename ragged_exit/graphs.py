"""CUDA graphs of a stage's layers for few sizes of batch: one launch by the host where there are a dozen a layer.

Off, unless a RaggedExecutor is given a LayerGraphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ragged_exit.batch import RaggedBatch
from ragged_exit.encoder import PackedEncoder, run_layers

MOST_GRAPHS = 512

Replay = Callable[[], object]
Capture = Callable[[Replay, torch.device], Replay]  # what to run, where -> its replay


class Size(NamedTuple):
    """What a graph is made for: at most so many tokens and rows, and tokens in a row."""

    tokens: int
    rows: int
    longest: int

    @classmethod
    def of(cls, batch: RaggedBatch) -> Size:
        """The smallest that holds ``batch``: for tokens four sizes an octave, for the rest powers of two.

        Tokens past the live ones are computed; rows and lengths past them are only programs that find nothing to do.
        """
        assert batch.hidden is not None
        tokens = batch.hidden.shape[0]
        step = max(32, 1 << max(0, (tokens - 1).bit_length() - 3))
        return cls(-(-tokens // step) * step, _power_of_two(batch.rows), _power_of_two(batch.max_seqlen))


def _power_of_two(count: int) -> int:
    return 1 << max(4, (count - 1).bit_length())


class LayerGraphs:
    """Runs layers as ``run_layers`` does, by graphs on buffers of fixed sizes, with a copy before and one after.

    A size that comes a second time is captured, ``most`` of them in all; what has no graph runs without. The graphs
    share their memory, and those of a size its buffer: one stream may use them, and one thread.
    """

    def __init__(self, most: int = MOST_GRAPHS, *, capture: Capture | None = None) -> None:
        if most < 1:
            raise ValueError(f"most: expected at least 1 graph, got {most}")
        self.most = most
        self._capture = CudaCapture() if capture is None else capture
        self._seen: set[tuple] = set()
        self._graphs: dict[tuple, tuple[Tensor, Tensor, Replay]] = {}  # hidden, cu_seqlens, and what runs on them
        self._buffers: dict[tuple, Tensor] = {}

    @torch.inference_mode()  # the buffers are made once and must take what any call brings
    def run(
        self, encoder: PackedEncoder, layers: Sequence[int], batch: RaggedBatch, *, with_means: bool = False
    ) -> Tensor | None:
        """``layers`` (0-based) of ``encoder`` on a batch whose ``seqlens`` are the truth, in place. Without means."""
        assert batch.hidden is not None
        size = Size.of(batch)
        key = (encoder, tuple(layers), size)
        if not layers or not self._ready(key):
            run_layers(encoder, layers, batch)
            return None
        if key not in self._graphs:
            self._graphs[key] = self._captured(encoder, layers, size)
        hidden, cu_seqlens, replay = self._graphs[key]
        tokens, rows = len(batch.hidden), batch.rows
        hidden[:tokens].copy_(batch.hidden)
        cu_seqlens[: rows + 1].copy_(batch.cu_seqlens[: rows + 1])
        cu_seqlens[rows + 1 :].fill_(batch.tokens)
        replay()
        batch.hidden.copy_(hidden[:tokens])
        return None

    def _ready(self, key: tuple) -> bool:
        """Whether there is a graph for this, or one should be captured."""
        if key in self._graphs:
            return True
        again = key in self._seen
        self._seen.add(key)
        return again and len(self._graphs) < self.most

    def _captured(self, encoder: PackedEncoder, layers: Sequence[int], size: Size) -> tuple[Tensor, Tensor, Replay]:
        hidden = self._buffer((size.tokens, encoder.hidden_size), encoder.dtype, encoder.device)
        cu_seqlens = self._buffer((size.rows + 1,), torch.int32, encoder.device)
        cu_seqlens.zero_()  # rows that another size left here may end past this size's tokens
        fixed = RaggedBatch(
            cu_seqlens=cu_seqlens,
            live=cu_seqlens[:2],  # no layer asks for it, nor for the ids
            seqlens=torch.full((size.rows,), size.longest, dtype=torch.int32, device="cpu"),
            sample_ids=cu_seqlens[1:],
            hidden=hidden,
        )

        def run() -> None:
            run_layers(encoder, layers, fixed)

        return hidden, cu_seqlens, self._capture(run, encoder.device)

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (shape, dtype, device)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(shape, dtype=dtype, device=device)
        return self._buffers[key]


class CudaCapture:
    """Captures on a stream of its own, after a run there that compiles the kernels, and into one pool of memory."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pools: dict[torch.device, Any] = {}

    def __call__(self, run: Replay, device: torch.device) -> Replay:
        with torch.cuda.device(device):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream()
                self._pools[device] = torch.cuda.graph_pool_handle()
            stream, current = self._streams[device], torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                run()  # neither compiling a kernel nor making a cuBLAS workspace is allowed in a capture
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):  # torch.cuda.graph would wait for the device and empty its caches first
                # thread_local: what other threads do meanwhile (pinning memory, say) is no business of this capture
                graph.capture_begin(pool=self._pools[device], capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
        return graph.replay
