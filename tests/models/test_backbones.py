"""Every backbone on packed tokens equals its padded model, in every layer; UER's equals its formulas written again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from system_cases import config_of, randomised
from tiny import LONGEST, bert_config, impls, packed_encoder, padded, random_rows
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertModel,
    GPT2Config,
    GPT2Model,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import ragged_exit as rx
from ragged_exit.backbones import ROBERTA_LIKE, backbone_weights
from ragged_exit.models.base import new_backbone
from ragged_exit.models.uer import UerModel

KINDS = ("albert", "bert", "distilbert", "electra", "uer", *ROBERTA_LIKE)


def tiny(kind: str, **changes: object) -> nn.Module:
    return randomised(new_backbone(config_of(kind, **changes)))


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_equals_the_padded_model(kind: str, side: str, impl: str) -> None:
    assert_every_layer_equal(tiny(kind), side, impl)


def assert_every_layer_equal(backbone: nn.Module, side: str = "right", impl: str = "reference") -> None:
    kind = backbone.config.model_type
    ids, mask = padded(random_rows(9), side=side, fill=1 if kind in ROBERTA_LIKE else 0)
    types = {} if kind in ("distilbert", *ROBERTA_LIKE) else {"token_type_ids": (ids % 2) * mask}
    with torch.no_grad():
        hidden = backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True, **types).hidden_states
    encoder = packed_encoder(backbone, impl)
    assert encoder.num_layers == len(hidden) - 1 == 4
    batch = encoder.embed(encoder.pack(ids, mask, **types))
    for layer in range(encoder.num_layers):
        encoder.layer(layer, batch)
        torch.testing.assert_close(batch.hidden[: batch.tokens], hidden[layer + 1][mask == 1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_are_those_that_the_layers_were_made_with(kind: str) -> None:
    backbone = tiny(kind)
    config: Any = backbone.config
    made = config.num_attention_heads  # of DistilBERT another name of n_heads
    config.num_attention_heads = made // 2
    assert backbone_weights(backbone).num_heads == made > 1
    assert_every_layer_equal(backbone)


def test_layers_that_differ_in_their_heads_are_refused() -> None:
    backbone: Any = tiny("bert")
    backbone.encoder.layer[1].attention.self.num_attention_heads = 1
    with pytest.raises(ValueError, match="model: expected as many attention heads in all layers, got"):
        backbone_weights(backbone)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("without", [("key",), ("query", "key", "value"), ("attention.output.dense", "output.dense")])
def test_linears_without_a_bias(without: tuple[str, ...], impl: str) -> None:
    backbone = tiny("bert")
    for name, module in backbone.named_modules():
        if name.endswith(without) and isinstance(module, nn.Linear):
            module.bias = None
    assert_every_layer_equal(backbone, impl=impl)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_asks_for_tuples_changes_nothing(kind: str) -> None:
    ids = torch.tensor([[5, 6, 7]])
    plain, other = (randomised(rx.FastBert(config_of(kind, return_dict=value))) for value in (True, False))
    with torch.no_grad():
        assert torch.equal(other(ids).logits, plain(ids).logits)


def test_shared_layers_are_packed_once() -> None:
    encoder = packed_encoder(tiny("albert", num_hidden_groups=1))
    assert len({id(layer) for layer in encoder.layers}) == 1
    encoder = packed_encoder(tiny("albert", num_hidden_groups=2))
    assert [encoder.layers.index(layer) for layer in encoder.layers] == [0, 0, 2, 2]


def test_token_types_are_ignored_without_a_table_and_checked_with_one() -> None:
    ids = torch.tensor([[5, 6, 7]])
    encoder = packed_encoder(tiny("distilbert"))
    plain, typed = (encoder.embed(encoder.pack(ids, None, types)) for types in (None, torch.full_like(ids, 9)))
    assert torch.equal(plain.hidden, typed.hidden)
    encoder.check_sequence([5, 6], [9, 9])
    with pytest.raises(ValueError, match=r"token_type_ids: expected values in \[0, 2\), got 2"):
        packed_encoder(tiny("uer")).pack(ids, None, torch.full_like(ids, 2))


def uer_by_hand(model: UerModel, ids: Tensor, segments: Tensor) -> Tensor:
    """UER's encoder on one unpadded row of float64, from its state dict."""
    state = model.state_dict()
    heads = model.config.num_attention_heads

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        spread = ((x - x.mean(1, keepdim=True)).square().sum(1, keepdim=True) / (x.shape[1] - 1)).sqrt()
        return state[f"{name}.weight"] * (x - x.mean(1, keepdim=True)) / (spread + 1e-6) + state[f"{name}.bias"]

    tables = (state[f"embedding.{name}_embedding.weight"] for name in ("word", "position", "segment"))
    word, position, segment = tables
    x = norm(word[ids] + position[: len(ids)] + segment[segments], "embedding.layer_norm")
    for layer in range(model.config.num_hidden_layers):
        at = f"encoder.transformer.{layer}"
        query, key, value = (
            linear(x, f"{at}.self_attn.linear_layers.{part}").view(len(ids), heads, -1).transpose(0, 1)
            for part in range(3)
        )
        weights = (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(-1)
        context = (weights @ value).transpose(0, 1).flatten(1)
        x = norm(linear(context, f"{at}.self_attn.final_linear") + x, f"{at}.layer_norm_1")
        inner = linear(x, f"{at}.feed_forward.linear_1")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = norm(linear(inner, f"{at}.feed_forward.linear_2") + x, f"{at}.layer_norm_2")
    return x


def test_uer_equals_its_formulas() -> None:
    model = tiny("uer").double()
    ids = torch.tensor(random_rows(1, seed=3)[0] + [5, 6, 7])[:LONGEST]
    types = (torch.arange(len(ids)) >= 2).long()
    padding = torch.zeros(1, 2, dtype=torch.int64)
    with torch.no_grad():
        expected = uer_by_hand(model, ids, types + 1)
        got = model(
            torch.cat((ids[None], padding), 1),
            attention_mask=torch.cat((torch.ones_like(ids)[None], padding), 1),
            token_type_ids=torch.cat((types[None], padding), 1),
        ).last_hidden_state
    torch.testing.assert_close(got[0, : len(ids)], expected, rtol=0, atol=1e-12)


def test_what_is_not_supported_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"expected an encoder of \['albert', .*'xlm-roberta'\], got model type 'gpt2'"
    ):
        backbone_weights(GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)))
    config = AlbertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, inner_group_num=2, vocab_size=9)
    with pytest.raises(ValueError, match="inner_group_num 1, got 2"):
        backbone_weights(AlbertModel(config))
    with pytest.raises(ValueError, match="exit_layers: expected ascending layers from 1 to 4 that end with 4"):
        rx.Pabee(config_of("bert"), exit_layers=[1, 3])


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"albert"}))
def test_layers_that_were_cut_off_by_hand_are_refused(kind: str) -> None:
    backbone = tiny(kind)
    place = {"distilbert": "transformer.layer", "uer": "encoder.transformer"}.get(kind, "encoder.layer")
    backbone.set_submodule(place, backbone.get_submodule(place)[:2])
    for use in (backbone_weights, lambda cut: rx.FastBert(cut.config, backbone=cut)):
        with pytest.raises(ValueError, match="backbone: expected 4 layers, its config's num_hidden_layers, got 2"):
            use(backbone)
    backbone.config.num_hidden_layers = 2
    assert len(backbone_weights(backbone).layers) == 2


