"""accelerate: the drop-in contract, its settings and errors, Hugging Face's pipeline, and the stream."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import (
    LONGEST,
    VOCAB,
    bert_config,
    impls,
    native_built,
    one_thread,  # noqa: F401
    padded,
    random_rows,
    randomise,
    roberta_config,
    spread_threshold,
    tiny_deebert,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, pipeline

import ragged_exit as rx
from ragged_exit.accelerate import WINDOW_BATCHES
from ragged_exit.ops import dispatch

CLOSE = {"rtol": 0, "atol": 2e-5}
FIELDS = ("logits", "score", "exit_layer", "exit_member", "executed_layers")


def inputs(rows: int = 12, side: str = "right", seed: int = 0, fill: int = 0) -> dict[str, Tensor]:
    ids, mask = padded(random_rows(rows, seed), side, fill)
    return {"input_ids": ids, "attention_mask": mask}


def exiting(model: rx.DeeBert, share: float = 0.5, **changes: Any) -> rx.DeeBert:
    """``model`` with an entropy threshold that lets about ``share`` of the rows of ``inputs()`` leave at an exit."""
    batch = inputs(fill=model.config.pad_token_id or 0)
    model.rule = rx.Entropy(spread_threshold(model, **batch, share=share), **changes)
    return model


def assert_same_answers(got: rx.ExitOutput, expected: rx.ExitOutput) -> None:
    assert torch.equal(got.exit_layer, expected.exit_layer)
    assert torch.equal(got.exit_member, expected.exit_member)
    assert torch.equal(got.executed_layers, expected.executed_layers)
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(got.score, expected.score, **CLOSE)


@torch.no_grad()
def reference(model: rx.DeeBert, **batch: Tensor) -> rx.ExitOutput:
    return model(**batch)


# the contract -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_it_answers_as_the_model_does(kind: str, pooling: str, side: str, impl: str) -> None:
    model = exiting(tiny_deebert(roberta_config() if kind == "roberta" else bert_config(), pooling=pooling))
    batch = inputs(side=side, fill=1 if kind == "roberta" else 0)
    if kind == "bert":
        batch["token_type_ids"] = torch.randint(0, 2, batch["input_ids"].shape)
    fast, expected = rx.accelerate(model, impl=impl), reference(model, **batch)
    assert expected.exit_layer.unique().numel() > 1
    assert_same_answers(fast(**batch), expected)
    assert_same_answers(fast(*batch.values()), expected)  # positional, in the model's order


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_a_mask_of_any_dtype(dtype: torch.dtype) -> None:
    model, batch = exiting(tiny_deebert()), inputs()
    expected = reference(model, **batch)
    batch["attention_mask"] = batch["attention_mask"].to(dtype)
    assert_same_answers(rx.accelerate(model, impl="reference")(**batch), expected)
    assert_same_answers(reference(model, **batch), expected)


def test_without_a_mask_every_token_counts() -> None:
    model = exiting(tiny_deebert())
    ids = torch.randint(0, VOCAB, (5, 9))
    assert_same_answers(rx.accelerate(model, impl="reference")(ids), reference(model, input_ids=ids))


def test_int32_ids() -> None:
    model, batch = exiting(tiny_deebert()), inputs()
    fast = rx.accelerate(model, impl="reference")
    narrow = {name: value.int() for name, value in batch.items()}
    assert_same_answers(fast(**narrow), fast(**batch))


@pytest.mark.parametrize("impl", impls())
def test_the_output_is_the_models(impl: str) -> None:
    model, batch = exiting(tiny_deebert()), inputs()
    got, expected = rx.accelerate(model, impl=impl)(**batch), reference(model, **batch)
    assert type(got) is type(expected) is rx.ExitOutput
    assert isinstance(got, transformers.modeling_outputs.SequenceClassifierOutput)
    assert list(got.keys()) == list(expected.keys()) and set(got.keys()) == set(FIELDS)
    for name in FIELDS:
        assert got[name].dtype == expected[name].dtype and got[name].shape == expected[name].shape, name
        assert got[name].device == batch["input_ids"].device and not got[name].requires_grad
    assert got.logits.dtype == got.score.dtype == torch.float32 and got.exit_layer.dtype == torch.int64


@pytest.mark.parametrize("callee", ["model", *impls()])
def test_labels_give_the_loss_of_the_answers_first_in_the_output(callee: str) -> None:
    model, batch = exiting(tiny_deebert()), inputs()
    labels = torch.arange(12) % 3
    call = model if callee == "model" else rx.accelerate(model, impl=callee)
    with torch.no_grad():
        output, plain = call(**batch, labels=labels), call(**batch)
    loss, logits = output[:2]
    assert torch.equal(logits, plain.logits) and output["loss"] is loss and output.loss is loss
    torch.testing.assert_close(loss, F.cross_entropy(plain.logits, labels))
    assert plain.loss is None


def test_float_labels_of_one_output_are_a_regression() -> None:
    model = tiny_deebert(bert_config(num_labels=1), rule=rx.Patience(1, tolerance=1.4))
    batch, labels = inputs(), torch.linspace(-1, 1, 12)
    output = rx.accelerate(model, impl="reference")(**batch, labels=labels)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], labels))
    assert_same_answers(output, reference(model, **batch))
    assert output.exit_layer.unique().numel() > 1


@pytest.mark.parametrize("impl", impls())
def test_bf16(impl: str) -> None:
    """A bf16 snapshot of an fp32 model, and of a bf16 model by default."""
    model, batch = exiting(tiny_deebert(), share=0.3), inputs()
    expected = reference(model, **batch)
    fast = rx.accelerate(model, impl=impl, dtype=torch.bfloat16)
    assert fast.dtype == torch.bfloat16 and fast.encoder.word_embeddings.dtype == torch.bfloat16
    output = fast(**batch)
    assert output.logits.dtype == output.score.dtype == torch.float32
    same = output.exit_layer == expected.exit_layer
    assert same.float().mean() > 0.6  # rows near the threshold may leave elsewhere
    torch.testing.assert_close(output.logits[same], expected.logits[same], rtol=0.05, atol=0.25)
    assert not torch.allclose(output.logits[same], expected.logits[same], rtol=0, atol=1e-4)
    again = rx.accelerate(copy.deepcopy(model).bfloat16(), impl=impl)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(**batch).logits, output.logits)


def test_one_row_and_one_token() -> None:
    model = exiting(tiny_deebert())
    ids = torch.tensor([[7]])
    assert_same_answers(rx.accelerate(model, impl="reference")(ids), reference(model, input_ids=ids))


# settings -----------------------------------------------------------------------------------------------------------
def test_threshold_sets_that_field_of_the_models_own_rule() -> None:
    model = tiny_deebert(rule=rx.Entropy(0.5, dialect="hf", compare="<="))
    batch = inputs()
    fast = rx.accelerate(model, threshold=0.25, impl="reference")
    assert fast.rule == rx.Entropy(0.25, dialect="hf", compare="<=")
    assert model.rule == rx.Entropy(0.5, dialect="hf", compare="<=")
    tau = spread_threshold(model, **batch)
    model.rule = replace(model.rule, threshold=tau)
    expected = reference(model, **batch)
    model.rule = rx.Entropy(-1.0, dialect="hf")
    assert_same_answers(rx.accelerate(model, threshold=tau, impl="reference")(**batch), expected)
    assert rx.accelerate(model, threshold=0, impl="reference")(**batch).exit_layer.tolist() == [4] * 12


@pytest.mark.parametrize("impl", impls())
def test_one_threshold_an_exit(impl: str) -> None:
    model, batch = tiny_deebert(), inputs()
    assert rx.accelerate(model, threshold=[0.0, 0.0, 9.0, 9.0], impl=impl)(**batch).exit_layer.tolist() == [3] * 12
    tau = spread_threshold(model, **batch)
    for thresholds in ([0.0, tau, 0.0, 0.0], (tau, 0.0, tau, 0.0)):
        fast = rx.accelerate(model, threshold=thresholds, impl=impl)
        twin = copy.deepcopy(model)
        twin.rule = rx.Entropy(list(thresholds))
        expected = reference(twin, **batch)
        assert_same_answers(fast(**batch), expected)
        assert set(expected.exit_layer.tolist()) <= {2, 4} if thresholds[0] == 0 else {1, 3, 4}


def test_patience_and_tolerance_set_those_fields() -> None:
    model = tiny_deebert(bert_config(num_labels=1), rule=rx.Patience(1, tolerance=1.0))
    batch = inputs()
    fast = rx.accelerate(model, patience=2, tolerance=2.5, impl="reference")
    assert fast.rule == rx.Patience(2, tolerance=2.5) and model.rule == rx.Patience(1, tolerance=1.0)
    assert rx.accelerate(model, tolerance=2.5).rule == rx.Patience(1, tolerance=2.5)
    twin = copy.deepcopy(model)
    twin.rule = rx.Patience(2, tolerance=2.5)
    expected = reference(twin, **batch)
    assert_same_answers(fast(**batch), expected)
    assert not torch.equal(expected.exit_layer, reference(model, **batch).exit_layer)


@pytest.mark.parametrize("rule", [rx.MaxProb(0.8), rx.Patience(1), rx.Energy(0.1), rx.Entropy(0.5, dialect="hf")])
def test_rule_replaces_the_models_rule(rule: rx.ExitRule) -> None:
    model, batch = tiny_deebert(rule=rx.Entropy(0.1)), inputs()
    fast = rx.accelerate(model, rule=rule, impl="reference")
    assert fast.rule is rule and model.rule == rx.Entropy(0.1)
    twin = copy.deepcopy(model)
    twin.rule = rule
    assert_same_answers(fast(**batch), reference(twin, **batch))


def test_impl() -> None:
    model = tiny_deebert()
    assert rx.accelerate(model, impl="reference").impl == "reference"
    best = "native" if native_built() else "reference"
    assert rx.accelerate(model, impl="auto").impl == best
    with pytest.raises(ValueError, match=r"impl: expected one of .*'fastest'"):
        rx.accelerate(model, impl="fastest")


def test_an_explicit_impl_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "native_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = tiny_deebert()
    with pytest.raises(RuntimeError, match="not built"):
        rx.accelerate(model, impl="native")
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        rx.accelerate(model, impl="triton")
    assert rx.accelerate(model, impl="auto").impl == "reference"


# errors (DESIGN, bad input) -----------------------------------------------------------------------------------------
def fast_model(**settings: Any) -> rx.AcceleratedModel:
    return rx.accelerate(tiny_deebert(), impl="reference", **settings)


IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": IDS[:0]}, ValueError, r"input_ids: expected shape \[batch >= 1, length >= 1\], got \[0, 3\]"),
        ({"input_ids": IDS[:, :0]}, ValueError, r"input_ids: .* got \[2, 0\]"),
        ({"input_ids": IDS[0]}, ValueError, r"input_ids: .* got \[3\]"),
        ({"input_ids": IDS.float()}, TypeError, r"input_ids: expected an integer tensor, got torch\.float32"),
        ({"input_ids": IDS > 6}, TypeError, r"input_ids: expected an integer tensor, got torch\.bool"),
        ({"input_ids": IDS.tolist()}, TypeError, "input_ids: expected an integer tensor, got list"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, ValueError, "attention_mask: row 1 has no tokens"),
        ({"attention_mask": torch.tensor([[1, 1, 2], [1, 1, 1]])}, ValueError, "attention_mask: expected only 0 and 1"),
        ({"attention_mask": torch.full((2, 3), 0.5)}, ValueError, "attention_mask: expected only 0 and 1"),
        ({"attention_mask": torch.full((2, 3), float("nan"))}, ValueError, "attention_mask: expected only 0 and 1"),
        ({"attention_mask": torch.ones(2, 4)}, ValueError, r"attention_mask: .*\[2, 3\], got \[2, 4\]"),
        ({"token_type_ids": torch.ones(3, 3).long()}, ValueError, r"token_type_ids: .*\[2, 3\], got \[3, 3\]"),
        ({"token_type_ids": torch.full((2, 3), 2)}, ValueError, r"token_type_ids: expected values in \[0, 2\)"),
        ({"input_ids": IDS + VOCAB}, ValueError, rf"input_ids: expected values in \[0, {VOCAB}\)"),
        ({"input_ids": -IDS}, ValueError, rf"input_ids: expected values in \[0, {VOCAB}\)"),
        (
            {"input_ids": torch.full((1, LONGEST + 1), 5)},
            ValueError,
            f"sequence length: expected at most {LONGEST} positions .* got {LONGEST + 1}",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type, message: str) -> None:
    fast = fast_model()
    with pytest.raises(error, match=message):
        fast(**({"input_ids": IDS} | arguments))
    assert fast(IDS).logits.shape == (2, 3)  # and does no harm


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"threshold": float("nan")}, ValueError, "threshold: expected numbers, got NaN"),
        ({"threshold": [0.1, 0.2, float("nan"), 0.3]}, ValueError, "threshold: expected numbers, got NaN"),
        ({"threshold": [0.1, 0.2, 0.3]}, ValueError, r"threshold: expected one number or 4 .* got 3"),
        ({"threshold": []}, ValueError, "threshold: .* empty"),
        ({"rule": rx.Entropy([0.1] * 5)}, ValueError, r"threshold: expected one number or 4 .* got 5"),
        ({"patience": 3}, ValueError, "patience: the rule Entropy has no such field; it has .*threshold"),
        ({"tolerance": 0.1}, ValueError, "tolerance: the rule Entropy has no such field"),
        ({"rule": rx.MaxProb(0.9), "threshold": 0.1}, ValueError, "rule: give either a rule or .*threshold"),
        ({"dtype": torch.float16}, ValueError, r"dtype: expected float32 or bfloat16 on a CPU, got torch\.float16"),
        ({"dtype": torch.float64}, ValueError, "dtype: expected float32 or bfloat16"),
        ({"dtype": torch.int64}, ValueError, "dtype: expected float32 or bfloat16"),
    ],
    ids=str,
)
def test_bad_settings_are_named(settings: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fast_model(**settings)


def test_patience_has_no_threshold_to_set() -> None:
    with pytest.raises(ValueError, match=r"threshold: the rule Patience has no such field; it has .*patience"):
        rx.accelerate(tiny_deebert(rule=rx.Patience(2)), threshold=0.1)


def test_a_rule_that_asks_for_what_the_heads_have_not() -> None:
    with pytest.raises(ValueError, match=r"LearnedUncertainty needs .*uncertainty"):
        fast_model(rule=rx.LearnedUncertainty(0.1))(IDS)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, "a-directory"], ids=["module", "None", "str"])
def test_only_early_exit_models(model: Any) -> None:
    with pytest.raises(TypeError, match=f"model: expected an early-exit model .* got {type(model).__name__}"):
        rx.accelerate(model)


def test_an_accelerated_model_cannot_be_accelerated_again() -> None:
    with pytest.raises(TypeError, match="got AcceleratedModel"):
        rx.accelerate(fast_model())  # type: ignore[arg-type]


# the snapshot -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("impl", impls())
def test_the_snapshot_is_independent_until_refreshed(impl: str) -> None:
    model, batch = exiting(tiny_deebert()), inputs()
    fast = rx.accelerate(model, impl=impl)
    before = fast(**batch)
    randomise(model, seed=9)  # in place, as an optimiser would
    assert_same_answers(fast(**batch), before)
    expected = reference(model, **batch)
    assert not torch.allclose(before.logits, expected.logits, atol=1e-2)
    fast.refresh()
    assert_same_answers(fast(**batch), expected)


def test_refresh_keeps_the_rule_that_was_asked_for() -> None:
    model, batch = exiting(tiny_deebert()), inputs()
    fast = rx.accelerate(model, threshold=-1.0, impl="reference")
    model.rule = rx.Entropy(10.0)  # everybody out at once
    fast.refresh()
    assert fast(**batch).exit_layer.tolist() == [4] * 12


def test_refresh_sees_options_that_changed() -> None:
    model, batch = exiting(tiny_deebert(exit_at_last_highway=True)), inputs()
    fast = rx.accelerate(model, impl="reference")
    model.exit_at_last_highway, model.pooling = False, "mean"
    expected = reference(model, **batch)
    fast.refresh()
    assert_same_answers(fast(**batch), expected)


def test_the_models_mode_is_its_own_business() -> None:
    model, batch = exiting(tiny_deebert(bert_config(hidden_dropout_prob=0.5))), inputs()
    expected = reference(model, **batch)
    model.train()
    fast = rx.accelerate(model, impl="reference")
    assert model.training and not fast.training
    assert_same_answers(fast(**batch), expected)


def test_nothing_is_patched_and_nothing_is_owned() -> None:
    model, batch = exiting(tiny_deebert()), inputs()
    watched = [nn.Module, nn.Linear, nn.LayerNorm, F, torch.Tensor, rx.DeeBert]
    watched += [type(module) for module in model.modules()]
    before = [(place, dict(vars(place))) for place in watched]
    own = {id(module): dict(vars(module)) for module in model.modules()}
    settings = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    expected = reference(model, **batch)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fast = rx.accelerate(model, threshold=0.3, impl="auto")
    fast(**batch)
    list(fast.stream([[5, 6]]))
    for place, attributes in before:
        now = dict(vars(place))
        assert now.keys() == attributes.keys(), place
        assert all(now[name] is value for name, value in attributes.items() if callable(value)), place
    assert all(dict(vars(module)) == own[id(module)] for module in model.modules())
    assert settings == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    assert torch.equal(reference(model, **batch).logits, expected.logits)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(fast.parameters()) == [] and list(fast.children()) == [] and fast.state_dict() == {}


def test_two_snapshots_of_one_model_do_not_meet() -> None:
    model, batch = tiny_deebert(), inputs()
    low, high = fast = [rx.accelerate(model, threshold=value, impl="reference") for value in (-1.0, 10.0)]
    for _ in range(2):
        assert [set(one(**batch).exit_layer.tolist()) for one in fast] == [{4}, {1}]
    low.refresh()
    assert set(high(**batch).exit_layer.tolist()) == {1}


# transformers.pipeline ----------------------------------------------------------------------------------------------
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
PIECES = "the a film was good bad very not ##ly ##s great awful boring fun"
WORDS = [*SPECIAL, *PIECES.split()]
TEXTS = ["the film was good", "awful", "a very very boring film", "not bad", "great great fun", "films badly awful"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over two dozen words, built here."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="module")
def reviewer(tokenizer: PreTrainedTokenizerFast) -> rx.DeeBert:
    """A model over the tokenizer's vocabulary, with names for its classes."""
    config = bert_config(vocab_size=len(WORDS), max_position_embeddings=32)
    config.id2label = {0: "bad", 1: "so-so", 2: "good"}
    model = tiny_deebert(config, seed=4, pooling="mean")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    model.rule = rx.Entropy(spread_threshold(model, batch["input_ids"], batch["attention_mask"], 0.4))
    return model


