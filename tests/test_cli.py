"""`ragged-exit bench` on one's own data and model: a plain encoder in, a report out; bad input gives one clear line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from cli_cases import save_encoder, save_reviews
from safetensors.torch import load_file, save_file
from tiny import randomise
from transformers import AutoTokenizer, BertConfig, BertModel
from typer.testing import CliRunner

import ragged_exit as rx
from ragged_exit import embedded
from ragged_exit.bench import default
from ragged_exit.bench.compare import compare
from ragged_exit.cli import app
from ragged_exit.models.loading import is_early_exit


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return save_encoder(tmp_path / "encoder")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    return save_reviews(tmp_path / "reviews.csv")


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
    reviews.write_text(reviews.read_text().replace(",1\n", ",2\n").replace(",0\n", ",1\n").replace(",2\n", ",0\n"))
    code, output = run(*options)  # the same texts with other labels are other heads
    assert code == 0 and "fitting heads" in output


def test_bench_on_pairs_keeps_token_types(encoder, reviews, tmp_path, monkeypatch):
    monkeypatch.setenv("RAGGED_EXIT_CACHE", str(tmp_path / "cache"))
    pairs = tmp_path / "pairs.csv"
    header, *lines = reviews.read_text().splitlines()
    pairs.write_text("\n".join([f"text2,{header}", *(f"the plot,{line}" for line in lines)]))
    read = []

    def spy_on(name, types_of):
        real = getattr(default, name)

        def spy(*arguments, **options):
            read.extend(types_of(*arguments))
            return real(*arguments, **options)

        monkeypatch.setattr(default, name, spy)

    spy_on("fit", lambda model, *parts: [part.token_type_ids for part in parts])
    spy_on("exit_table", lambda model, sequences, types=None: [types])
    report = tmp_path / "r.json"
    code, output = run("--model", encoder, "--data", pairs, "--repeats", 1, "--json", report)
    assert code == 0, output
    assert len(read) == 3 and all(types[-3:] == [1, 1, 1] and types[0] == 0 for part in read for types in part)
    assert all(contender["decisions_match"] for contender in json.loads(report.read_text())["contenders"])


def own_checkpoint(folder: Path, rule: rx.ExitRule) -> Path:
    """A DeeBERT with random heads and its tokenizer."""
    encoder = save_encoder(folder.with_name("encoder"))
    randomise(rx.DeeBert.from_backbone(encoder, num_labels=2, rule=rule)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rule", [rx.MaxProb(0.9), rx.Entropy(0.1, dialect="normalised", compare="<=")], ids=str)
def test_bench_runs_a_checkpoint_under_its_own_rule(rule, reviews, tmp_path, monkeypatch):
    used = []

    def spy(title, model, rule, *arguments, **options):
        used.append(rule)
        return compare(title, model, rule, *arguments, **options)

    monkeypatch.setattr(default, "compare", spy)
    report = tmp_path / "r.json"
    model = own_checkpoint(tmp_path / "model", rule)
    code, output = run("--model", model, "--data", reviews, "--repeats", 1, "--json", report)
    assert code == 0, output
    assert "fitting heads" not in output and used == [rule.with_threshold(used[0].threshold)]
    assert all(contender["decisions_match"] for contender in json.loads(report.read_text())["contenders"])


def test_bench_reads_labels_by_a_checkpoints_names(reviews, tmp_path):
    folder = own_checkpoint(tmp_path / "model", rx.Entropy(0.1))
    header, *lines = reviews.read_text().splitlines()
    named = tmp_path / "named.csv"
    named.write_text("\n".join([header, *(line[:-1] + ("good", "bad")[int(line[-1])] for line in lines)]))
    with pytest.raises(ValueError, match="unknown class 'bad'"):
        default.prepare(str(folder), named, say=print)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "good", "1": "bad"}}))
    labels = [default.prepare(str(folder), data, say=print).test.labels for data in (reviews, named)]
    assert labels[0].unique().tolist() == [0, 1] and torch.equal(*labels)


@pytest.mark.parametrize("fitted", [True, False])
def test_bench_cuts_texts_at_what_the_encoder_takes(fitted, reviews, tmp_path, monkeypatch):
    monkeypatch.setenv("RAGGED_EXIT_CACHE", str(tmp_path / "cache"))
    model = own_checkpoint(tmp_path / "model", rx.Entropy(0.1)) if fitted else save_encoder(tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 1_000_000}))
    with reviews.open("a") as file:
        file.writelines(f"{'good ' * 600}{number},1\n" for number in range(40))
    assert max(default.prepare(str(model), reviews, say=print).test.lengths) == 512


def test_bench_takes_the_heads_of_a_published_checkpoint(tmp_path):
    bert = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=30)
    BertModel(bert).save_pretrained(tmp_path)
    assert not is_early_exit(tmp_path) and not is_early_exit("an/id")
    state = load_file(tmp_path / "model.safetensors")
    state["bert.encoder.highway.0.pooler.dense.weight"] = torch.zeros(32, 32)
    save_file(state, tmp_path / "model.safetensors")
    assert is_early_exit(tmp_path)


def test_bench_refuses_a_rule_that_counts(reviews, tmp_path):
    code, output = run("--model", own_checkpoint(tmp_path / "model", rx.Patience(1)), "--data", reviews)
    assert code == 2 and "model: expected a rule that counts nothing" in output


@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_bench_refuses_too_few_rows(rows, fitted, tmp_path, monkeypatch):
    monkeypatch.setenv("RAGGED_EXIT_CACHE", str(tmp_path / "cache"))
    model = own_checkpoint(tmp_path / "model", rx.Entropy(0.1)) if fitted else save_encoder(tmp_path / "model")
    code, output = run("--model", model, "--data", save_reviews(tmp_path / "reviews.csv", rows))
    told = f"data: {rows} rows are too few for training, validation and test parts"
    assert code == 2 and told in " ".join(output.split())


def test_bench_refuses_classes_that_a_checkpoint_does_not_have(reviews, tmp_path):
    reviews.write_text(reviews.read_text().replace(",1\n", ",7\n"))
    code, output = run("--model", own_checkpoint(tmp_path / "model", rx.Entropy(0.1)), "--data", reviews)
    assert code == 2 and "labels: expected classes 0 to 1, got 0 to 7" in output


def test_bench_without_its_package_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGGED_EXIT_CACHE", str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no route to host")
    monkeypatch.setattr(embedded.subprocess, "run", lambda *arguments, **options: failed)
    code, output = run()
    assert code == 2 and "error could not fetch vaderSentiment" in output and "no route to host" in output


@pytest.mark.parametrize(
    ("text", "message"), [("", "empty"), ("text,label\nfine,\n", "label"), ("words,label\nfine,1\n", "text")]
)
def test_bad_data_is_one_clear_line(encoder, tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    code, output = run("--model", encoder, "--data", path)
    assert code == 2 and "error" in output and message in output and "Traceback" not in output
