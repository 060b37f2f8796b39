"""Without memory a kernel raises MemoryError, whichever thread ran out of it, and the process goes on."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("ragged_exit._native", reason="the C++ extension is not built")

from test_native_isa import run

from ragged_exit.ops import linears_available, tiles_available

COMMON = """
import ctypes, resource, torch
from ragged_exit import ops
from ragged_exit.ops import native

torch.set_num_threads(2)

def attempt(call, block):
    "call() while the process gets no more addresses and no free piece of `block` bytes is left."
    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
    while malloc(ctypes.c_size_t(block)):
        pass
    try:
        call()
    except MemoryError:
        return
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    raise AssertionError("there was memory enough")
"""

LAYER = """
def linear(outputs, inputs):
    return ops.pack_linear(torch.randn(outputs, inputs) / inputs**0.5, None)

norm = ops.LayerNormWeights(torch.ones(32), torch.zeros(32))
layer = ops.PackedLayer(linear(96, 32), linear(32, 32), norm, linear(64, 32), linear(32, 64), norm)

def run(tokens):
    hidden = torch.ones(2 * tokens, 32)
    ops.packed_layer(hidden, torch.tensor([0, tokens, 2 * tokens], dtype=torch.int32), layer, 1, 1e-5)
    return hidden

before, many = run(600), torch.ones(20_000, 32)
bounds = torch.tensor([0, 10_000, 20_000], dtype=torch.int32)
attempt(lambda: ops.packed_layer(many, bounds, layer, 1, 1e-5), 1 << 18)
assert torch.equal(run(600), before)
"""

EXIT_STEP = """
import native_cases
from ragged_exit.ops.exit_step import packed_for
from ragged_exit.rules import Entropy

head = native_cases.head(1024, 64, 2, torch.float32)
packed = packed_for("native", head).weights
cu_seqlens, live = native_cases.plan([1] * 64)
hidden = torch.randn(64, 1024)

def step(weights):
    return native.exit_step(
        hidden, None, cu_seqlens, live, weights, None, None, torch.tensor([0.5]), Entropy(0.5).spec, False
    ).logits

plain = step(head.weights)  # all buffers but those that the threads' linears have of their own
attempt(lambda: step(packed), 1 << 18)
torch.testing.assert_close(step(packed), plain)
"""


def check(code: str) -> None:
    if sys.platform != "linux":
        pytest.skip("/proc/self/statm is Linux's")
    result = run(COMMON + code, MALLOC_ARENA_MAX="1")  # a thread's own arena would have addresses to spare
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not linears_available(torch.float32), reason="no kernels for float32 linears")
def test_a_layer() -> None:
    check(LAYER)


@pytest.mark.skipif(not tiles_available(), reason="only linears on matrix tiles (AMX) have buffers of their own")
def test_an_exit_step() -> None:
    check(EXIT_STEP)
