"""`ragged-exit calibrate` and `inspect`: the checkpoint's rule changes as promised, and is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import save_encoder, save_reviews
from score_cases import save_checkpoint, texts
from tiny import one_thread, randomise  # noqa: F401  (autouse)
from typer.testing import CliRunner

import ragged_exit as rx
from ragged_exit.calibration.exit_table import exit_table
from ragged_exit.cli import app


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(400)))
    return path


def test_calibrate_for_a_guarantee(checkpoint, data):
    code, output = run("calibrate", checkpoint, data, "--max-loss", 0.1)
    assert code == 0, output
    assert "with 95 % confidence at most 10 % of answers changed" in output
    rule = rx.load(checkpoint).rule
    assert isinstance(rule, rx.Entropy) and 0 < rule.threshold != 0.5
    _, told = run("inspect", checkpoint, data)
    mean = float(output.split(" of 3 layers run")[0].split()[-1])
    assert f"mean {mean:.2f} layers run" in told  # what was promised is what the saved rule does


def test_calibrate_for_a_speedup(checkpoint, data):
    code, output = run("calibrate", checkpoint, data, "--speedup", 1.5)
    assert code == 0, output
    layers = float(output.split(" of 3 layers run")[0].split()[-1])
    assert 1.7 <= layers <= 2.0


def test_a_cascades_speedup_is_against_its_last_member_alone(checkpoint, data, tmp_path):
    encoders = [save_encoder(tmp_path / f"{layers}-layers", layers) for layers in (2, 4)]
    members = [
        randomise(rx.FullDepth.from_backbone(encoder, num_labels=2), seed) for seed, encoder in enumerate(encoders)
    ]
    rx.CascadeBert.from_members(members).save_pretrained(checkpoint)  # beside its tokenizer
    code, output = run("calibrate", checkpoint, data, "--speedup", 1.5)
    assert code == 0, output
    layers = float(output.split(" of 4 layers run")[0].split()[-1])
    assert 2.3 <= layers <= 4 / 1.5


def test_what_cannot_be_promised_changes_nothing(checkpoint, data):
    before = (checkpoint / "config.json").read_text()
    code, output = run("calibrate", checkpoint, data, "--max-loss", 0.001)
    assert code == 2 and "error max_loss" in output
    assert (checkpoint / "config.json").read_text() == before


def test_a_published_checkpoint_is_refused_before_anything_runs(checkpoint, data, monkeypatch):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["early_exit"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("ragged_exit.calibration.job.exit_table", None)
    code, output = run("calibrate", checkpoint, data)
    assert code == 2 and "is a published checkpoint" in output


def test_texts_are_cut_where_the_tokenizer_says(checkpoint, data, monkeypatch):
    seen = []

    def spy(fast, sequences, types):
        seen.append(max(map(len, sequences)))
        return exit_table(fast, sequences, types)

    for module in ("job", "exits"):  # of calibrate and inspect
        monkeypatch.setattr(f"ragged_exit.calibration.{module}.exit_table", spy)
    with data.open("a") as file:
        file.write(json.dumps({"text": "good " * 2000}) + "\n")
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    for command in (("calibrate", "--speedup", 1.5), ("inspect",)):
        for told, options, cut in ((5, (), 5), (5, ("--max-length", 7), 7), (1_000_000, (), 512)):  # 512 positions
            (checkpoint / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": told}))
            code, output = run(*command, checkpoint, data, *options)
            assert code == 0 and seen.pop() == cut, output


@pytest.mark.parametrize(
    ("command", "broken", "extra"),
    [
        ("calibrate", "ragged_exit.calibration.job", "ragged-exit[train]"),
        ("inspect", "ragged_exit.calibration.exits", "ragged-exit[train]"),
    ],
)
def test_a_missing_extra_is_named(command, broken, extra, checkpoint, data, monkeypatch):
    monkeypatch.setitem(sys.modules, broken, None)  # importing it raises ImportError
    code, output = run(command, checkpoint, data)
    assert code == 2 and f"pip install '{extra}'" in output


@pytest.mark.parametrize("command", ["calibrate", "inspect", "score"])
def test_a_checkpoint_without_a_tokenizer_is_refused(command, checkpoint, data, tmp_path):
    """transformers would invent one that knows no word."""
    (checkpoint / "tokenizer.json").unlink()
    out = (tmp_path / "out.csv",) if command == "score" else ()
    code, output = run(command, checkpoint, data, *out)
    assert code == 2 and "expected a tokenizer beside the model" in output


def test_a_checkpoint_that_is_not_whole_is_one_clear_line(checkpoint, data):
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[:-100])
    code, output = run("inspect", checkpoint)
    assert code == 2 and "model.safetensors" in output and "Traceback" not in output


@pytest.mark.parametrize("command", ["inspect", "calibrate", "bench", "score"])
@pytest.mark.parametrize(
    ("content", "message"),
    [('{"a": ', "not readable as json: Expecting value"), ("[]", "expected an object, got list")],
)
def test_a_broken_config_is_named(command, content, message, checkpoint, data, tmp_path):
    (checkpoint / "config.json").write_text(content)
    arguments = {"bench": ("--model", checkpoint, "--data", data), "score": (checkpoint, data, tmp_path / "out.csv")}
    code, output = run(command, *arguments.get(command, (checkpoint, data)))
    assert code == 2 and f"model/config.json: {message}" in output


def saved_weights(path: Path, zipped: bool, cut: int) -> bytes:
    torch.save({"bert.weight": torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()[:cut]


def test_a_weights_file_that_is_not_whole_is_named(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["early_exit"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "model.safetensors").unlink()
    weights = checkpoint / "pytorch_model.bin"
    reviews = save_reviews(tmp_path / "reviews.csv")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 438012345\n"
    for content in (pointer, b"", saved_weights(weights, True, 2000), saved_weights(weights, False, 2000)):
        weights.write_bytes(content)
        for command in (("inspect", checkpoint), ("bench", "--model", checkpoint, "--data", reviews)):
            code, output = run(*command)
            assert code == 2 and "model/pytorch_model.bin: expected a dict of tensors" in output
    torch.save([torch.ones(1)], weights)
    with pytest.raises(ValueError, match=r"pytorch_model.bin: expected a dict of tensors, got list"):
        rx.load(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": {}}, "rule: expected one of"),
        ({"rule": None}, "early_exit.rule: expected an object, got None"),
        ({"rule": {"name": "Entropy", "threshold": "x"}}, "early_exit: threshold: expected a number"),
        ({"colour": "red"}, "early_exit: .*colour"),
        ({"system": "deeberd"}, "early_exit.system: expected one of"),
        ([], r"early_exit: expected an object, got \[\]"),
    ],
)
def test_a_section_that_is_not_ours_is_named(changes, message, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["early_exit"] = config["early_exit"] | changes if changes else changes
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        rx.load(checkpoint)


@pytest.mark.parametrize("speedup", [0, 0.5, "nan"])
def test_a_speedup_below_one_is_refused(speedup, checkpoint, data):
    code, output = run("calibrate", checkpoint, data, "--speedup", speedup)
    assert code == 2 and "speedup: expected at least 1" in output


def test_a_speedup_out_of_reach_changes_nothing(checkpoint, data):
    before = (checkpoint / "config.json").read_text()
    code, output = run("calibrate", checkpoint, data, "--speedup", 100)
    assert code == 2 and "error speedup: even the loosest threshold runs more than 1 / 100" in output
    assert (checkpoint / "config.json").read_text() == before


def test_a_regression_has_no_guarantee(tmp_path, data):
    checkpoint = save_checkpoint(tmp_path / "regression", num_labels=1)
    code, output = run("calibrate", checkpoint, data)
    assert code == 2 and "error max_loss: a regression" in output


def test_inspect_a_checkpoint(checkpoint):
    code, output = run("inspect", checkpoint)
    assert code == 0 and "system deebert" in output and "3 layers, hidden 32" in output


def test_no_checkpoint_is_one_clear_line(tmp_path):
    code, output = run("inspect", tmp_path)
    assert code == 2 and "error" in output and "config.json" in output
