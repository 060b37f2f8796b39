"""packed_linear against float64.

Tolerance: error <= 2 x that of PyTorch's own linear in that dtype, then GELU or the sum; in float32 on tiles, whose
sums are rounded less often, also no more on average than PyTorch's.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_cases import seeds
from packed_cases import PACKED_KERNELS, PACKED_NATIVELY
from torch import Tensor

from ragged_exit.ops import PackedWeights, fits_packing, linears_available, pack_linear, packed_linear, tiles_available
from ragged_exit.testing import assert_error_budget, assert_same_values, seeded

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
FINISHES = ("nothing", *ACTIVATIONS, "residual")


def inputs(
    tokens: int, inner: int, outer: int, seed: int, dtype: torch.dtype, gain: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = seeded(seed)
    x, residual = (
        torch.randn(tokens, inner, generator=generator) * gain,
        torch.randn(tokens, outer, generator=generator),
    )
    weight, bias = torch.randn(outer, inner, generator=generator) / inner**0.5, torch.randn(outer, generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), residual.to(dtype)


def finished(y: Tensor, finish: str, residual: Tensor) -> Tensor:
    if finish in ACTIVATIONS:
        return ACTIVATIONS[finish](y)
    return y + residual if finish == "residual" else y


def run(x: Tensor, weights: PackedWeights, finish: str, residual: Tensor, kernel: str) -> Tensor:
    activation, added = ("", residual) if finish == "residual" else (finish if finish in ACTIVATIONS else "", None)
    return packed_linear(x, weights, activation=activation, residual=added, impl=kernel)


def check(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, finish: str, kernel: str, threads: int = 1
) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    out = run(x, pack_linear(weight, bias), finish, residual, kernel)
    torch.set_num_threads(before)
    assert out.shape == residual.shape and out.dtype == x.dtype and out.is_contiguous()
    oracle = finished(F.linear(x.double(), weight.double(), None if bias is None else bias.double()), finish, residual)
    plain = finished(F.linear(x, weight, bias), finish, residual)
    assert_error_budget(out, plain, oracle, x.dtype)
    return out


@pytest.mark.parametrize(("kernel", "dtype"), PACKED_KERNELS)
@given(
    tokens=st.one_of(st.integers(1, 130), st.sampled_from((32, 64, 96, 500))),
    inner=st.integers(1, 12).map(lambda blocks: 32 * blocks),
    outer=st.integers(1, 12).map(lambda blocks: 32 * blocks),
    bias=st.booleans(),
    finish=st.sampled_from(FINISHES),
    gain=st.sampled_from((0.1, 1.0, 4.0)),
    threads=st.integers(1, 3),
    seed=seeds,
)
def test_packed_linear(kernel, tokens, inner, outer, bias, finish, dtype, gain, threads, seed):
    x, weight, offset, residual = inputs(tokens, inner, outer, seed, dtype, gain)
    check(x, weight, offset if bias else None, residual, finish, kernel, threads)


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize(("kernel", "dtype"), PACKED_KERNELS)
@pytest.mark.parametrize(("inner", "outer"), [(768, 3072), (3072, 768), (1024, 4096), (1056, 64)])
def test_weights_beyond_a_cache(inner, outer, dtype, kernel, finish):
    """Shapes like BERT-base's and -large's, whose weights a thread takes in several groups and chunks of inputs."""
    x, weight, bias, residual = inputs(70, inner, outer, 1, dtype)
    check(x, weight, bias, residual, finish, kernel, threads=2)


@pytest.mark.skipif(not tiles_available(), reason="this processor has no matrix tiles (AMX)")
@pytest.mark.parametrize("inner", [32, 768, 3072])
def test_float32_is_as_exact_as_pytorch(inner):
    """Root mean square error against float64: parts of eight bits lose nothing that float32 keeps."""
    x, weight, bias, _ = inputs(64, inner, 96, 11, torch.float32)
    oracle = F.linear(x.double(), weight.double(), bias.double())
    ours = (packed_linear(x, pack_linear(weight, bias), impl="native").double() - oracle).square().mean()
    theirs = (F.linear(x, weight, bias).double() - oracle).square().mean()
    assert ours <= theirs


def test_the_parts_of_a_float32_weight_sum_to_it():
    weight = torch.randn(32, 32, generator=seeded(12)) * torch.logspace(-30, 30, 32)
    panels = pack_linear(weight, None, tiles=True).panels
    assert panels.dtype == torch.bfloat16
    assert torch.equal(panels[0, 0].double().sum(0).permute(0, 2, 1, 3).reshape(32, 32), weight.double())


@pytest.mark.parametrize("finish", FINISHES)
def test_the_reference_reads_either_layout_of_float32(finish):
    x, weight, bias, residual = inputs(9, 64, 96, 13, torch.float32)
    tiles, vectors = (pack_linear(weight, bias, tiles=tiles) for tiles in (True, False))
    assert (tiles.panels.dtype, vectors.panels.dtype) == (torch.bfloat16, torch.float32)
    expected = run(x, vectors, finish, residual, "reference")
    assert_same_values(run(x, tiles, finish, residual, "reference"), expected)
    torch.testing.assert_close(expected, finished(F.linear(x, weight, bias), finish, residual))


@pytest.mark.skipif(not linears_available(torch.float32), reason="no kernels for float32 linears")
def test_float32_that_is_packed_for_another_processor_is_refused():
    x, weight, bias, _ = inputs(5, 32, 64, 14, torch.float32)
    with pytest.raises(ValueError, match="weights: expected float32 packed for"):
        packed_linear(x, pack_linear(weight, bias, tiles=not tiles_available()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kernel", "dtype"), PACKED_KERNELS)
def test_activations_over_their_whole_range(kernel, dtype, activation):
    """One input per value, so that the error is the activation's alone; far out it is 0 or the value itself."""
    weight = torch.zeros(32, 32, dtype=dtype)
    weight[:, 0] = 1
    values = torch.cat([torch.linspace(-16, 16, 8001), torch.tensor([0.0, 100.0, -100.0, 1e30, -1e30])]).to(dtype)
    x = torch.zeros(len(values), 32, dtype=dtype)
    x[:, 0] = values
    out = packed_linear(x, pack_linear(weight, None), activation=activation, impl=kernel)[:, 7].double()
    expected = ACTIVATIONS[activation](values.double())
    # PyTorch's own float32 GELU, the reference's, is within 1e-6
    absolute = 5e-5 if dtype == torch.bfloat16 else 3e-7 if kernel == "native" else 1e-6
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-22
    error = (out - expected).abs() - expected.abs() * rounding
    assert error.max() < absolute


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize(("kernel", "dtype"), PACKED_KERNELS)
def test_nan_and_infinity_stay_in_their_token(kernel, finish, dtype):
    x, weight, bias, residual = inputs(70, 64, 96, 2, dtype)
    weights = pack_linear(weight, bias)
    clean = run(x, weights, finish, residual, kernel)
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[33, 5] = bad
        after = run(broken, weights, finish, residual, kernel)
        if math.isnan(bad) or (kernel == "native" and dtype == torch.float32 and tiles_available()):  # no parts
            assert after[33].isnan().all()
        elif finish == "tanh":
            assert (after[33][weight[:, 5] > 0] == 1).all()
        else:
            assert not after[33][weight[:, 5] > 0].isfinite().any()  # PyTorch's own gelu(inf) is NaN
        assert_same_values(after[:33], clean[:33])
        assert_same_values(after[34:], clean[34:])