def expected_scores(model: rx.DeeBert, tokenizer: PreTrainedTokenizerFast, *text: str) -> dict[str, float]:
    probs = reference(model, **tokenizer(*text, return_tensors="pt")).logits.softmax(1)[0]
    return {model.config.id2label[index]: float(prob) for index, prob in enumerate(probs)}


def test_a_tokenizers_output_goes_in_as_it_is(reviewer: rx.DeeBert, tokenizer: PreTrainedTokenizerFast) -> None:
    fast = rx.accelerate(reviewer, impl="reference")
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        assert batch["attention_mask"][1, -1] == (0 if side == "right" else 1)
        expected = reference(reviewer, **batch)
        assert expected.exit_layer.unique().numel() > 1
        assert_same_answers(fast(**batch), expected)
    tokenizer.padding_side = "right"
    assert set(tokenizer("a film").keys()) == {"input_ids", "token_type_ids", "attention_mask"}


@pytest.mark.parametrize("impl", impls())
def test_pipeline(impl: str, reviewer: rx.DeeBert, tokenizer: PreTrainedTokenizerFast) -> None:
    fast = rx.accelerate(reviewer, impl=impl)
    classify = pipeline("text-classification", model=fast, tokenizer=tokenizer)
    answers = [expected_scores(reviewer, tokenizer, text) for text in TEXTS]
    best = [max(answer, key=answer.get) for answer in answers]  # type: ignore[arg-type]
    assert len(set(best)) > 1

    def check(result: dict[str, Any], place: int) -> None:
        assert result["label"] == best[place]
        assert result["score"] == pytest.approx(answers[place][best[place]], abs=1e-5)

    (single,) = classify(TEXTS[0])
    check(single, 0)
    for batch_size in (1, 4, 6):
        results = classify(TEXTS, batch_size=batch_size)
        assert len(results) == len(TEXTS)
        for place, result in enumerate(results):
            check(result, place)
    for result, answer in zip(classify(TEXTS, top_k=None, batch_size=3), answers, strict=True):
        assert {entry["label"]: pytest.approx(entry["score"], abs=1e-5) for entry in result} == answer
        assert [entry["score"] for entry in result] == sorted((entry["score"] for entry in result), reverse=True)
    (pair,) = classify([{"text": TEXTS[0], "text_pair": TEXTS[1]}], top_k=None)
    assert {entry["label"]: pytest.approx(entry["score"], abs=1e-5) for entry in pair} == expected_scores(
        reviewer, tokenizer, TEXTS[0], TEXTS[1]
    )
    streamed = classify((text for text in TEXTS), batch_size=2)
    for place, result in enumerate(streamed):
        check(result, place)