@pytest.mark.parametrize(
    "theirs",
    [
        lambda: GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)),
        lambda: XLNetForSequenceClassification(XLNetConfig(vocab_size=11, d_model=8, n_layer=1, n_head=2, d_inner=8)),
        lambda: nn.Linear(2, 2),
        lambda: BertModel(bert_config(is_decoder=True)),
    ],
)
def test_an_unknown_architecture_is_refused_before_it_is_trained(theirs: Any, tmp_path: Path) -> None:
    message = "backbone: expected an encoder"
    source = theirs()
    with pytest.raises(ValueError, match=message):
        rx.DeeBert.from_backbone(source)
    if hasattr(source, "save_pretrained"):
        source.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            rx.DeeBert.from_backbone(tmp_path)
        with pytest.raises(ValueError, match=message):
            rx.truncated(source, 1)


def test_an_unknown_activation_is_refused_before_training() -> None:
    """By what ``fit`` reads first."""
    with pytest.raises(ValueError, match=r"hidden_act: expected one of .* got 'quick_gelu'"):
        backbone_weights(tiny("bert", hidden_act="quick_gelu"))


@pytest.mark.parametrize(("layers", "groups"), [(18, 14), (7, 3)])
def test_alberts_groups_need_not_divide_its_layers(layers: int, groups: int) -> None:
    backbone = tiny("albert", num_hidden_layers=layers, num_hidden_groups=groups)
    ids, mask = padded(random_rows(3))
    with torch.no_grad():
        hidden = backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    encoder = packed_encoder(backbone)
    batch = encoder.embed(encoder.pack(ids, mask))
    for layer in range(layers):
        encoder.layer(layer, batch)
        torch.testing.assert_close(batch.hidden[: batch.tokens], hidden[layer + 1][mask == 1], rtol=0, atol=5e-5)