@pytest.mark.parametrize(("kernel", "dtype"), [param for param in PACKED_KERNELS if torch.float32 in param.values])
def test_float32_from_the_smallest_to_the_largest(kernel, dtype):
    """Numbers whose parts, or whose parts' products, tiles would take for zeros or infinities."""
    largest = torch.finfo(torch.float32).max
    x = torch.zeros(5, 32)
    x[:, 0] = torch.tensor([largest, -largest, 1e-37, 1e-30, 1.0])
    weight = torch.zeros(32, 32)
    weight[:, 0] = 0.25
    out = packed_linear(x, pack_linear(weight, None), impl=kernel)
    torch.testing.assert_close(out, F.linear(x, weight), rtol=1e-6, atol=torch.finfo(torch.float32).tiny)


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("dtype", PACKED_NATIVELY)
@pytest.mark.parametrize("inner", [96, 1152])
def test_a_token_depends_on_itself_alone(finish, dtype, inner):
    """Bitwise: any neighbours, any place, any number of threads."""
    x, weight, bias, residual = inputs(203, inner, 160, 3, dtype)
    weights = pack_linear(weight, bias)
    together = run(x, weights, finish, residual, "native")
    order = torch.randperm(203, generator=seeded(4))
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for chosen in (order, order[:1], order[:31], order[:32], order[:64], order[:65]):
            some = run(x[chosen], weights, finish, residual[chosen], "native")
            assert_same_values(some, together[chosen])
    torch.set_num_threads(before)


