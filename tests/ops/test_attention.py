"""varlen_attention against float64, sequence by sequence.

Tolerance: error <= 2 x that of F.scaled_dot_product_attention in the same dtype, run sequence by sequence.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_cases import INTERPRETED, seeds
from torch import Tensor

from ragged_exit.ops import varlen_attention
from ragged_exit.testing import (
    assert_error_budget,
    assert_same_values,
    attention_oracle,
    qkv_views,
    random_lengths,
    seeded,
)

HALF = True
LAYOUTS = ("fused", "interleaved", "separate", "misaligned")
MOST = (4, 40, 3) if INTERPRETED else (12, 90, 5)  # rows, length, heads


def bounds(lengths: list[int], device: str, spare_rows: int = 0) -> Tensor:
    ends = torch.tensor(lengths + [0] * spare_rows).cumsum(0)
    return torch.cat((torch.zeros(1), ends)).to(torch.int32).to(device)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """PyTorch's own attention in the dtype of the inputs, one sequence at a time.

    On copies: its GPU kernels read 16 bytes at once, and some layouts begin between two such addresses.
    """
    parts = zip(*(x[: sum(lengths)].split(lengths) for x in (q, k, v)), strict=True)
    copies = [[x.transpose(0, 1)[None].clone() for x in part] for part in parts]
    return torch.cat([F.scaled_dot_product_attention(*part, scale=scale)[0].transpose(0, 1) for part in copies])


@given(
    lengths=st.lists(st.integers(1, MOST[1]), min_size=1, max_size=MOST[0]),
    heads=st.integers(1, MOST[2]),
    head_size=st.sampled_from((8, 16, 24, 32, 40, 64, 80, 128)),
    layout=st.sampled_from(LAYOUTS),
    spare=st.sampled_from((0, 0, 1, 37)),
    slack=st.sampled_from((0, 1, 100)),
    gain=st.sampled_from((0.3, 1.0, 3.0)),
    seed=seeds,
)
def test_attention(impl, dtype, device, lengths, heads, head_size, layout, spare, slack, gain, seed):
    tokens = sum(lengths)
    kwargs = {"dtype": dtype, "device": device, "layout": layout, "gain": gain}
    q, k, v = qkv_views(tokens + spare, heads, head_size, seeded(seed), **kwargs)
    scale = head_size**-0.5
    cu_seqlens = bounds(lengths, device, spare_rows=spare)
    out = varlen_attention(q, k, v, cu_seqlens, max(lengths) + slack, scale, impl=impl)
    assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous()
    oracle = attention_oracle(q, k, v, lengths, scale)
    assert_error_budget(out[:tokens], plain_attention(q, k, v, lengths, scale), oracle, dtype)
    assert not out[tokens:].any(), "tokens past cu_seqlens[-1] are not zero"  # NaN is truthy


@pytest.mark.parametrize("head_size", [1, 3, 7, 13, 33, 96, 129, 256])
def test_uncommon_head_sizes(impl, dtype, device, head_size):
    lengths = [5, 1, 17]
    q, k, v = qkv_views(23, 2, head_size, seeded(head_size), dtype=dtype, device=device)
    out = varlen_attention(q, k, v, bounds(lengths, device), 17, head_size**-0.5, impl=impl)
    plain = plain_attention(q, k, v, lengths, head_size**-0.5)
    assert_error_budget(out, plain, attention_oracle(q, k, v, lengths, head_size**-0.5), dtype)


@pytest.mark.parametrize("length", [63, 64, 65, 128, 257] if INTERPRETED else [63, 64, 65, 128, 129, 511, 512, 1000])
def test_long_sequences(impl, dtype, device, length):
    lengths = [length, 2]
    q, k, v = qkv_views(length + 2, 2, 32, seeded(length), dtype=dtype, device=device)
    out = varlen_attention(q, k, v, bounds(lengths, device), length, 0.2, impl=impl)
    plain = plain_attention(q, k, v, lengths, 0.2)
    assert_error_budget(out, plain, attention_oracle(q, k, v, lengths, 0.2), dtype)


@pytest.mark.parametrize("layout", ["fused", "interleaved"])
def test_many_heads_of_long_sequences(impl, dtype, device, layout):
    """Too much for a cache at once: the tiles' kernel takes the heads in groups, here of 3, 3 and 1."""
    lengths = [40, 3] if INTERPRETED else [300, 31, 1]
    q, k, v = qkv_views(sum(lengths), 7, 64, seeded(9), dtype=dtype, device=device, layout=layout)
    out = varlen_attention(q, k, v, bounds(lengths, device), max(lengths), 0.125, impl=impl)
    plain = plain_attention(q, k, v, lengths, 0.125)
    assert_error_budget(out, plain, attention_oracle(q, k, v, lengths, 0.125), dtype)


def test_the_scale_counts(impl, device):
    """Scale 0 gives the mean of the values; a large one gives the value of the best key."""
    q, k, v = qkv_views(6, 1, 8, seeded(1), device=device)
    cu_seqlens = bounds([4, 2], device)
    mean = varlen_attention(q, k, v, cu_seqlens, 4, 0.0, impl=impl)
    torch.testing.assert_close(mean[:4], v[:4].mean(0, keepdim=True).expand(4, 1, 8), rtol=1e-6, atol=1e-6)
    best = varlen_attention(q, k, v, cu_seqlens, 4, 1e4, impl=impl)
    chosen = (q[:4, 0] @ k[:4, 0].T).argmax(1)
    torch.testing.assert_close(best[:4], v[:4][chosen], rtol=1e-6, atol=1e-6)


