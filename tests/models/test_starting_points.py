"""Where a model starts from: plain and fine-tuned encoders, files and loaded modules, all their layers or the first."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from system_cases import batch_of, config_of, randomised
from tiny import random_rows, tiny_deebert
from torch.nn.utils import prune
from transformers import (
    AlbertForSequenceClassification,
    AutoModel,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CamembertForSequenceClassification,
    DistilBertForMultipleChoice,
    DistilBertForSequenceClassification,
    ElectraForSequenceClassification,
    RobertaForSequenceClassification,
    XLMRobertaForSequenceClassification,
)

import ragged_exit as rx

FINE_TUNED = {
    "albert": AlbertForSequenceClassification,
    "bert": BertForSequenceClassification,
    "camembert": CamembertForSequenceClassification,
    "distilbert": DistilBertForSequenceClassification,
    "electra": ElectraForSequenceClassification,
    "roberta": RobertaForSequenceClassification,
    "xlm-roberta": XLMRobertaForSequenceClassification,
}
SYSTEMS = (rx.Berxit, rx.De3Bert, rx.DeeBert, rx.ElasticBert, rx.FastBert, rx.FullDepth, rx.Pabee)


@pytest.mark.parametrize("kind", FINE_TUNED)
@pytest.mark.parametrize("system", [rx.DeeBert, rx.ElasticBert, rx.FullDepth])
def test_a_fine_tuned_model_answers_at_the_last_layer(kind: str, system: Any, tmp_path: Path) -> None:
    """Whatever the architecture's own head is: pooler and tanh, dense and gelu (ELECTRA), pre_classifier and relu."""
    theirs = randomised(FINE_TUNED[kind](config_of(kind)))
    theirs.save_pretrained(tmp_path)
    model = system.from_backbone(tmp_path)
    ids, mask = batch_of(random_rows(6), kind)
    with torch.no_grad():
        expected = theirs(ids, mask).logits
        torch.testing.assert_close(model(ids, mask).logits, expected, rtol=0, atol=2e-5)
    fast = rx.accelerate(model, impl="reference")
    torch.testing.assert_close(fast(ids, mask).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_from_backbone_takes_a_plain_encoder(system: Any) -> None:
    backbone = randomised(BertModel(config_of("bert")))
    model = system.from_backbone(backbone, num_labels=2)
    ids, mask = batch_of(random_rows(3), "bert")
    assert model(ids, mask).logits.shape == (3, 2) and not model.training


@pytest.mark.parametrize("kind", ["albert", "bert", "roberta"])  # the others' encoders have none to begin with
def test_heads_start_from_the_checkpoints_pooler_or_from_one_each(kind: str, tmp_path: Path) -> None:
    """Where the file holds none, transformers draws one at random; no two heads may share that."""
    theirs = randomised(AutoModel.from_config(config_of(kind)))
    pooler = getattr(theirs.pooler, "dense", theirs.pooler).weight.clone()
    theirs.save_pretrained(tmp_path / "with")
    theirs.pooler = None
    theirs.save_pretrained(tmp_path / "without")
    for folder, all_alike in (("with", True), ("without", False)):
        model = rx.DeeBert.from_backbone(tmp_path / folder)
        heads = [head.pooler.weight for head in (*model.highways, model.final)]
        assert all(torch.equal(head, pooler) == all_alike for head in heads)
        assert all(torch.equal(one, other) == all_alike for one, other in combinations(heads, 2))


def test_a_classifier_that_the_file_does_not_hold_is_fresh(tmp_path: Path) -> None:
    theirs = randomised(BertForSequenceClassification(config_of("bert")))
    weights = {name: value for name, value in theirs.state_dict().items() if not name.startswith("classifier.")}
    theirs.save_pretrained(tmp_path, state_dict=weights)
    model = rx.DeeBert.from_backbone(tmp_path, num_labels=5)  # the config says 3
    assert model.final.classifier.out_features == 5
    assert torch.equal(model.highways[0].pooler.weight, theirs.bert.pooler.dense.weight)


@pytest.mark.parametrize("theirs", [BertForMultipleChoice, BertForTokenClassification, DistilBertForMultipleChoice])
def test_a_head_that_answers_something_else_is_not_taken(theirs: Any) -> None:
    """A score per choice, a class per token: their linears would fit, one row for all classes."""
    source = randomised(theirs(config_of("distilbert" if "Distil" in theirs.__name__ else "bert")))
    model = rx.DeeBert.from_backbone(source)
    assert model.final.classifier.weight.std() < 0.1  # fresh: initializer_range
    if theirs is DistilBertForMultipleChoice:
        assert model.final.pooler.weight.std() < 0.1
    else:
        pooler = source.bert.pooler
        assert pooler is None or torch.equal(model.final.pooler.weight, pooler.dense.weight)


def test_a_classifier_of_other_classes_than_the_config_says_is_refused() -> None:
    theirs = BertForSequenceClassification(config_of("bert", num_labels=1))
    theirs.config.num_labels = 3
    with pytest.raises(ValueError, match=r"source: expected a linear of \[3, 32\] in its head, got \[1, 32\]"):
        rx.DeeBert.from_backbone(theirs)


def test_a_class_of_the_callers_own_keeps_its_fine_tuned_head() -> None:
    class Mine(BertForSequenceClassification):
        pass

    theirs = randomised(Mine(config_of("bert")))
    assert torch.equal(rx.DeeBert.from_backbone(theirs).final.classifier.weight, theirs.classifier.weight)


def test_from_backbone_takes_no_early_exit_model(tmp_path: Path) -> None:
    model = tiny_deebert()
    with pytest.raises(TypeError, match="source: expected an encoder, got a DeeBert"):
        rx.Pabee.from_backbone(model)
    model.save_pretrained(tmp_path)  # its keys are not Hugging Face's: all of them would be drawn at random
    with pytest.raises(ValueError, match=r"source: .* lacks \d+ weights of the encoder .* ragged_exit\.load"):
        rx.Pabee.from_backbone(tmp_path)


@pytest.mark.parametrize("take", [rx.DeeBert.from_backbone, lambda source: rx.truncated(source, 2)])
def test_an_accelerated_model_is_no_encoder(take: Any) -> None:
    with pytest.raises(TypeError, match="source: expected an encoder, got AcceleratedModel, which has no parameters"):
        take(rx.accelerate(tiny_deebert(), impl="reference"))


@pytest.mark.parametrize(
    ("num_labels", "error", "message"),
    [
        (0, ValueError, "num_labels: expected at least 1, got 0"),
        (-1, ValueError, "num_labels: expected at least 1, got -1"),
        ("2", TypeError, "num_labels: expected an integer, got str"),
        (2.0, TypeError, "num_labels: expected an integer, got float"),
    ],
)
def test_a_number_of_classes_that_cannot_be(num_labels: Any, error: type, message: str) -> None:
    backbone = BertModel(config_of("bert"))
    with pytest.raises(error, match=message):
        rx.DeeBert.from_backbone(backbone, num_labels=num_labels)
    with pytest.raises(error, match=message):
        rx.truncated(backbone, 2, num_labels=num_labels)


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor])
def test_numbers_of_classes_and_layers_may_be_numpys(number: Any, tmp_path: Path) -> None:
    model = rx.DeeBert.from_backbone(BertModel(config_of("bert")), num_labels=number(2))
    rx.truncated(model, number(2)).save_pretrained(tmp_path)
    config = rx.load(tmp_path).config
    assert (config.num_labels, config.num_hidden_layers) == (2, 2)
    for layers in ("2", 2.0):
        with pytest.raises(TypeError, match="k: expected an integer, got"):
            rx.truncated(model, layers)


