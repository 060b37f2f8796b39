"""compact, attention and the normalisations as Triton kernels: odd dtypes, sizes and memory; every op in tests/ops."""

from __future__ import annotations

import itertools

import every_op
import pytest
import torch
import torch.nn.functional as F

from ragged_exit.batch import RaggedBatch
from ragged_exit.ops import add_layer_norm, compact, embed_layer_norm, exit_decide, varlen_attention
from ragged_exit.ops import triton as triton_kernels
from ragged_exit.rules import Entropy
from ragged_exit.testing import (
    assert_compacted,
    assert_error_budget,
    assert_same_values,
    attention_oracle,
    qkv_views,
    random_logits,
    seeded,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# shape of one item and dtype: 16-byte rows and rows of 1, 2, 4, 6, 14 and 0 bytes, more than one block of words
ITEMS = [
    ((768,), torch.float32),
    ((1100,), torch.float16),
    ((7,), torch.bfloat16),
    ((3, 5), torch.float64),
    ((), torch.int64),
    ((), torch.bool),
    ((3,), torch.int8),
    ((3,), torch.int16),
    ((2,), torch.complex64),
    ((0,), torch.float32),
]


def plan_for(lengths: list[int], stay: list[int], capacity: int) -> tuple[torch.Tensor, ...]:
    """survivors, cu_seqlens, new cu_seqlens and live in buffers of ``capacity`` rows."""

    def bounds(values: list[int]) -> torch.Tensor:
        padded = torch.tensor([0, *values, *[0] * (capacity - len(values))])
        return padded.cumsum(0).to(torch.int32)

    survivors = torch.tensor(stay + [-1] * (capacity - len(stay)), dtype=torch.int32)
    new = bounds([lengths[row] for row in stay])
    return survivors, bounds(lengths), new, torch.tensor([len(stay), int(new[-1])], dtype=torch.int32)


def poisoned(items: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((items, *like.shape[1:]), 1, dtype=like.dtype)


@pytest.mark.parametrize("stay", [[0, 1, 2, 3, 4], [1, 4], [3], []], ids=str)
@pytest.mark.parametrize("spare", [0, 37])
def test_compact_any_dtype(stay, spare):
    lengths = [3, 1, 4, 2, 19]
    plan = plan_for(lengths, stay, 7)
    generator = seeded(0)
    tokens = [torch.randint(0, 2, (31, *shape), generator=generator).to(dtype) for shape, dtype in ITEMS]
    rows = [torch.randint(0, 2, (7, *shape), generator=generator).to(dtype) for shape, dtype in ITEMS]
    starts = plan[1].tolist()
    source = [token for row in stay for token in range(starts[row], starts[row + 1])]
    gathered = [poisoned(len(source) + spare, value) for value in tokens] + [poisoned(7, value) for value in rows]
    triton_kernels.compact(gathered[: len(tokens)], gathered[len(tokens) :], tokens, rows, *plan)
    for value, old, kept in zip(gathered, tokens + rows, [source] * len(tokens) + [stay] * len(rows), strict=True):
        assert value.dtype == old.dtype and value.shape[1:] == old.shape[1:]
        assert_same_values(value[: len(kept)], old[kept])
        assert not value[len(kept) :].any()


def test_compact_unaligned_and_strided():
    """Rows that start anywhere in memory: narrower words; strides: a copy first."""
    plan = plan_for([2, 3, 1], [0, 2], 3)
    buffer = torch.arange(7 * 8, dtype=torch.float16)
    shifted = buffer[1 : 1 + 6 * 8].view(6, 8)
    strided = torch.arange(60.0).view(6, 10)[:, 2:5]
    for value in (shifted, strided):
        gathered = poisoned(3, value)
        triton_kernels.compact([gathered], [], [value], [], *plan)
        assert_same_values(gathered, value[[0, 1, 5]])


def test_compact_follows_a_decision():
    generator = seeded(1)
    seqlens = torch.randint(1, 9, (40,), generator=generator)
    hidden = torch.randn(int(seqlens.sum()), 24, generator=generator)
    batch = RaggedBatch.from_seqlens(seqlens, hidden=hidden, state={"threshold": torch.rand(40, generator=generator)})
    decision = exit_decide(batch, random_logits(40, 2, generator), Entropy(0.3), impl="triton")
    assert 0 < int(decision.live[0]) < 40
    capacity = int(decision.live[1]) + 5
    assert_compacted(batch, decision, compact(batch, decision, capacity, impl="triton"), capacity)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [8, 24, 64, 80, 128])
def test_attention(dtype, head_size):
    """Lengths around the tiles' edges, more room than tokens, and a longest length that is only an upper bound."""
    lengths = [1, 31, 32, 33, 70, 0, 0]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens = sum(lengths) + 40
    q, k, v = qkv_views(tokens, 2, head_size, seeded(head_size), dtype=dtype)
    scale = head_size**-0.5
    out = varlen_attention(q, k, v, cu_seqlens, 100, scale, impl="triton")
    plain = [
        F.scaled_dot_product_attention(*(x[start:end].transpose(0, 1) for x in (q, k, v)), scale=scale).transpose(0, 1)
        for start, end in itertools.pairwise(cu_seqlens)
        if start < end
    ]
    oracle = attention_oracle(q, k, v, lengths, scale)
    assert_error_budget(out[: sum(lengths)], torch.cat(plain), oracle, dtype)
    assert not out[sum(lengths) :].any()


def test_attention_is_batch_invariant():
    q, k, v = qkv_views(100, 2, 32, seeded(0), dtype=torch.bfloat16)
    together = varlen_attention(q, k, v, torch.tensor([0, 30, 77, 100], dtype=torch.int32), 47, 0.2, impl="triton")
    alone = varlen_attention(
        *(x[30:77] for x in (q, k, v)), torch.tensor([0, 47], dtype=torch.int32), 47, 0.2, impl="triton"
    )
    assert torch.equal(together[30:77], alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["standard", "uer"])
@pytest.mark.parametrize("types", ["ids", "first", "none"])
def test_embed_layer_norm(dtype, kind, types):
    generator = seeded(0)
    size, tokens = 100, 9

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    ids = [torch.randint(0, rows, (tokens,), generator=generator) for rows in (50, 12, 2)]
    word, position, token_type, weight, bias = new(50, size), new(12, size), new(2, size), new(size), new(size)
    type_ids = ids[2] if types == "ids" else None
    arguments = (ids[0], ids[1], type_ids, word, position, None if types == "none" else token_type, weight, bias, 1e-6)
    out = embed_layer_norm(*arguments, kind, impl="triton")
    plain = embed_layer_norm(*arguments, kind, impl="reference")
    total = word[ids[0]].double() + position[ids[1]].double()
    if types != "none":
        total += token_type[torch.zeros_like(ids[2]) if type_ids is None else type_ids].double()
    oracle = add_layer_norm(total, None, weight.double(), bias.double(), 1e-6, kind, impl="reference")
    for result in (out, plain):
        assert result.dtype == dtype
        assert_error_budget(result, plain, oracle, dtype)


def test_embed_reads_nothing_outside_its_tables():
    """The kernel itself, where no check stands before it: zeros for an id that is not there."""
    table, weight, bias = torch.randn(5, 20), torch.ones(20), torch.zeros(20)
    ids = torch.tensor([2, 5, -1, 10**9])
    out = torch.full((4, 20), torch.nan)
    triton_kernels.embed_layer_norm(
        out, ids, torch.full((4,), 3), None, table, table, None, weight, bias, 1e-5, "standard"
    )
    total = table[3] + torch.stack((table[2], *torch.zeros(3, 20)))
    torch.testing.assert_close(out, F.layer_norm(total, (20,)))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("types", ["ids", "none"])
def test_opcheck_embed(impl, types):
    ids, table, vector = torch.tensor([1, 0, 2]), torch.randn(3, 20), torch.randn(20)
    arguments = (
        torch.empty(3, 20),
        ids,
        ids,
        ids if types == "ids" else None,
        table,
        table,
        table if types == "ids" else None,
        vector,
        vector,
        1e-12,
        "standard",
        impl,
    )
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_autograd_registration")
    results = torch.library.opcheck(torch.ops.ragged_exit.embed_layer_norm, arguments, test_utils=checks)
    assert results == dict.fromkeys(checks, "SUCCESS")


def test_embed_names_the_argument():
    ids, table, vector = torch.tensor([1, 0, 2]), torch.randn(3, 20), torch.randn(20)

    def call(input_ids=ids, position_ids=ids, types=ids, word=table, position=table, token_type=table, weight=vector):
        embed_layer_norm(
            input_ids, position_ids, types, word, position, token_type, weight, vector, 1e-12, impl="triton"
        )

    for changed, error, message in (
        ({"input_ids": torch.tensor([0, 3, 1])}, ValueError, "input_ids: expected 0 to 2"),
        ({"position_ids": torch.tensor([0, -1, 1])}, ValueError, "position_ids: expected 0 to 2"),
        ({"types": ids.int()}, TypeError, "token_type_ids: expected int64"),
        ({"position_ids": ids[:2]}, ValueError, "position_ids: expected"),
        ({"token_type": None}, ValueError, "token_type_ids: expected None"),
        ({"position": table.half()}, TypeError, "position: expected the dtype of word"),
        ({"weight": vector[:5]}, ValueError, "weight: expected"),
    ):
        with pytest.raises(error, match=message):
            call(**changed)


def test_what_the_sanitizer_watches_runs():
    """On a GPU compute-sanitizer runs it; here the interpreter does."""
    every_op.main("cpu")