def test_one_token_attends_to_itself(impl, dtype, device):
    q, k, v = qkv_views(9, 3, 16, seeded(2), dtype=dtype, device=device)
    out = varlen_attention(q, k, v, bounds([1] * 9, device), 1, 0.25, impl=impl)
    torch.testing.assert_close(out, v.contiguous(), rtol=1e-6 if dtype == torch.float32 else 0, atol=0)


def test_large_scores_do_not_overflow(impl, dtype, device):
    lengths = [5, 8]
    q, k, v = qkv_views(13, 2, 16, seeded(3), dtype=dtype, device=device)
    q, k = q * 30, k * 30
    out = varlen_attention(q, k, v, bounds(lengths, device), 8, 1.0, impl=impl)
    assert out.isfinite().all()
    plain = plain_attention(q, k, v, lengths, 1.0)
    assert_error_budget(out, plain, attention_oracle(q, k, v, lengths, 1.0), dtype)


def test_a_key_of_minus_infinity_weighs_nothing(impl, device):
    """A first block of keys whose every score is -inf must not spoil the blocks after it; -inf alone is NaN."""
    q, k = torch.ones(83, 1, 8, device=device), torch.ones(83, 1, 8, device=device)
    v = torch.randn(83, 1, 8, generator=seeded(8)).to(device)
    k[:70], k[80:] = -math.inf, -math.inf
    out = varlen_attention(q, k, v, bounds([80, 3], device), 80, 1.0, impl=impl)
    torch.testing.assert_close(out[:80], v[70:80].mean(0, keepdim=True).expand(80, 1, 8))
    assert out[80:].isnan().all()


def test_nan_stays_in_its_sequence(impl, dtype, device):
    lengths = [5, 7, 3]
    clean = qkv_views(20, 2, 16, seeded(4), dtype=dtype, device=device, layout="separate")
    cu_seqlens = bounds(lengths, device)
    before = varlen_attention(*clean, cu_seqlens, 7, 0.25, impl=impl)
    for place in range(3):
        broken = [value.clone() for value in clean]
        broken[place][6, 1, 3] = math.nan  # row 1
        broken[place][15:] = math.nan  # past the live tokens
        after = varlen_attention(*broken, cu_seqlens, 7, 0.25, impl=impl)
        assert_same_values(after[:5], before[:5])
        assert_same_values(after[12:], before[12:])
        assert after[6, 1].isnan().any()
        assert_same_values(after[5:12, 0], before[5:12, 0])  # nor does the other head notice


def test_batch_invariance(impl, dtype, device):
    """Bitwise on the kernels: a sequence's output does not depend on its neighbours or its place."""
    if impl == "reference":
        pytest.skip("the reference makes no such promise")
    generator = seeded(5)
    lengths = random_lengths(8 if INTERPRETED else 30, 40, generator)
    q, k, v = qkv_views(sum(lengths), 2, 32, generator, dtype=dtype, device=device)
    together = varlen_attention(q, k, v, bounds(lengths, device), max(lengths), 0.2, impl=impl).split(lengths)
    pieces = [part.split(lengths) for part in (q, k, v)]
    order = torch.randperm(len(lengths), generator=generator).tolist()
    for some in (order, order[:1], order[:3]):
        parts = [torch.cat([piece[row] for row in some]) for piece in pieces]
        chosen = [lengths[row] for row in some]
        out = varlen_attention(*parts, bounds(chosen, device), max(chosen), 0.2, impl=impl)
        assert_same_values(out, torch.cat([together[row] for row in some]))


def test_inputs_are_left_alone(impl, device):
    inputs = [*qkv_views(9, 2, 8, seeded(6), device=device), bounds([4, 5], device)]
    copies = [value.clone() for value in inputs]
    out = varlen_attention(*inputs, 5, 0.3, impl=impl)
    for value, copy in zip(inputs, copies, strict=True):
        assert_same_values(value, copy)
        assert out.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()


def test_errors_name_the_argument(impl, device):
    q, k, v = qkv_views(9, 2, 8, seeded(7), device=device)
    cu_seqlens = bounds([4, 5], device)
    with pytest.raises(ValueError, match=r"q: expected \[T, N, D\], got \[9, 16\]"):
        varlen_attention(q.reshape(9, 16), k, v, cu_seqlens, 5, 0.3, impl=impl)
    with pytest.raises(ValueError, match="k: expected"):
        varlen_attention(q, k[:8], v, cu_seqlens, 5, 0.3, impl=impl)
    with pytest.raises(ValueError, match="v: expected"):
        varlen_attention(q, k, v.to("meta"), cu_seqlens, 5, 0.3, impl=impl)
    with pytest.raises(TypeError, match="v: expected the dtype of q"):
        varlen_attention(q, k, v.double(), cu_seqlens, 5, 0.3, impl=impl)
    for bad in (cu_seqlens.long(), cu_seqlens[None], cu_seqlens[:0], cu_seqlens.to("meta")):
        with pytest.raises(ValueError, match="cu_seqlens: expected int32"):
            varlen_attention(q, k, v, bad, 5, 0.3, impl=impl)