def test_a_pipeline_can_be_shown(reviewer: rx.DeeBert, tokenizer: PreTrainedTokenizerFast) -> None:
    classify = pipeline("text-classification", model=rx.accelerate(reviewer, impl="reference"), tokenizer=tokenizer)
    assert "AcceleratedModel" in repr(classify) or "Pipeline" in repr(classify)


# stream -------------------------------------------------------------------------------------------------------------
def assert_results(results: list[rx.RowResult], expected: rx.ExitOutput, first: int = 0) -> None:
    for place, result in enumerate(results):
        assert result.index == first + place and result.error is None
        torch.testing.assert_close(result.logits, expected.logits[place], **CLOSE)
        assert result.score == pytest.approx(float(expected.score[place]), abs=2e-5)
        for name in ("exit_layer", "exit_member", "executed_layers"):
            assert getattr(result, name) == int(expected[name][place])
            assert type(getattr(result, name)) is int


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("budget", [1, 30, 100, 8192])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_stream_answers_in_order_what_the_batch_forward_answers(kind: str, budget: int, impl: str) -> None:
    config = roberta_config() if kind == "roberta" else bert_config()
    model = exiting(tiny_deebert(config, pooling="mean"))
    rows = random_rows(60, seed=4)
    fast = rx.accelerate(model, impl=impl)
    expected = fast(*padded(rows, fill=config.pad_token_id))
    assert expected.exit_layer.unique().numel() > 2
    results = list(fast.stream(rows, token_budget=budget))
    assert len(results) == 60
    assert_results(results, expected)


