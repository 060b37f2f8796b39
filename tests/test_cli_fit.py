"""`ragged-exit fit`: an encoder and a file in, a checkpoint that `rx.load` reads and that answers well out."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_cases import save_encoder, save_reviews
from tiny import one_thread  # noqa: F401  (autouse)
from transformers import AutoTokenizer
from typer.testing import CliRunner

import ragged_exit as rx
from ragged_exit.cli import app
from ragged_exit.training.job import RUN_FOLDER

SHORT = ("--epochs", 6, "--learning-rate", 3e-3, "--batch-size", 16, "--threads", 1, "--max-length", 20)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["fit", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return save_encoder(tmp_path / "encoder")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    return save_reviews(tmp_path / "reviews.csv")


def accuracy(folder: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["the film was good", "the plot was great fine", "a dull film", "the film was awful poor poor"]
    fast = rx.accelerate(rx.load(folder))
    answers = [int(row.logits.argmax()) for row in fast.stream(tokenizer(texts)["input_ids"])]
    return sum(answer == label for answer, label in zip(answers, (1, 1, 0, 0), strict=True)) / 4


@pytest.mark.parametrize("system", ["deebert", "fastbert"])
def test_fit(system, encoder, reviews, tmp_path):
    out = tmp_path / "out"
    code, output = run("--system", system, encoder, reviews, out, *SHORT)
    assert code == 0, output
    assert "by exit" in output and "ece" in output
    assert accuracy(out) == 1.0
    assert not (out / RUN_FOLDER).exists()
    assert AutoTokenizer.from_pretrained(out).model_max_length == 20  # where score and calibrate cut texts, too


def test_fit_a_cascade(encoder, reviews, tmp_path):
    small, out = save_encoder(tmp_path / "small", layers=1), tmp_path / "out"
    code, output = run("--system", "cascade", "--member", small, "--folds", 2, encoder, reviews, out, *SHORT)
    assert code == 0, output
    model = rx.load(out)
    assert isinstance(model, rx.CascadeBert) and model.members[0].config.num_hidden_layers == 1
    assert accuracy(out) == 1.0


def test_fit_a_regression(encoder, reviews, tmp_path):
    lines = reviews.read_text().splitlines()
    scores = [lines[0], *(f"{line[:-1]}{0.5 + int(line[-1])}" for line in lines[1:])]
    reviews.write_text("\n".join(scores) + "\n")
    code, output = run("--system", "berxit", encoder, reviews, tmp_path / "out", "--freeze-backbone")
    assert code == 0, output
    assert "pearson" in output and rx.load(tmp_path / "out").config.num_labels == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--system", "deeberd"), "system"),
        (("--system", "cascade"), "member"),
        (("--system", "pabee", "--pooling", "max"), "pooling"),
    ],
)
def test_bad_arguments_are_one_clear_line(options, message, encoder, reviews, tmp_path):
    code, output = run(*options, encoder, reviews, tmp_path / "out")
    assert code == 2 and f"error {message}" in output and "Traceback" not in output


@pytest.mark.parametrize("system", [("deebert",), ("cascade", "--folds", 2, "--member")])
def test_a_folder_that_is_not_ours_is_refused_and_stays(system, encoder, reviews, tmp_path):
    precious = tmp_path / "out" / RUN_FOLDER / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    members = [encoder] if len(system) > 1 else []
    code, output = run("--system", *system, *members, encoder, reviews, tmp_path / "out", *SHORT)
    assert code == 2 and "error out: the folder" in output and precious.read_text() == "mine"


def test_a_call_that_failed_does_not_block_the_right_one(encoder, reviews, tmp_path):
    arguments = ("--freeze-backbone", "--epochs", 1, encoder, reviews, tmp_path / "out")
    code, output = run("--system", "deebert", "--learning-rate", "nan", *arguments)
    assert code == 2 and "learning" in output
    for system in ("berxit", "deebert"):
        code, output = run("--system", system, "--learning-rate", 1e-3, *arguments)
        assert code == 0, output


def test_another_systems_work_is_not_thrown_away(encoder, reviews, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("ragged_exit.models.base.EarlyExitModel.save_pretrained", None)  # after all epochs
        run("--system", "pabee", encoder, reviews, tmp_path / "out", *SHORT, "--epochs", 1)
    code, output = run("--system", "berxit", encoder, reviews, tmp_path / "out", *SHORT, "--epochs", 1)
    assert code == 2 and "unfinished run of another system" in " ".join(output.split())


def test_labels_that_validation_alone_has(encoder, reviews, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("text,label\ngood,0\nbad,2\n")
    code, output = run("--system", "pabee", "--valid", other, encoder, reviews, tmp_path / "out", *SHORT)
    assert code == 2 and "labels" in output