@pytest.mark.parametrize("take", [lambda model: rx.DeeBert.from_backbone(model, num_labels=2),
                                  lambda model: rx.truncated(model, 2, num_labels=2)])  # fmt: skip
def test_a_loaded_model_stays_the_callers_own(take: Any) -> None:
    theirs = BertModel(config_of("bert", num_labels=5)).train()
    ids, _ = batch_of(random_rows(3), "bert")
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    ours = take(theirs)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(0.5)
    assert theirs.training and theirs.pooler is not None and theirs.config.num_labels == 5
    assert theirs(ids).pooler_output.shape == (3, 32)
    after = theirs.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_loaded_model_in_bf16_gets_fp32_heads_and_becomes_fp32() -> None:
    theirs = BertModel(config_of("bert")).to(torch.bfloat16)
    ours = rx.DeeBert.from_backbone(theirs)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert theirs.dtype == torch.bfloat16 and ours(torch.tensor([[5, 6]])).logits.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [rx.De3Bert.from_backbone, rx.FastBert.from_backbone, lambda it: rx.truncated(it, 2)])
def test_torchs_default_dtype_makes_no_mixed_models(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = randomised(BertModel(config_of("bert")))
    ids = torch.tensor([[5, 6, 7]])
    plain = make(theirs)
    plain.save_pretrained(tmp_path)
    torch.set_default_dtype(dtype)
    try:
        loaded = rx.load(tmp_path)
        for model in (make(theirs), loaded):
            assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {
                torch.float32
            }
        fast, slow = rx.accelerate(loaded, impl="reference")(ids).logits, loaded(ids).logits
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(slow, plain(ids).logits)
    torch.testing.assert_close(fast, slow, rtol=0, atol=2e-5)


@pytest.mark.parametrize("system", [rx.DeeBert, rx.Berxit, rx.De3Bert, rx.ElasticBert, rx.Pabee])
def test_a_truncated_model_answers_as_the_exit_at_that_layer(system: Any) -> None:
    model = randomised(system(config_of("bert"), exit_layers=[2, 3, 4]))
    ids, mask = batch_of(random_rows(6), "bert")
    with torch.no_grad():
        points = model.exit_points(ids, mask, None)
        for layer, point in zip((2, 3), points[:2], strict=True):
            short = rx.truncated(model, layer)
            output = short(ids, mask)
            assert torch.equal(output.logits, point.output.logits)
            assert output.exit_layer.tolist() == [layer] * 6 and short.config.num_hidden_layers == layer
    with pytest.raises(ValueError, match=r"k: expected a layer of .* with a pooled MLP exit, got 1"):
        rx.truncated(model, 1)
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("kind", FINE_TUNED)
def test_a_truncated_backbone_keeps_its_first_layers_and_its_head(kind: str) -> None:
    theirs = randomised(FINE_TUNED[kind](config_of(kind)))
    short = rx.truncated(theirs, 2)
    ids, mask = batch_of(random_rows(4), kind)
    with torch.no_grad():
        hidden = theirs.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
        expected = short.final(hidden, mask, "cls")
        torch.testing.assert_close(short(ids, mask).logits, expected, rtol=0, atol=2e-5)
        assert theirs(ids, mask).logits.shape == (4, 3)  # the source is as it was
    with pytest.raises(ValueError, match="k: expected 1 to 4 layers, got 5"):
        rx.truncated(theirs, 5)
    if kind == "albert":
        with pytest.raises(ValueError, match="k: expected whole groups of 2 layers, got 3"):
            rx.truncated(theirs, 3)


@pytest.mark.parametrize("take", [rx.DeeBert.from_backbone, lambda source: rx.truncated(source, 2)])
def test_a_pruned_encoder_is_no_starting_point(take: Any) -> None:
    theirs = BertModel(config_of("bert"))
    prune.l1_unstructured(theirs.encoder.layer[0].output.dense, "weight", amount=0.5)
    with pytest.raises(ValueError, match="source: it cannot be copied; make pruned layers plain ones first"):
        take(theirs)
    prune.remove(theirs.encoder.layer[0].output.dense, "weight")
    take(theirs)


def test_a_model_with_a_pruned_encoder_is_not_truncated() -> None:
    model = rx.DeeBert(config_of("bert"))
    prune.l1_unstructured(model.backbone.encoder.layer[0].output.dense, "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"source: its encoder has no .*layer.0.output.dense.weight; make pruned"):
        rx.truncated(model, 2)
