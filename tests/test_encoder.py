"""PackedEncoder gives Hugging Face's hidden states, layer by layer, for every mask.

fp32 states are of the order of 1 and sum some hundred products a layer: 2e-5 is about 20 x what plain fp32 loses.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packed_cases import PACKED_NATIVELY
from tiny import (
    LONGEST,
    VOCAB,
    bert_config,
    impls,
    one_thread,  # noqa: F401
    packed_encoder,
    padded,
    random_rows,
    roberta_config,
    tiny_backbone,
)
from torch import Tensor, nn

from ragged_exit import linears
from ragged_exit.backbones import backbone_weights
from ragged_exit.batch import RaggedBatch, token_bucket
from ragged_exit.encoder import PackedEncoder
from ragged_exit.linears import check_activation
from ragged_exit.ops import exit_step
from ragged_exit.ops.dispatch import native_available
from ragged_exit.ops.exit_step import packed_for
from ragged_exit.rules import Entropy
from ragged_exit.testing import random_head, seeded

CLOSE = {"rtol": 0, "atol": 2e-5}
MASKS = ("none", "right", "left", "holes")


def masked_inputs(mask: str, fill: int = 0) -> tuple[Tensor, Tensor | None]:
    ids, attention_mask = padded(random_rows(9, seed=2), side="left" if mask == "left" else "right", fill=fill)
    if mask == "none":
        return torch.randint(4, VOCAB, (5, 11)), None
    if mask == "holes":
        keep = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.6
        keep[torch.arange(9), torch.arange(9) % ids.shape[1]] = True  # a token a row, in another column each
        assert keep.diff(dim=1).sum(1).max() > 2
        return torch.randint(4, VOCAB, ids.shape), keep.long()
    return ids, attention_mask


def layer_states(encoder: PackedEncoder, batch: RaggedBatch) -> list[Tensor]:
    """After the embeddings and every layer: the live tokens ``[T, H]``."""
    batch = encoder.embed(batch)
    assert len(batch.hidden) == token_bucket(batch.tokens)
    states = [batch.hidden[: batch.tokens].clone()]
    for index in range(encoder.num_layers):
        encoder.layer(index, batch)
        states.append(batch.hidden[: batch.tokens].clone())
    return states


@torch.no_grad()
def expected_states(backbone: nn.Module, ids: Tensor, mask: Tensor | None, types: Tensor | None = None) -> list[Tensor]:
    hidden = backbone(input_ids=ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True).hidden_states
    keep = torch.ones_like(ids) if mask is None else mask
    return [state[keep.bool()] for state in hidden]


def assert_states(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) == 5
    for number, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda text, n=number: f"layer {n}: {text}")


# against Hugging Face -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("mask", MASKS)
def test_bert_states_are_hugging_faces(mask: str, impl: str) -> None:
    backbone = tiny_backbone(bert_config())
    ids, attention_mask = masked_inputs(mask)
    types = torch.randint(0, 2, ids.shape)
    encoder = packed_encoder(backbone, impl)
    assert_states(
        layer_states(encoder, encoder.pack(ids, attention_mask, types)),
        expected_states(backbone, ids, attention_mask, types),
    )


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("mask", ["none", "right", "left"])
def test_roberta_states_are_hugging_faces(mask: str, impl: str) -> None:
    backbone = tiny_backbone(roberta_config())
    ids, attention_mask = masked_inputs(mask, fill=1)
    encoder = packed_encoder(backbone, impl)
    assert_states(
        layer_states(encoder, encoder.pack(ids, attention_mask)), expected_states(backbone, ids, attention_mask)
    )


def test_roberta_positions_count_pads_as_hugging_face_does_even_where_the_mask_keeps_them() -> None:
    backbone = tiny_backbone(roberta_config())
    ids = torch.tensor([[5, 1, 6, 7], [8, 9, 1, 1]])
    encoder = packed_encoder(backbone)
    assert_states(layer_states(encoder, encoder.pack(ids)), expected_states(backbone, ids, None))


def test_given_position_ids_are_used() -> None:
    backbone = tiny_backbone(bert_config())
    ids, positions = torch.randint(4, VOCAB, (3, 6)), torch.randint(0, LONGEST, (3, 6))
    encoder = packed_encoder(backbone)
    with torch.no_grad():
        expected = backbone(input_ids=ids, position_ids=positions).last_hidden_state.flatten(0, 1)
    got = layer_states(encoder, encoder.pack(ids, position_ids=positions))[-1]
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("config", [bert_config(), roberta_config()], ids=["bert", "roberta"])
def test_sequences_are_packed_as_padded_rows_are(config: Any) -> None:
    encoder = packed_encoder(tiny_backbone(config))
    rows = random_rows(7)
    ids, mask = padded(rows, fill=1)
    types = None if config.type_vocab_size == 1 else [[place % 2 for place in range(len(row))] for row in rows]
    padded_types = None if types is None else torch.arange(ids.shape[1]).remainder(2).expand(ids.shape)
    one, other = encoder.pack(ids, mask, padded_types), encoder.pack_sequences(rows, types)
    for name in ("input_ids", "position_ids", "cu_seqlens", "live", "seqlens", "sample_ids"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.token_type_ids is None) == (types is None)
    if types is not None:
        assert torch.equal(one.token_type_ids, other.token_type_ids)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh"])
def test_every_activation_is_hugging_faces(activation: str, impl: str) -> None:
    backbone = tiny_backbone(bert_config(hidden_act=activation))
    ids, mask = masked_inputs("right")
    encoder = packed_encoder(backbone, impl)
    got, expected = layer_states(encoder, encoder.pack(ids, mask)), expected_states(backbone, ids, mask)
    # 2e-6: below the difference between gelu and its tanh form
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_the_backbones_norm_eps_is_used(eps: float) -> None:
    backbone = tiny_backbone(bert_config(layer_norm_eps=eps))
    ids, mask = masked_inputs("right")
    encoder = packed_encoder(backbone)
    assert_states(layer_states(encoder, encoder.pack(ids, mask)), expected_states(backbone, ids, mask))


@pytest.mark.parametrize("impl", impls())
def test_bf16_loses_no_more_than_twice_what_plain_pytorch_does(impl: str) -> None:
    backbone = tiny_backbone(bert_config())
    ids, mask = masked_inputs("right")
    encoder = packed_encoder(backbone, impl, torch.bfloat16)
    batch = encoder.pack(ids, mask)
    got = layer_states(encoder, batch)
    assert all(state.dtype == torch.bfloat16 for state in got)
    oracle = expected_states(backbone.double(), ids, mask)
    plain = expected_states(tiny_backbone(bert_config()).bfloat16(), ids, mask)
    for ours, theirs, truth in zip(got, plain, oracle, strict=True):
        error, budget = (ours - truth).square().mean().sqrt(), (theirs - truth).square().mean().sqrt()
        assert error <= 2 * budget, f"{error} > 2 x {budget}"
        assert error > 1e-6  # it did run in bf16


def test_the_encoder_is_a_snapshot() -> None:
    backbone = tiny_backbone(bert_config())
    ids, mask = masked_inputs("right")
    encoder = packed_encoder(backbone)
    before = layer_states(encoder, encoder.pack(ids, mask))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1.0)
    for one, other in zip(before, layer_states(encoder, encoder.pack(ids, mask)), strict=True):
        assert torch.equal(one, other)


def after_layer(encoder: PackedEncoder, batch: RaggedBatch) -> Tensor:
    batch = batch.with_hidden(batch.hidden.clone())
    encoder.layer(0, batch)
    return batch.hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [0, 5, 64])
def test_parts_give_the_bits_of_the_whole(monkeypatch, dtype: torch.dtype, room: int) -> None:
    """Parts of at most 32 tokens, a sequence longer than that, buffers with more or less room than parts ask for."""
    encoder = PackedEncoder(
        backbone_weights(tiny_backbone(bert_config(max_position_embeddings=80, hidden_act="relu"))),
        impl=None,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    assert encoder.layers[0].whole is None  # not one call, which has parts of its own
    rows = [*random_rows(40), [5] * 80, *random_rows(9, seed=1), [6] * 33]
    batch = encoder.embed(encoder.pack_sequences(rows))
    live = batch.hidden[: batch.tokens]
    batch = batch.with_hidden(F.pad(live, (0, 0, 0, room), value=math.nan))
    expected = after_layer(encoder, batch)
    monkeypatch.setattr(encoder, "_part_tokens", 32)
    parts = encoder._parts(batch)
    assert len(parts) > 5 and sum(part.tokens for part in parts) == batch.tokens
    assert {part.size for part in parts} == {32, 64, 96} and all(part.tokens <= part.size for part in parts)
    found = after_layer(encoder, batch)
    if dtype == torch.float32 and native_available():
        assert torch.equal(found[: batch.tokens], expected[: batch.tokens])
    else:
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(found[: batch.tokens], expected[: batch.tokens], rtol=0, atol=tolerance)
    assert found[batch.tokens :].isnan().all()  # left alone


@pytest.mark.parametrize("impl", impls())
def test_a_layer_works_in_place_and_leaves_the_rows_of_others_alone(impl: str) -> None:
    """Two parts of one batch share its memory: pools cut batches so."""
    encoder = packed_encoder(tiny_backbone(bert_config()), impl)
    batch = encoder.embed(encoder.pack_sequences(random_rows(5)))
    before, whole = batch.hidden.clone(), after_layer(encoder, batch)
    one, other = batch.part(0, 2), batch.part(2, 5)
    encoder.layer(0, one)
    assert torch.equal(other.hidden, before[one.tokens : batch.tokens])
    encoder.layer(0, other)
    torch.testing.assert_close(batch.hidden[: batch.tokens], whole[: batch.tokens], **CLOSE)
    assert torch.equal(batch.hidden[batch.tokens :], before[batch.tokens :])


@pytest.mark.parametrize("dtype", PACKED_NATIVELY)
def test_a_layer_in_one_call_gives_the_bits_of_its_operations(dtype: torch.dtype) -> None:
    weights = backbone_weights(tiny_backbone(bert_config()))
    encoder = PackedEncoder(weights, impl=None, dtype=dtype, device=torch.device("cpu"))
    batch = encoder.embed(encoder.pack_sequences(random_rows(40)))
    assert encoder.layers[0].whole is not None
    found = after_layer(encoder, batch)
    encoder.layers[0].whole = None
    assert torch.equal(found[: batch.tokens], after_layer(encoder, batch)[: batch.tokens])


@pytest.mark.parametrize("dtype", PACKED_NATIVELY)
def test_a_layer_in_one_call_knows_the_means(dtype: torch.dtype) -> None:
    """To the bit those that a head on the mean computes itself, and only where they are asked for."""
    weights = backbone_weights(tiny_backbone(bert_config()))
    encoder = PackedEncoder(weights, impl=None, dtype=dtype, device=torch.device("cpu"))
    batch = encoder.embed(encoder.pack_sequences(random_rows(40)))
    assert encoder.layer(0, batch) is None
    means = encoder.layer(1, batch, with_means=True)
    assert means is not None
    head = random_head(encoder.hidden_size, 3, seeded(1), pooled_size=32, pooling="mean", dtype=dtype)
    head = packed_for("native", head)
    for found, own in zip(*(exit_step(batch, head, Entropy(0.5), means=known) for known in (means, None)), strict=True):
        assert found == own if isinstance(own, dict) else torch.equal(found, own)
    encoder.layers[1].whole = None
    assert encoder.layer(1, batch, with_means=True) is None


def test_order_of_use_is_checked() -> None:
    encoder = packed_encoder(tiny_backbone(bert_config()))
    batch = encoder.pack_sequences([[5, 6]])
    with pytest.raises(ValueError, match="embed first"):
        encoder.layer(0, batch)
    with pytest.raises(ValueError, match="input_ids"):
        encoder.embed(RaggedBatch.from_seqlens(torch.tensor([2])))


# checks -------------------------------------------------------------------------------------------------------------
@pytest.fixture(params=[bert_config(), roberta_config()], ids=["bert", "roberta"])
def checked(request: pytest.FixtureRequest) -> PackedEncoder:
    return packed_encoder(tiny_backbone(request.param))


def test_ids_outside_the_vocabulary(checked: PackedEncoder) -> None:
    checked.pack(torch.tensor([[VOCAB - 1, 2]]))
    for bad in (VOCAB, -1):
        with pytest.raises(ValueError, match=rf"input_ids: expected values in \[0, {VOCAB}\), got .*{bad}"):
            checked.pack(torch.tensor([[5, bad]]))
        with pytest.raises(ValueError, match="input_ids"):
            checked.pack_sequences([[5], [7, bad]])
        with pytest.raises(ValueError, match="input_ids"):
            checked.check_sequence([5, bad])
    checked.pack(torch.tensor([[5, VOCAB]]), torch.tensor([[1, 0]]))  # what the mask drops is nobody's business


def test_sequences_longer_than_the_position_table(checked: PackedEncoder) -> None:
    assert checked.max_positions == LONGEST
    fits = [5] * LONGEST
    checked.pack(torch.tensor([fits]))
    checked.pack_sequences([fits])
    checked.check_sequence(fits)
    message = f"sequence length: expected at most {LONGEST} positions .* got {LONGEST + 1}"
    with pytest.raises(ValueError, match=message):
        checked.pack(torch.tensor([[*fits, 5]]))
    with pytest.raises(ValueError, match=message):
        checked.pack_sequences([[5], [*fits, 5]])
    with pytest.raises(ValueError, match=f"input_ids: expected at most {LONGEST} tokens .* got {LONGEST + 1}"):
        checked.check_sequence([*fits, 5])


def test_positions_outside_the_table(checked: PackedEncoder) -> None:
    table = checked.position_embeddings.shape[0]
    ids = torch.tensor([[5, 6]])
    checked.pack(ids, position_ids=torch.tensor([[0, table - 1]]))
    with pytest.raises(ValueError, match="position_ids"):
        checked.pack(ids, position_ids=torch.tensor([[0, table]]))
    with pytest.raises(ValueError, match="position_ids"):
        checked.pack(ids, position_ids=torch.tensor([[-1, 0]]))


def test_token_types_outside_the_table(checked: PackedEncoder) -> None:
    types = len(checked.token_type_embeddings)
    ids = torch.tensor([[5, 6]])
    for bad in (types, -1):
        with pytest.raises(ValueError, match=rf"token_type_ids: expected values in \[0, {types}\)"):
            checked.pack(ids, token_type_ids=torch.tensor([[0, bad]]))
        with pytest.raises(ValueError, match="token_type_ids"):
            checked.pack_sequences([[5, 6]], [[0, bad]])
        with pytest.raises(ValueError, match="token_type_ids"):
            checked.check_sequence([5, 6], [0, bad])
    with pytest.raises(ValueError, match="token_type_ids: expected 2 values"):
        checked.check_sequence([5, 6], [0])


@pytest.mark.parametrize(
    "good", [[5, 6], (5, 6), np.array([5, 6]), torch.tensor([5, 6]), [np.int32(5), np.int64(6)]], ids=str
)
def test_check_sequence_takes_integers_of_any_kind(good: Any) -> None:
    encoder = packed_encoder(tiny_backbone(bert_config()))
    encoder.check_sequence(good)
    assert encoder.pack_sequences([good]).input_ids.tolist() == [5, 6]


@pytest.mark.parametrize(
    "bad",
    [[5.0, 6.0], [float("nan")], ["5"], "56", [True, False], [None], [[5]], np.array([5.0]), torch.tensor([5.0]), 5],
    ids=str,
)
def test_check_sequence_takes_nothing_but_integers(bad: Any) -> None:
    encoder = packed_encoder(tiny_backbone(bert_config()))
    with pytest.raises(TypeError):
        encoder.check_sequence(bad)
    with pytest.raises(TypeError):
        encoder.check_sequence([5], bad if isinstance(bad, list) and len(bad) == 1 else [0.5])
    with pytest.raises(ValueError, match="at least one"):
        encoder.check_sequence([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
    ],
)
def test_backbones_that_are_not_supported_are_refused(change: dict[str, Any], message: str) -> None:
    backbone = tiny_backbone(bert_config())
    config = backbone.config.to_dict() | change
    with pytest.raises(ValueError, match=f"backbone: .*{message}"):
        backbone_weights(SimpleNamespace(config=SimpleNamespace(**config)))  # type: ignore[arg-type]


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden_act: .*'gelu'.*'quick_gelu'"):
        check_activation("quick_gelu")
    with pytest.raises(ValueError, match="hidden_act"):
        packed_encoder(tiny_backbone(bert_config(hidden_act="quick_gelu")))


@pytest.mark.parametrize("impl", impls())
def test_the_encoder_is_the_same_without_prepacking(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "prepacking_available", lambda: False)
    monkeypatch.setattr(linears, "linears_available", lambda dtype: False)
    backbone = tiny_backbone(bert_config())
    ids, mask = masked_inputs("holes")
    encoder = packed_encoder(backbone, impl)
    assert encoder.layers[0].qkv.kind == "plain"
    assert_states(layer_states(encoder, encoder.pack(ids, mask)), expected_states(backbone, ids, mask))
