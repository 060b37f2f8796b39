"""accelerate: the drop-in contract, its settings and errors."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate_cases import (
    FIELDS,
    assert_same_answers,
    exiting,
    fast_model,
    inputs,
    reference,
)
from system_cases import config_of
from tiny import (
    LONGEST,
    VOCAB,
    bert_config,
    impls,
    native_built,
    one_thread,  # noqa: F401
    randomise,
    roberta_config,
    spread_threshold,
    tiny_deebert,
)
from torch import nn
from torch._dynamo.utils import counters

import ragged_exit as rx
from ragged_exit.ops import dispatch


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


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_dtype_and_those_that_do_not_count(dtype: torch.dtype) -> None:
    model, batch = exiting(tiny_deebert()), inputs()
    fast, labels = rx.accelerate(model, impl="reference"), torch.arange(12) % 3
    expected = fast(**batch, labels=labels).loss
    assert torch.equal(fast(**batch, labels=labels.to(dtype)).loss, expected)
    torch.testing.assert_close(reference(model, **batch, labels=labels.to(dtype)).loss, expected)
    ignored = fast(**batch, labels=torch.tensor([0] + [-100] * 11))
    torch.testing.assert_close(ignored.loss, F.cross_entropy(ignored.logits[:1], torch.tensor([0])))


@pytest.mark.parametrize("callee", ["model", "fast"])
@pytest.mark.parametrize(
    ("labels", "classes", "error", "message"),
    [
        ([0] * 12, 3, TypeError, "labels: expected a tensor, got list"),
        (torch.zeros(12), 3, TypeError, r"labels: expected integers, the classes, got torch\.float32"),
        (torch.zeros(11).long(), 3, ValueError, r"labels: expected shape \[12\], one a row, got \[11\]"),
        (torch.zeros(12, 1).long(), 3, ValueError, r"labels: expected shape \[12\], .* got \[12, 1\]"),
        (torch.arange(12) % 4, 3, ValueError, r"labels: expected classes in \[0, 3\), got 3"),
        (torch.full((12,), -1), 3, ValueError, r"labels: expected classes in \[0, 3\), got -1"),
        (torch.zeros(12, 2), 1, ValueError, r"labels: expected shape \[12\], .* got \[12, 2\]"),
    ],
)
def test_bad_labels_are_named(callee: str, labels: Any, classes: int, error: type, message: str) -> None:
    model = tiny_deebert(bert_config(num_labels=classes), rule=rx.MaxProb(0.9) if classes > 1 else rx.Patience(1))
    call = model if callee == "model" else rx.accelerate(model, impl="reference")
    with pytest.raises(error, match=message):
        call(**inputs(), labels=labels)


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


def test_torch_compile_leaves_it_as_it_is() -> None:
    fast = rx.accelerate(exiting(tiny_deebert()))
    counters.clear()
    torch.compiler.reset()
    compiled = torch.compile(fast)  # inductor, the default
    assert torch.equal(compiled(**inputs()).logits, fast(**inputs()).logits)
    assert counters["stats"]["unique_graphs"] == 0


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


# errors ---------------------------------------------------------------------------------------------------------------


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
        ({"input_ids": IDS.numpy()}, TypeError, "input_ids: expected an integer tensor, got ndarray"),
        ({"attention_mask": np.ones((2, 3))}, TypeError, "attention_mask: expected a tensor, got ndarray"),
        ({"attention_mask": [[1, 1, 1]] * 2}, TypeError, "attention_mask: expected a tensor, got list"),
        ({"token_type_ids": IDS.numpy()}, TypeError, "token_type_ids: expected a tensor, got ndarray"),
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


@pytest.mark.parametrize("callee", ["model", "fast"])
def test_a_tokenizers_whole_output_in_place_of_the_ids(callee: str) -> None:
    call = tiny_deebert() if callee == "model" else fast_model()
    with pytest.raises(TypeError, match="input_ids: expected an integer tensor, got BatchEncoding"):
        call(transformers.BatchEncoding({"input_ids": IDS}))  # type: ignore[arg-type]


@pytest.mark.parametrize("callee", ["model", "fast"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": IDS.numpy()}, TypeError, "input_ids: expected an integer tensor, got ndarray"),
        ({"attention_mask": np.ones((2, 3))}, TypeError, "attention_mask: expected a tensor, got ndarray"),
        ({"token_type_ids": IDS.numpy()}, TypeError, "token_type_ids: expected a tensor, got ndarray"),
        ({"token_type_ids": IDS[:, :2]}, ValueError, r"token_type_ids: .*\[2, 3\], got \[2, 2\]"),
    ],
)
def test_bad_input_is_named_where_segments_are_read(
    callee: str, arguments: dict[str, Any], error: type, message: str
) -> None:
    """FastBERT on UER looks at them before they are packed."""
    model = randomise(rx.FastBert(config_of("uer")))
    call = model if callee == "model" else rx.accelerate(model, impl="reference")
    with pytest.raises(error, match=message):
        call(**({"input_ids": IDS, "token_type_ids": torch.ones_like(IDS)} | arguments))


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
        ({"rule": 0.1}, TypeError, "rule: expected an ExitRule, got float"),
        ({"threshold": "0.1"}, TypeError, "threshold: expected a number or a sequence .* got '0.1'"),
        (
            {"dtype": torch.float16},
            ValueError,
            r"dtype: .* on a GPU, float16, got torch\.float16",
        ),
        ({"dtype": "float32"}, TypeError, "dtype: expected a torch.dtype, got 'float32'"),
        ({"dtype": torch.float64}, ValueError, "dtype: expected float32, bfloat16 or"),
        ({"dtype": torch.int64}, ValueError, "dtype: expected float32, bfloat16 or"),
        ({"device": "gpu"}, ValueError, r"device: expected a torch\.device or its name, got 'gpu'"),
        ({"device": 1.5}, ValueError, r"device: expected a torch\.device or its name, got 1\.5"),
    ],
    ids=str,
)
def test_bad_settings_are_named(settings: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fast_model(**settings)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_machine_without_cuda_says_so(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device: expected one that torch finds here, got {device} and no CUDA"):
        fast_model(device=device)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("number", [1e39, -1e39])
def test_thresholds_beyond_fp32_are_as_good_as_infinite(number: float, impl: str) -> None:
    model = tiny_deebert()
    model.rule = rx.Entropy(number)
    expected = reference(model, **inputs())
    assert set(expected.exit_layer.tolist()) == {1 if number > 0 else 4}
    assert_same_answers(rx.accelerate(model, impl=impl)(**inputs()), expected)


def test_a_rule_in_a_snapshot_does_not_change_with_the_callers_list() -> None:
    thresholds = [-1.0] * 4
    fast = fast_model(threshold=thresholds)
    thresholds[0] = 10.0
    assert set(fast(**inputs()).exit_layer.tolist()) == {4}


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
