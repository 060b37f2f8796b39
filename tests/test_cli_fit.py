"""`ragged-exit fit`: an encoder and a file in, a checkpoint that `rx.load` reads and that answers well out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_cases import save_encoder, save_reviews
from tiny import one_thread  # noqa: F401  (autouse)
from transformers import AutoTokenizer
from typer.testing import CliRunner

import ragged_exit as rx
from ragged_exit.cli import app
from ragged_exit.models.loading import class_names
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


def cut_at(folder: Path) -> int:
    """Tokens a row, where score and calibrate cut texts, too."""
    return AutoTokenizer.from_pretrained(folder).model_max_length


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
    assert cut_at(out) == 20


@pytest.mark.parametrize("system", [("deebert",), ("cascade", "--folds", 0, "--member")])
def test_texts_are_cut_at_what_the_encoder_takes(system, encoder, reviews, tmp_path):
    members = [encoder] if len(system) > 1 else []
    with reviews.open("a") as file:
        file.writelines(f"{'good ' * 5000},1\n" for _ in range(20))  # some are for training
    arguments = (*members, encoder, reviews, tmp_path / "out", "--epochs", 1, "--max-length", 1000)
    code, output = run("--system", *system, *arguments)
    assert code == 0, output
    assert cut_at(tmp_path / "out") == rx.load(tmp_path / "out").config.max_position_embeddings < 1000


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


def named(reviews: Path, path: Path, names=("bad", "good"), rows: slice = slice(None)) -> Path:
    """The reviews with names for labels."""
    header, *lines = reviews.read_text().splitlines()
    path.write_text("\n".join([header, *(f"{line[:-1]}{names[int(line[-1])]}" for line in lines[rows])]) + "\n")
    return path


@pytest.mark.parametrize("system", [("deebert",), ("cascade", "--folds", 0, "--member")])
def test_class_names_are_kept_and_asked_for(system, encoder, reviews, tmp_path):
    members = [encoder] if len(system) > 1 else []
    train, out = named(reviews, tmp_path / "train.csv"), tmp_path / "out"
    valid = tmp_path / "valid.csv"  # of one class, the second in the training file
    valid.write_text("text,label\n" + "the film was great,good\n" * 9)
    code, output = run("--system", *system, *members, "--valid", valid, encoder, train, out, *SHORT)
    assert code == 0, output
    assert "1.0000" in output  # accuracy
    assert rx.load(out).config.id2label == {0: "bad", 1: "good"}
    assert rx.load(out).config.label2id == {"bad": 0, "good": 1}
    assert class_names(out) == ["bad", "good"]
    other = named(reviews, tmp_path / "other.csv", ("bad", "fine"))
    result = CliRunner().invoke(app, ["calibrate", str(out), str(other)])
    told = " ".join(result.output.split())
    assert result.exit_code == 2 and "unknown class 'fine'" in told and "known classes: bad, good" in told
    result = CliRunner().invoke(app, ["inspect", str(out), str(other)])  # it needs no labels
    assert result.exit_code == 0 and f"where {len(reviews.read_text().splitlines()) - 1} rows leave" in result.output
    code, output = run("--system", *system, *members, "--valid", other, encoder, train, tmp_path / "out2", *SHORT)
    assert code == 2 and "unknown class 'fine'" in " ".join(output.split())


def test_names_are_not_asked_for_where_classes_are_numbers(encoder, reviews, tmp_path):
    valid = named(reviews, tmp_path / "valid.csv")
    code, output = run("--system", "pabee", "--valid", valid, encoder, reviews, tmp_path / "out", *SHORT)
    assert code == 2 and "unknown class" in output and "labels are numbers" in " ".join(output.split())


@pytest.mark.parametrize("system", ["deebert", "pabee", "berxit", "fastbert"])
@pytest.mark.parametrize("label", ["0", "only", "1000000000000", "-1"])
def test_labels_that_are_no_classes_are_refused(system, label, encoder, tmp_path):
    data = tmp_path / "data.csv"
    other = "0" if label[-2:] in ("00", "-1") else label
    data.write_text("text,label\n" + f"good,{label}\n" * 30 + f"bad,{other}\n" * 30)
    code, output = run("--system", system, encoder, data, tmp_path / "out", *SHORT)
    assert code == 2 and "error label: expected" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--system", "deeberd"), "system"),
        (("--system", "cascade"), "member"),
        (("--system", "pabee", "--pooling", "max"), "pooling"),
        (("--system", "fastbert", "--pooling", "mean"), "pooling"),
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
    code, output = run("--system", "berxit", "--learning-rate", 1e-3, *arguments)
    assert code == 0, output


@pytest.mark.parametrize("system", ["deebert", "cascade"])
def test_a_model_that_is_there_already_stays(system, encoder, reviews, tmp_path):
    members = ["--member", encoder] if system == "cascade" else []
    arguments = ("--system", system, *members, "--folds", 0, "--epochs", 1, encoder, reviews)
    assert run(*arguments, tmp_path / "out")[0] == 0
    for out in (tmp_path / "out", encoder):
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        code, output = run(*arguments, out)
        assert code == 2 and f"error out: {out} holds a model already" in " ".join(output.split())
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_kill_while_the_work_is_deleted_leaves_a_finished_model(encoder, reviews, tmp_path):
    arguments = ("--system", "deebert", encoder, reviews, tmp_path / "out", *SHORT, "--epochs", 1)
    assert run(*arguments)[0] == 0
    (tmp_path / "out" / "unfinished").mkdir()
    (tmp_path / "out" / "unfinished" / "outcome.json").write_text("true")
    (tmp_path / "out" / "unfinished" / "precious.txt").write_text("precious")
    code, output = run(*arguments)
    assert code == 2 and "holds files that are no unfinished run" in " ".join(output.split())
    assert (tmp_path / "out" / "unfinished" / "precious.txt").exists()
    claim = {"command": "fit", "system": "deebert"}
    (tmp_path / "out" / "unfinished" / "run.json").write_text(json.dumps(claim))
    code, output = run(*arguments)
    assert code == 2 and "holds a model already" in " ".join(output.split())
    assert not (tmp_path / "out" / "unfinished").exists()


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
