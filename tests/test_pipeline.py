"""The drop-in under Hugging Face's tokenizers and pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_cases import (
    CLOSE,
    assert_results,
    assert_same_answers,
    reference,
)
from tiny import (
    bert_config,
    impls,
    one_thread,  # noqa: F401
    spread_threshold,
    tiny_deebert,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

import ragged_exit as rx

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
    assert "AcceleratedModel" in repr(classify.model) and "TextClassificationPipeline" in repr(classify)


@pytest.mark.parametrize("callee", ["model", "fast"])
def test_a_trainer_hands_the_logits_to_compute_metrics_as_the_readme_says(
    callee: str, reviewer: rx.DeeBert, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [dict(tokenizer(text)) | {"labels": place % 3} for place, text in enumerate(TEXTS)]
    trainer = Trainer(
        model=reviewer if callee == "model" else rx.accelerate(reviewer, impl="reference"),
        args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda outcome: {"rows": len(outcome.predictions.argmax(1))},
    )
    ignored = ["exit_layer", "exit_member", "executed_layers", "score"]
    assert trainer.evaluate(rows, ignore_keys=ignored)["eval_rows"] == len(TEXTS)
    expected = reference(reviewer, **tokenizer(TEXTS, padding=True, return_tensors="pt"))
    predicted = torch.from_numpy(trainer.predict(rows, ignore_keys=ignored).predictions)
    torch.testing.assert_close(predicted, expected.logits, **CLOSE)


def test_stream_takes_what_a_tokenizer_returns(reviewer: rx.DeeBert, tokenizer: PreTrainedTokenizerFast) -> None:
    fast = rx.accelerate(reviewer, impl="reference")
    results = list(fast.stream(tokenizer(text) for text in TEXTS))
    assert_results(results, fast(**tokenizer(TEXTS, padding=True, return_tensors="pt")))