BEFORE_A_FORBIDDEN_PAGE = """
import ctypes, mmap, sys
import torch
from ragged_exit.ops import pack_linear, packed_linear

dtype = getattr(torch, sys.argv[1])
count = 33 * 64
allowed = -(-count * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
memory = mmap.mmap(-1, allowed + mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + allowed), mmap.PAGESIZE, 0) == 0
x = torch.frombuffer(memory, dtype=dtype, count=count, offset=allowed - count * dtype.itemsize).view(33, 64)
x.copy_(torch.randn(33, 64))
weights = pack_linear(torch.randn(96, 64).to(dtype), None)
assert torch.equal(packed_linear(x, weights, impl="native"), packed_linear(x.clone(), weights, impl="native"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through the C library")
@pytest.mark.parametrize("dtype", PACKED_NATIVELY)
def test_nothing_is_read_past_the_last_token(dtype):
    """Tokens are taken several at a time (tiles: 16); the page after the 33rd may not be touched."""
    command = [sys.executable, "-c", BEFORE_A_FORBIDDEN_PAGE, str(dtype).removeprefix("torch.")]
    subprocess.run(command, check=True, timeout=120)


@pytest.mark.parametrize(("kernel", "dtype"), PACKED_KERNELS)
def test_strided_inputs(kernel, dtype):
    x, weight, bias, residual = inputs(50, 64, 32, 5, dtype)
    weights = pack_linear(weight, bias)
    expected = run(x, weights, "residual", residual, kernel)
    wide = torch.full((50, 200), math.nan, dtype=dtype)
    wide[:, 3:67] = x
    assert_same_values(run(wide[:, 3:67], weights, "residual", residual, kernel), expected)
    turned = x.T.contiguous().T  # the last dimension is not contiguous
    assert_same_values(run(turned, weights, "residual", residual.T.contiguous().T, kernel), expected)


@pytest.mark.parametrize(("kernel", "dtype"), PACKED_KERNELS)
def test_inputs_are_left_alone_and_weights_are_a_snapshot(kernel, dtype):
    x, weight, bias, residual = inputs(40, 32, 64, 6, dtype)
    copies = [value.clone() for value in (x, residual)]
    weights = pack_linear(weight, bias)
    first = run(x, weights, "residual", residual, kernel)
    weight.zero_()
    bias.zero_()
    assert_same_values(run(x, weights, "residual", residual, kernel), first)
    for value, copy in zip((x, residual), copies, strict=True):
        assert_same_values(value, copy)


def test_a_float32_bias_is_copied_too():
    _, weight, bias, _ = inputs(1, 32, 32, 7, torch.bfloat16)
    floats = bias.float()
    weights = pack_linear(weight, floats)
    floats.zero_()
    assert weights.bias.abs().sum() > 0


@pytest.mark.parametrize(("kernel", "dtype"), PACKED_KERNELS)
def test_opcheck(kernel, dtype):
    x, weight, bias, residual = inputs(5, 32, 64, 8, dtype)
    weights = pack_linear(weight, bias)
    op = torch.ops.ragged_exit.packed_linear
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_autograd_registration")
    for activation, added in (*((name, None) for name in ("", *ACTIVATIONS)), ("", residual)):
        found = torch.library.opcheck(op, (x, *weights, added, activation, kernel), test_utils=checks)
        assert found == dict.fromkeys(checks, "SUCCESS")


def test_errors_name_the_argument(monkeypatch):
    x, weight, bias, residual = inputs(5, 32, 64, 9, torch.bfloat16)
    weights = pack_linear(weight, bias)
    for bad in (weight.half(), weight[:, :31], weight[:63], weight.to("meta"), weight[0], weight[:0], weight[:, :0]):
        assert bad.ndim == 1 or not fits_packing(bad)
        with pytest.raises(ValueError, match="weight: expected bfloat16 or float32"):
            pack_linear(bad, None)
    with pytest.raises(ValueError, match=r"bias: expected \[64\], got \[63\]"):
        pack_linear(weight, bias[:63])
    with pytest.raises(ValueError, match=r"x: expected \[T, 32\], got \[5, 31\]"):
        packed_linear(x[:, :31], weights)
    with pytest.raises(TypeError, match=r"x: expected torch\.bfloat16 as the packed weight, got torch\.float32"):
        packed_linear(x.float(), weights)
    with pytest.raises(TypeError, match=r"x: expected torch\.float32 as the packed weight"):
        packed_linear(x, pack_linear(weight.float(), None))
    with pytest.raises(ValueError, match="x: expected a CPU tensor"):
        packed_linear(x.to("meta"), weights)
    with pytest.raises(ValueError, match=r"residual: expected \[5, 64\]"):
        packed_linear(x, weights, residual=residual[:4])
    with pytest.raises(TypeError, match=r"residual: expected torch\.bfloat16"):
        packed_linear(x, weights, residual=residual.float())
    with pytest.raises(ValueError, match="residual: expected None beside an activation"):
        packed_linear(x, weights, residual=residual, activation="gelu")
    with pytest.raises(ValueError, match=r"activation: expected one of .* got 'relu'"):
        packed_linear(x, weights, activation="relu")
    panels, floats = weights
    for bad in (panels[..., :1], panels.float(), panels.transpose(-1, -2), panels[0], panels[:, :0], panels.to("meta")):
        with pytest.raises(ValueError, match="weights: expected panels as pack_linear makes them"):
            packed_linear(x, weights._replace(panels=bad))
    for bad in (floats[:63], floats.bfloat16(), floats.repeat(2), torch.zeros(128)[::2], floats.to("meta")):
        with pytest.raises(ValueError, match=r"weights: expected a float32 bias \[64\]"):
            packed_linear(x, weights._replace(bias=bad))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match='got "triton"'):
        packed_linear(x, weights, impl="triton")


def test_without_kernels_the_reference_runs_unless_native_was_asked_for(monkeypatch):
    x, weight, bias, _ = inputs(5, 32, 64, 10, torch.bfloat16)
    weights = pack_linear(weight, bias)
    monkeypatch.setattr(sys.modules["ragged_exit.ops.packed_linear"], "linears_available", lambda dtype: False)
    assert_same_values(packed_linear(x, weights), packed_linear(x, weights, impl="reference"))
    with pytest.raises(RuntimeError, match=r"no kernels for torch\.bfloat16 linears|not built"):
        packed_linear(x, weights, impl="native")
