"""The compaction plan, scanned by whichever program finishes last; and the tickets that tell which one that is."""

from __future__ import annotations

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def arrived_last(ticket_ptr, expected):
    """True in the last of ``expected`` programs to get here, which then sees what all of them stored before.

    The last one puts the ticket back to 0, so that the next launch, or the replay of a CUDA graph, finds it so.
    """
    tl.debug_barrier()  # the atomic releases one thread's stores: first gather those of the whole program
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def scan_plan(cu_ptr, live_ptr, out, row_capacity, BLOCK: tl.constexpr):
    """survivors (then -1), their cu_seqlens (constant past them) and live of ``out``, from its exits of all rows."""
    live_rows = tl.load(live_ptr)
    kept = 0
    tokens = 0
    for start in range(0, row_capacity, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        within = rows < row_capacity
        # .cg: other programs wrote the exits, and the L1 cache of this multiprocessor would not know
        exits = tl.load(out.exits + rows, mask=within, other=1, cache_modifier=".cg")
        stays = (within & (rows < live_rows) & (exits == 0)).to(tl.int32)
        begin = tl.load(cu_ptr + rows, mask=within, other=0)
        length = (tl.load(cu_ptr + rows + 1, mask=within, other=0) - begin) * stays
        place = kept + tl.cumsum(stays, 0)  # 1-based
        end = tokens + tl.cumsum(length, 0)
        tl.store(out.survivors + place - 1, rows, mask=stays != 0)
        tl.store(out.cu_seqlens + place, end, mask=stays != 0)
        kept += tl.sum(stays, 0)
        tokens += tl.sum(length, 0)
    for start in range(0, row_capacity, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        free = (rows >= kept) & (rows < row_capacity)
        tl.store(out.survivors + rows, -1, mask=free)
        tl.store(out.cu_seqlens + rows + 1, tokens, mask=free)
    tl.store(out.cu_seqlens, 0)
    tl.store(out.live, kept)
    tl.store(out.live + 1, tokens)


_ARENA = 1 << 18  # 1 MiB of tickets a device: a captured call takes 1 + row blocks of them, for good
_arenas: dict[torch.device, Tensor] = {}  # what is left to hand out
_arenas_lock = threading.Lock()
_by_stream: dict[tuple[torch.device, int], Tensor] = {}


def tickets(count: int, device: torch.device) -> Tensor:
    """At least ``count`` int32 tickets at 0 that no concurrent launch uses.

    Launches on one stream follow each other and share theirs. A captured call keeps its own, because a graph may be
    replayed on any stream; they come from memory that was zeroed before, lest the graph carry a fill of its own.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _captured_tickets(count, device)
    stream = 0
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        with _arenas_lock:
            if device not in _arenas:
                _arenas[device] = torch.zeros(_ARENA, dtype=torch.int32, device=device)
                torch.cuda.synchronize(device)  # once a device: every stream must find the zeros
    key = (device, stream)
    if key not in _by_stream or _by_stream[key].numel() < count:
        _by_stream[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return _by_stream[key]


def _captured_tickets(count: int, device: torch.device) -> Tensor:
    # the next slice is 16-byte aligned too: else the kernel would be compiled again, in the capture
    count += -count % 4
    with _arenas_lock:
        arena = _arenas.get(device)
        if arena is not None and arena.numel() >= count:
            taken, _arenas[device] = arena.split((count, arena.numel() - count))
            return taken
    return torch.zeros(count, dtype=torch.int32, device=device)  # no warm-up, or used up: the graph fills them
