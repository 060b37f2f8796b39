"""RaggedBatch: packing any mask, positions as the backbones define them, unpacking, buckets, and every refusal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, RobertaConfig
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

from ragged_exit.batch import RaggedBatch, check_ids, token_bucket
from ragged_exit.testing import assert_same_values, seeded

PAD = 1


@st.composite
def padded(draw: st.DrawFn, holes: bool = True) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask): right or left padding, or any 0/1 mask; padded places may hold any id."""
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    kind = draw(st.sampled_from(("right", "left", "any"))) if holes else "right"
    mask = torch.zeros(rows, width, dtype=torch.int64)
    for row in range(rows):
        if kind == "any":
            bits = draw(st.lists(st.booleans(), min_size=width, max_size=width))
            mask[row] = torch.tensor(bits).long()
            mask[row, draw(st.integers(0, width - 1))] = 1
        else:
            length = draw(st.integers(1, width))
            mask[row, slice(0, length) if kind == "right" else slice(width - length, width)] = 1
    ids = torch.randint(0, 20, (rows, width), generator=seeded(draw(st.integers(0, 2**31))))
    if draw(st.booleans()):
        ids = torch.where(mask == 1, ids, PAD)
    return ids, mask


def by_hand(values: Tensor, mask: Tensor) -> list[list[int]]:
    return [
        [value for value, kept in zip(row, bits, strict=True) if kept]
        for row, bits in zip(values.tolist(), mask.tolist(), strict=True)
    ]


def flat(rows: list[list[int]]) -> list[int]:
    return [value for row in rows for value in row]


@given(padded(), st.sampled_from((torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32)))
def test_pack_keeps_what_the_mask_keeps(case, mask_dtype):
    ids, mask = case
    types, positions = ids % 2, ids + 100
    batch = RaggedBatch.pack(ids, mask.to(mask_dtype), types, positions)
    rows = by_hand(ids, mask)
    lengths = [len(row) for row in rows]
    assert batch.input_ids.tolist() == flat(rows) and batch.input_ids.dtype == torch.int64
    assert batch.token_type_ids.tolist() == flat(by_hand(types, mask))
    assert batch.position_ids.tolist() == flat(by_hand(positions, mask))
    assert batch.seqlens.tolist() == lengths and batch.cu_seqlens.diff().tolist() == lengths
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens.dtype == batch.live.dtype == torch.int32
    assert batch.live.tolist() == [len(rows), sum(lengths)] == [batch.rows, batch.tokens]
    assert batch.sample_ids.tolist() == list(range(len(rows))) and batch.row_capacity == len(rows)
    assert batch.max_seqlen == max(lengths)
    assert batch.hidden is None and batch.state == {}


@given(padded())
def test_bert_positions_are_columns(case):
    ids, mask = case
    batch = RaggedBatch.pack(ids, mask)
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    assert batch.position_ids.tolist() == flat(by_hand(columns, mask))
    assert batch.token_type_ids is None


@given(padded())
def test_roberta_positions_are_transformers_own(case):
    ids, mask = case
    batch = RaggedBatch.pack(ids, mask, padding_idx=PAD)
    theirs = RobertaEmbeddings.create_position_ids_from_input_ids(ids, PAD)
    assert batch.position_ids.tolist() == flat(by_hand(theirs, mask))


@pytest.fixture(scope="module")
def embeddings() -> dict[int | None, torch.nn.Module]:
    """BERT's (padding_idx None) and RoBERTa's embeddings with random weights."""
    sizes = {"vocab_size": 20, "hidden_size": 8, "max_position_embeddings": 20, "type_vocab_size": 2}
    torch.manual_seed(0)
    bert = BertEmbeddings(BertConfig(**sizes)).eval()
    roberta = RobertaEmbeddings(RobertaConfig(**sizes, pad_token_id=PAD)).eval()
    return {None: bert, PAD: roberta}


