"""embed_layer_norm against float64.

Tolerance: error <= 2 x that of PyTorch's gathers, sums and LayerNorm in the same dtype.
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

from ragged_exit.ops import add_layer_norm, embed_layer_norm
from ragged_exit.ops.dispatch import implementation
from ragged_exit.testing import assert_error_budget, assert_same_values, seeded

HALF = True
ROWS = (60, 30, 3)  # of the tables
TYPES = ("ids", "all of type 0", "no table")


def inputs(tokens: int, width: int, types: str, seed: int, dtype: torch.dtype, device: str) -> tuple:
    generator = seeded(seed)
    ids = [torch.randint(0, rows, (tokens,), generator=generator).to(device) for rows in ROWS]
    tables = [torch.randn(rows, width, generator=generator).to(dtype).to(device) for rows in ROWS]
    weight = (1 + 0.3 * torch.randn(width, generator=generator)).to(dtype).to(device)
    bias = (0.3 * torch.randn(width, generator=generator)).to(dtype).to(device)
    if types != "ids":
        ids[2] = None
    if types == "no table":
        tables[2] = None
    return (*ids, *tables, weight, bias)


def total(values: tuple, wide: bool) -> Tensor:
    """The three embeddings' sum, in float64 or in the dtype of the tables."""
    ids, tables = values[:3], [None if table is None else table.double() if wide else table for table in values[3:6]]
    found = F.embedding(ids[0], tables[0]) + F.embedding(ids[1], tables[1])
    if tables[2] is None:
        return found
    return found + (tables[2][0] if ids[2] is None else F.embedding(ids[2], tables[2]))


@given(
    tokens=st.integers(1, 12 if INTERPRETED else 90),
    width=st.one_of(st.integers(2, 150), st.sampled_from((384, 768))),
    types=st.sampled_from(TYPES),
    kind=st.sampled_from(("standard", "uer")),
    eps=st.sampled_from((1e-12, 1e-6)),
    seed=seeds,
)
def test_embed_layer_norm(impl, dtype, device, tokens, width, types, kind, eps, seed):
    values = inputs(tokens, width, types, seed, dtype, device)
    out = embed_layer_norm(*values, eps, kind, impl=impl)
    assert out.shape == (tokens, width) and out.dtype == dtype and out.is_contiguous()
    wide = [value.double().cpu() for value in values[6:]]
    oracle = add_layer_norm(total(values, True).cpu(), None, *wide, eps, kind, impl="reference")
    plain = add_layer_norm(total(values, False), None, *values[6:], eps, kind, impl="reference")
    assert_error_budget(out, plain, oracle, dtype)


def test_nan_stays_in_its_token(impl, dtype, device):
    values = inputs(20, 40, "ids", 1, dtype, device)
    clean = embed_layer_norm(*values, 1e-6, impl=impl)
    word = values[0][7]
    values[3][word, 11] = math.nan
    broken = embed_layer_norm(*values, 1e-6, impl=impl)
    touched = values[0] == word
    assert broken[touched].isnan().all()
    assert_same_values(broken[~touched], clean[~touched])


def test_into_a_place_within_a_larger_buffer(impl, dtype, device):
    values = inputs(20, 40, "ids", 4, dtype, device)
    expected = embed_layer_norm(*values, 1e-6, impl=impl)
    buffer = torch.full((30, 40), math.nan, dtype=dtype, device=device)
    out = embed_layer_norm(*values, 1e-6, out=buffer[3:23], impl=impl)
    assert out.data_ptr() == buffer[3].data_ptr()
    assert_same_values(buffer[3:23], expected)
    assert buffer[:3].isnan().all() and buffer[23:].isnan().all()
    for wrong, error in (
        (buffer[:19], ValueError),
        (buffer[:20].double(), TypeError),
        (buffer[:20].T.contiguous().T, ValueError),
    ):
        with pytest.raises(error, match="out: expected"):
            embed_layer_norm(*values, 1e-6, out=wrong, impl=impl)


def test_strided_tables_and_ids(impl, device):
    values = list(inputs(20, 40, "ids", 2, torch.float32, device))
    expected = embed_layer_norm(*values, 1e-6, impl=impl)
    for index in range(3):
        values[index] = torch.stack((values[index], values[index] * 0 - 1), 1)[:, 0]
    for index in range(3, 6):
        values[index] = values[index].T.contiguous().T
    assert_same_values(embed_layer_norm(*values, 1e-6, impl=impl), expected)


def test_ids_outside_a_table_are_refused(impl, device):
    if device != "cpu":
        pytest.skip("a GPU reads zeros: a check would wait for it")
    values = inputs(20, 40, "ids", 3, torch.float32, device)
    names = ("input_ids", "position_ids", "token_type_ids")
    for name, ids, rows in zip(names, values, ROWS, strict=False):
        for bad in (-1, rows):
            before, ids[13] = int(ids[13]), bad
            with pytest.raises(ValueError, match=f"{name}: expected 0 to {rows - 1}"):
                embed_layer_norm(*values, 1e-6, impl=impl)
            if impl == "native":  # nor does the kernel itself read outside
                with pytest.raises(ValueError, match=f"{name}: expected 0 to {rows - 1}, got {bad}"):
                    implementation("native").embed_layer_norm(values[3][:20] * 0, *values, 1e-6, "standard")
            ids[13] = before


def test_a_table_without_types_is_refused(impl, device):
    values = inputs(20, 40, "no ids", 3, torch.float32, device)
    with pytest.raises(ValueError, match="token_type: expected a table with rows, or None"):
        embed_layer_norm(*values[:5], values[5][:0], *values[6:], 1e-6, impl=impl)
