"""`ragged-exit bench` on one's own data and model: a plain encoder in, a report out; bad input gives one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from ragged_exit.cli import app

WORDS = ["good", "great", "fine", "nice", "bad", "awful", "dull", "poor", "film", "plot", "the", "a", "was"]


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A tiny BERT and its tokenizer, saved as Hugging Face saves them."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    folder = tmp_path / "encoder"
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """200 labelled lines: the label says from which four words the adjectives come."""
    generator = torch.Generator().manual_seed(1)
    lines = ["text,label"]
    for _ in range(200):
        label, length = (int(torch.randint(0, high, (1,), generator=generator)) for high in (2, 6))
        words = [
            WORDS[4 * (1 - label) + int(torch.randint(0, 4, (1,), generator=generator))] for _ in range(length + 1)
        ]
        lines.append(f"the film was {' '.join(words)},{label}")
    path = tmp_path / "reviews.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    return result.exit_code, result.output


def test_bench_on_own_model_and_data(encoder, reviews, tmp_path, monkeypatch):
    monkeypatch.setenv("RAGGED_EXIT_CACHE", str(tmp_path / "cache"))
    report, picture = tmp_path / "r.json", tmp_path / "r.png"
    options = (
        "--model",
        encoder,
        "--data",
        reviews,
        "--repeats",
        1,
        "--threshold",
        0.5,
        "--json",
        report,
        "--plot",
        picture,
    )
    code, output = run(*options)
    assert code == 0, output
    assert "fitting heads" in output and "gain over padded" in output
    found = json.loads(report.read_text())
    assert all(contender["decisions_match"] for contender in found["contenders"])
    accuracy = {contender["name"]: contender["accuracy"] for contender in found["contenders"]}
    assert accuracy["ragged"] == accuracy["padded_exit"] and accuracy["ragged_full"] == accuracy["padded_sorted"]
    assert picture.stat().st_size > 10_000
    code, output = run(*options)  # the heads are cached now
    assert code == 0 and "heads from" in output and "fitting heads" not in output


@pytest.mark.parametrize(
    ("text", "message"), [("", "empty"), ("text,label\nfine,\n", "label"), ("words,label\nfine,1\n", "text")]
)
def test_bad_data_is_one_clear_line(encoder, tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    code, output = run("--model", encoder, "--data", path)
    assert code == 2 and "error" in output and message in output and "Traceback" not in output