def test_stream_takes_mappings_with_and_without_token_types(tokenizer: PreTrainedTokenizerFast) -> None:
    model = exiting(tiny_deebert())
    rows = random_rows(20, seed=6)
    types = [[place % 2 for place in range(len(row))] if index % 3 else None for index, row in enumerate(rows)]
    items: list[Any] = []
    for index, (row, kinds) in enumerate(zip(rows, types, strict=True)):
        if kinds is None:
            items.append(row if index % 2 else {"input_ids": row})
        else:
            items.append({"input_ids": row, "token_type_ids": kinds, "attention_mask": [1] * len(row)})
    ids, mask = padded(rows)
    padded_types = torch.zeros_like(ids)
    for index, kinds in enumerate(types):
        if kinds is not None:
            padded_types[index, : len(kinds)] = torch.tensor(kinds)
    fast = rx.accelerate(model, impl="reference")
    expected = fast(ids, mask, padded_types)
    assert not torch.allclose(expected.logits, fast(ids, mask).logits, atol=1e-3)
    assert_results(list(fast.stream(items, token_budget=50)), expected)
    arrays = [np.array(row) if index % 2 else torch.tensor(row) for index, row in enumerate(rows)]
    assert_results(list(fast.stream(arrays)), fast(ids, mask))  # type: ignore[arg-type]