@given(case=padded(), padding_idx=st.sampled_from((None, PAD)))
@torch.no_grad()
def test_packed_embeddings_are_the_padded_ones(embeddings, case, padding_idx):
    """The backbone's own embeddings of the padded input, at the tokens that the mask keeps."""
    ids, mask = case
    batch = RaggedBatch.pack(ids, mask, ids % 2, padding_idx=padding_idx)
    embed = embeddings[padding_idx]
    theirs = embed(input_ids=ids, token_type_ids=ids % 2)[mask == 1]
    packed = {"input_ids": batch.input_ids, "token_type_ids": batch.token_type_ids, "position_ids": batch.position_ids}
    ours = embed(**{name: value[None] for name, value in packed.items()})[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@given(padded(holes=False), st.sampled_from((None, PAD)), st.booleans())
def test_sequences_are_packed_as_right_padding_is(case, padding_idx, with_types):
    ids, mask = case
    rows, types = by_hand(ids, mask), by_hand(ids % 2, mask)
    packed = RaggedBatch.pack(ids, mask, ids % 2 if with_types else None, padding_idx=padding_idx)
    listed = RaggedBatch.from_sequences(rows, types if with_types else None, padding_idx=padding_idx)
    for name in ("input_ids", "position_ids", "cu_seqlens", "live", "seqlens", "sample_ids"):
        assert_same_values(getattr(listed, name), getattr(packed, name))
    if with_types:
        assert_same_values(listed.token_type_ids, packed.token_type_ids)
    else:
        assert listed.token_type_ids is None and packed.token_type_ids is None


def test_sequences_may_be_arrays():
    expected = [5, 6, 7]
    for some in (np.array([5, 6]), (5, 6), range(5, 7)):
        assert RaggedBatch.from_sequences([some, [7]]).input_ids.tolist() == expected


def test_no_mask_keeps_everything():
    ids = torch.tensor([[3, 4], [5, 6]], dtype=torch.int32)
    batch = RaggedBatch.pack(ids)
    assert batch.input_ids.tolist() == [3, 4, 5, 6] and batch.position_ids.tolist() == [0, 1, 0, 1]


@given(padded(), st.sampled_from(((), (3,), (2, 2))), st.sampled_from((0.0, -1.5)), st.integers(0, 5))
def test_unpack_is_the_inverse_of_pack(case, trailing, fill, spare):
    """Right padded: row b holds its values first, then the fill. What lies past the live tokens is not touched."""
    ids, mask = case
    batch = RaggedBatch.pack(ids, mask)
    values = torch.randn(batch.tokens + spare, *trailing, generator=seeded(1))
    padded_values, new_mask = batch.unpack(values, fill=fill)
    lengths = batch.seqlens.tolist()
    assert padded_values.shape == (len(lengths), max(lengths), *trailing)
    start = 0
    for row, length in enumerate(lengths):
        assert_same_values(padded_values[row, :length], values[start : start + length])
        assert bool((padded_values[row, length:] == fill).all())
        assert new_mask[row].tolist() == [1] * length + [0] * (max(lengths) - length)
        start += length
    again = batch.with_hidden(values)
    assert_same_values(again.unpack(fill=fill)[0], padded_values)  # hidden is the default
    assert batch.hidden is None and again.input_ids is batch.input_ids
    assert RaggedBatch.pack(batch.unpack(batch.input_ids)[0], new_mask).input_ids.tolist() == batch.input_ids.tolist()


@given(st.integers(1, 20_000))
def test_token_buckets(tokens):
    bucket = token_bucket(tokens)
    assert bucket % 32 == 0 and bucket >= tokens
    assert bucket - tokens < 32 or (bucket - tokens) / bucket <= 1 / 16  # the waste
    assert token_bucket(tokens + 1) >= bucket
    assert token_bucket(bucket) == bucket


def test_token_buckets_are_few():
    """oneDNN caches 1,024 kernels and every size costs four: at most 48 sizes up to 2,048 tokens, 96 up to 8,192."""
    assert len({token_bucket(tokens) for tokens in range(1, 2049)}) <= 48
    assert len({token_bucket(tokens) for tokens in range(1, 8193)}) <= 96
    assert [token_bucket(tokens) for tokens in (1, 32, 33, 512, 2048, 2049)] == [32, 32, 64, 512, 2048, 2176]


@pytest.mark.parametrize("tokens", [0, -3])
def test_a_bucket_of_nothing(tokens):
    with pytest.raises(ValueError, match=f"tokens: expected at least 1, got {tokens}"):
        token_bucket(tokens)


IDS = torch.tensor([[5, 6, 7], [8, 9, 1]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((IDS.float(),), TypeError, "input_ids: expected an integer tensor, got torch.float32"),
        ((IDS == 5,), TypeError, "input_ids: expected an integer tensor, got torch.bool"),
        ((IDS.tolist(),), TypeError, "input_ids: expected an integer tensor, got list"),
        ((IDS[0],), ValueError, r"input_ids: expected shape \[batch >= 1, length >= 1\], got \[3\]"),
        ((IDS[:0],), ValueError, r"input_ids: .* got \[0, 3\]"),
        ((IDS[:, :0],), ValueError, r"input_ids: .* got \[2, 0\]"),
        (
            (IDS, torch.ones(2, 2)),
            ValueError,
            r"attention_mask: expected the shape of input_ids \[2, 3\], got \[2, 2\]",
        ),
        ((IDS, IDS), ValueError, "attention_mask: expected only 0 and 1"),
        ((IDS, torch.full((2, 3), 0.5)), ValueError, "attention_mask: expected only 0 and 1"),
        ((IDS, torch.full((2, 3), torch.nan)), ValueError, "attention_mask: expected only 0 and 1"),
        ((IDS, torch.tensor([[1, 1, 1], [0, 0, 0]])), ValueError, "attention_mask: row 1 has no tokens"),
        ((IDS, torch.ones(2, 3, device="meta")), ValueError, "attention_mask: expected the device of input_ids, cpu"),
        ((IDS, None, IDS[:1]), ValueError, "token_type_ids: expected the shape of input_ids"),
        ((IDS, None, None, IDS[:, :2]), ValueError, "position_ids: expected the shape of input_ids"),
    ],
)
def test_pack_names_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        RaggedBatch.pack(*arguments)


def test_from_sequences_names_what_is_wrong():
    with pytest.raises(ValueError, match="sequences: expected at least one, got none"):
        RaggedBatch.from_sequences([])
    with pytest.raises(ValueError, match="sequences: sequence 1 has no tokens"):
        RaggedBatch.from_sequences([[3], [], [4]])
    with pytest.raises(ValueError, match="token_type_ids: expected the lengths of sequences"):
        RaggedBatch.from_sequences([[3, 4], [5]], [[0], [0, 0]])


def test_the_rest_names_what_is_wrong():
    with pytest.raises(ValueError, match="values: expected packed values"):
        RaggedBatch.pack(IDS).unpack()
    with pytest.raises(TypeError, match="labels: expected an integer tensor"):
        check_ids("labels", IDS.to(torch.complex64))
    check_ids("labels", IDS.to(torch.uint8))


@pytest.mark.parametrize("seqlens", [[], [2, 0, 1], [3, -1], [[1, 2]], [2**31]])
def test_lengths_that_make_no_batch(seqlens):
    """A row of no tokens would read its neighbour's [CLS], and a sum past int32 would wrap around."""
    with pytest.raises(ValueError, match="seqlens: expected at"):
        RaggedBatch.from_seqlens(torch.tensor(seqlens, dtype=torch.int64))
    with pytest.raises(ValueError, match="seqlens: expected at most 2147483647 tokens, got 3000000000"):
        RaggedBatch.from_seqlens(torch.full((3,), 10**9, dtype=torch.int32))


def test_sequences_of_fractions_are_refused():
    with pytest.raises(TypeError, match="sequences: expected whole numbers"):
        RaggedBatch.from_sequences([[1.5, 2]])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 2])}, r"cu_seqlens: expected int32 \[B \+ 1\], got torch.int64"),
        ({"cu_seqlens": torch.empty(0, dtype=torch.int32)}, r"cu_seqlens: expected int32 \[B \+ 1\], got .* \[0\]"),
        ({"live": torch.tensor([1, 2])}, r"live: expected int32 \[2\] on cpu, got torch.int64"),
        ({"live": torch.ones(3, dtype=torch.int32)}, r"live: .* got torch.int32 \[3\]"),
        ({"live": torch.ones(2, dtype=torch.int32, device="meta")}, "live: .* on meta"),
        ({"sample_ids": torch.arange(2)}, r"sample_ids: expected \[1\] on cpu, got \[2\] on cpu"),
        ({"sample_ids": torch.arange(1, device="meta")}, "sample_ids: .* on meta"),
    ],
)
def test_what_the_kernels_read_is_what_they_expect(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RaggedBatch.from_seqlens(torch.tensor([2])), **changes)


def test_the_default_device_is_nobodys_business():
    """torch.set_default_device is for the caller's own tensors: batches stay where their inputs are."""
    plain = RaggedBatch.from_sequences([[5, 6], [7]], padding_idx=6)
    ids, mask = torch.tensor([[5, 6], [7, 0]]), torch.tensor([[1, 1], [1, 0]])
    with torch.device("meta"):
        for batch in (RaggedBatch.from_sequences([[5, 6], [7]], padding_idx=6), RaggedBatch.pack(ids, mask)):
            for name in ("cu_seqlens", "live", "seqlens", "sample_ids", "input_ids", "position_ids"):
                assert getattr(batch, name).device.type == "cpu", name
            assert batch.cu_seqlens.tolist() == plain.cu_seqlens.tolist()