def test_stream_takes_what_a_tokenizer_returns(reviewer: rx.DeeBert, tokenizer: PreTrainedTokenizerFast) -> None:
    fast = rx.accelerate(reviewer, impl="reference")
    results = list(fast.stream(tokenizer(text) for text in TEXTS))
    assert_results(results, fast(**tokenizer(TEXTS, padding=True, return_tensors="pt")))


def watch_runs(fast: rx.AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths in every batch that the executor gets from now on."""
    runs: list[list[int]] = []
    run = fast.executor.run

    def watched(batch: rx.RaggedBatch, *rest: Any) -> Any:
        runs.append(batch.seqlens.tolist())
        return run(batch, *rest)

    monkeypatch.setattr(fast.executor, "run", watched)
    return runs


def test_stream_keeps_the_budget_and_sorts_by_length_inside_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fast_model()
    runs = watch_runs(fast, monkeypatch)
    rows = random_rows(300, seed=1)
    budget = 60
    list(fast.stream(rows, token_budget=budget))
    assert all(sum(lengths) <= budget for lengths in runs)
    tokens = sum(map(len, rows))
    assert len(runs) <= 1.5 * tokens / budget + 2  # batches are full, up to a row and the windows' ends
    falls = [max(after) > min(before) for before, after in itertools.pairwise(runs)]
    windows = tokens / (WINDOW_BATCHES * budget)
    assert 2 <= sum(falls) <= windows + 1  # lengths only fall, and start again where a window starts
    assert any(lengths != sorted(lengths) for lengths in (list(map(len, rows)),))


def test_a_sequence_longer_than_the_budget_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fast_model()
    runs = watch_runs(fast, monkeypatch)
    rows = [[5] * 3, [6] * 20, [7] * 4]
    results = list(fast.stream(rows, token_budget=8))
    assert runs == [[20], [4, 3]]
    assert_results(results, fast(*padded(rows)))


def counted(rows: Iterator[Any], seen: list[int]) -> Iterator[Any]:
    for number, row in enumerate(rows):
        seen.append(number)
        yield row


def test_stream_reads_lazily_and_no_further_than_a_window() -> None:
    fast = fast_model()
    seen: list[int] = []
    budget, length = 40, 10
    endless = counted(([5 + number % 50] * length for number in itertools.count()), seen)
    results = fast.stream(endless, token_budget=budget)
    assert not seen  # nothing before the first answer is asked for
    window = WINDOW_BATCHES * budget // length
    for number in range(3 * window):
        assert next(results).index == number
        assert len(seen) <= (number // window + 1) * window


def test_between_answers_the_caller_is_not_in_inference_mode() -> None:
    results = fast_model().stream([[5, 6], [7]])
    assert not next(results).logits.requires_grad
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_bad_rows_do_not_pile_up() -> None:
    """A long run of bad rows: each is reported without reading far ahead."""
    fast = fast_model()
    seen: list[int] = []
    results = fast.stream(counted(itertools.repeat([], 5000), seen), token_budget=16)
    for number in range(300):
        result = next(results)
        assert result.index == number and "at least one token" in result.error
        assert len(seen) <= number + WINDOW_BATCHES * 16


BAD = {
    "empty": ([], "ValueError: input_ids: expected at least one token"),
    "too long": ([5] * (LONGEST + 1), f"ValueError: input_ids: expected at most {LONGEST} tokens"),
    "vocabulary": ([5, VOCAB], f"ValueError: input_ids: expected values in [0, {VOCAB})"),
    "negative": ([5, -1], "ValueError: input_ids: expected values"),
    "huge": ([2**70], "ValueError: input_ids: expected values"),
    "floats": ([5.0, 6.0], "TypeError: input_ids: expected integers, got float"),
    "nan": ([float("nan")], "TypeError: input_ids: expected integers"),
    "strings": (["good", "film"], "TypeError: input_ids: expected integers, got str"),
    "text": ("good film", "TypeError: input_ids"),
    "none": (None, "TypeError"),
    "number": (5, "TypeError"),
    "nested": ([[5, 6]], "TypeError: input_ids: expected integers, got list"),
    "no ids": ({"ids": [5]}, "KeyError: 'input_ids'"),
    "types": ({"input_ids": [5, 6], "token_type_ids": [0, 2]}, "ValueError: token_type_ids: expected values in [0, 2)"),
    "type count": ({"input_ids": [5, 6], "token_type_ids": [0]}, "ValueError: token_type_ids: expected 2 values"),
    "type floats": ({"input_ids": [5], "token_type_ids": [0.5]}, "TypeError: token_type_ids: expected integers"),
    "padding": ({"input_ids": [5, 0], "attention_mask": [1, 0]}, "ValueError: attention_mask: expected only 1"),
}


@pytest.mark.parametrize("place", [0, 7, 24])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_reported_and_the_others_are_answered(kind: str, place: int) -> None:
    fast = fast_model(threshold=0.5)
    bad, message = BAD[kind]
    rows: list[Any] = random_rows(24, seed=8, longest=12)
    expected = fast(*padded(rows))
    rows.insert(place, bad)
    results = list(fast.stream(rows, token_budget=20))
    reported = results.pop(place)
    assert reported.index == place and reported.error.startswith(message)
    assert all(getattr(reported, item.name) is None for item in fields(reported) if item.name not in ("index", "error"))
    assert_results(results[:place], expected)
    assert [result.index for result in results[place:]] == list(range(place + 1, 25))
    for row, result in enumerate(results):
        assert result.error is None
        torch.testing.assert_close(result.logits, expected.logits[row], **CLOSE)


def test_all_rows_bad_and_no_rows() -> None:
    fast = fast_model()
    results = list(fast.stream([[], "", None]))
    assert [result.index for result in results] == [0, 1, 2] and all(result.error for result in results)
    assert list(fast.stream([])) == []


def test_a_bad_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="token_budget: expected at least 1, got 0"):
        list(fast_model().stream([[5]], token_budget=0))
