"""Scoring files: the answers are the model's, in order, from and to every format; bad rows cost only themselves."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from score_cases import read, save_checkpoint, texts, write
from tiny import one_thread  # noqa: F401  (autouse)
from transformers import AutoTokenizer
from typer.testing import CliRunner

import ragged_exit as rx
from ragged_exit.cli import app
from ragged_exit.integrations import score as score_module
from ragged_exit.integrations import shards
from ragged_exit.integrations.ray_engine import _check_room
from ragged_exit.integrations.score import score_file
from ragged_exit.integrations.scorer import ScoreOptions
from ragged_exit.integrations.shards import split

NO_TEXT = "text: expected a string, got null, a list, an object or bytes that are not UTF-8"
NO_UTF8 = pa.array([b"good", b"\xff\xfe", None, b"bad"])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_answers_are_the_models_in_order(suffix, checkpoint, tmp_path, small_shards):
    rows = texts(100)
    seen = []
    scored = score_file(
        ScoreOptions(str(checkpoint), token_budget=64),
        write(tmp_path / f"in{suffix}", rows),
        tmp_path / f"out{suffix}",
        on_rows=lambda done, total: seen.append((done, total)),
    )
    assert scored == (100, 0) and seen[0] == (0, 100) and seen[-1] == (100, 100)
    found = read(tmp_path / f"out{suffix}")
    ids = AutoTokenizer.from_pretrained(checkpoint)(rows)["input_ids"]
    wanted = list(rx.accelerate(rx.load(checkpoint)).stream(ids))
    assert [str(row["id"]) for row in found] == [str(number) for number in range(100)]
    assert [row["exit_layer"] for row in found] == [row.exit_layer for row in wanted]
    assert [row["label"] for row in found] == [int(row.logits.argmax()) for row in wanted]
    assert len({row["exit_layer"] for row in found}) > 1
    for row, other in zip(found, wanted, strict=True):
        logits = json.loads(row["logits"]) if isinstance(row["logits"], str) else row["logits"]
        torch.testing.assert_close(torch.tensor(logits), other.logits, atol=1e-5, rtol=0)
    assert not (tmp_path / f"out{suffix}.parts").exists()


def test_regression_and_pairs_and_ids(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "model", num_labels=1)
    first, second = texts(30, 1), texts(30, 2)
    source = write(tmp_path / "in.jsonl", first, text2=second, id=[f"r{row}" for row in range(30)])
    score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.parquet")
    found = read(tmp_path / "out.parquet")
    encoded = AutoTokenizer.from_pretrained(checkpoint)(first, second)
    rows = [
        {"input_ids": ids, "token_type_ids": types}
        for ids, types in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)
    ]
    wanted = list(rx.accelerate(rx.load(checkpoint)).stream(rows))
    assert [row["id"] for row in found] == [f"r{row}" for row in range(30)]
    torch.testing.assert_close(
        torch.tensor([row["value"] for row in found]), torch.stack([row.logits[0] for row in wanted])
    )


def test_a_missing_text_is_reported_and_the_others_answered(checkpoint, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good film"}\n{"text": null}\n{"text": "bad"}\n')
    assert score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.jsonl") == (3, 1)
    first, second, third = read(tmp_path / "out.jsonl")
    assert first["error"] is None and third["error"] is None and third["label"] in (0, 1)
    assert second["id"] == "1" and second["error"] == NO_TEXT and second["label"] is None


def test_a_text_that_is_none_does_not_stop_the_others(checkpoint, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good film"}\n{"text": ["a"]}\n{"text": {"a": 1}}\n{"text": "bad"}\n')
    assert score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.jsonl") == (4, 2)
    assert [row["error"] for row in read(tmp_path / "out.jsonl")] == [None, NO_TEXT, NO_TEXT, None]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), "dictionary"], ids=str)
def test_bytes_that_are_no_text_do_not_stop_the_others(kind, checkpoint, tmp_path):
    cells = NO_UTF8.dictionary_encode() if kind == "dictionary" else NO_UTF8.cast(kind, safe=False)
    pa.parquet.write_table(pa.table({"text": cells}), tmp_path / "in.parquet")
    assert score_file(ScoreOptions(str(checkpoint)), tmp_path / "in.parquet", tmp_path / "out.jsonl") == (4, 2)
    assert [row["error"] for row in read(tmp_path / "out.jsonl")] == [None, NO_TEXT, NO_TEXT, None]


@pytest.mark.parametrize("ids", [NO_UTF8, pa.array([[1], [2], [3], [4]])], ids=["bytes", "lists"])
def test_an_id_that_is_no_text_is_refused(ids, checkpoint, tmp_path):
    pa.parquet.write_table(pa.table({"text": list("abcd"), "id": ids}), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=r"in.parquet: not readable: column 'id': "):
        score_file(ScoreOptions(str(checkpoint)), tmp_path / "in.parquet", tmp_path / "out.jsonl")


@pytest.mark.parametrize(("suffix", "comma"), [(".csv", b","), (".tsv", b"\t")])
def test_a_header_that_is_no_text_is_refused(suffix, comma, checkpoint, tmp_path):
    source = tmp_path / f"in{suffix}"
    source.write_bytes(comma.join([b"text", b"caf\xe9"]) + b"\n" + comma.join([b"a", b"1"]) + b"\n")
    with pytest.raises(ValueError, match=rf"in{suffix}: expected names of columns in UTF-8, got b'caf\\xe9'"):
        score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.jsonl")


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_what_json_does_not_have_is_a_missing_text(constant, checkpoint, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(f'{{"text": "good film"}}\n{{"text": {constant}}}\n')
    assert score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.jsonl") == (2, 1)
    assert read(tmp_path / "out.jsonl")[1]["error"] == NO_TEXT


def test_a_column_is_not_its_own_partner(checkpoint, tmp_path):
    first, second = texts(20, 1), texts(20, 2)
    source = write(tmp_path / "in.csv", first, text2=second)
    score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.parquet", text="text2")
    score_file(ScoreOptions(str(checkpoint)), write(tmp_path / "second.csv", second), tmp_path / "wanted.parquet")
    assert read(tmp_path / "out.parquet") == read(tmp_path / "wanted.parquet")


def shards_of(source, folder, **options) -> list[dict]:
    folder.mkdir()
    paths = split(source, folder, "text", None, **options)
    return [row for path in paths for row in pa.parquet.read_table(path).to_pylist()]


@pytest.mark.parametrize("odd", [["2020-01-01"], ["2020-01-01T10:00:00"], ["10:00", "1e5", "true", "007"]], ids=str)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_texts_and_ids_come_through_as_written(suffix, odd, tmp_path):
    found = shards_of(write(tmp_path / f"in{suffix}", odd, id=odd), tmp_path / "parts")
    assert found == [{"text": text, "id": text} for text in odd]


def test_numbers_in_json_come_through_as_written(tmp_path):
    source = tmp_path / "in.jsonl"
    numbers = [str(2**53 + 1), str(2**63), str(2**80), "1.50", "1E5", "true"]
    source.write_text("".join(f'{{"text": {number}, "id": {number}}}\n' for number in numbers))
    assert shards_of(source, tmp_path / "parts") == [{"text": number, "id": number} for number in numbers]


def test_a_column_that_is_null_or_absent_for_long(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": null}\n' * 100_000 + '{"text": "good", "id": "a"}\n')
    found = shards_of(source, tmp_path / "parts")
    assert len(found) == 100_001 and found[-1] == {"text": "good", "id": "a"}
    assert found[0] == {"text": None, "id": None}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("before", [0, 3000])
def test_rows_longer_than_a_block(suffix, before, tmp_path):
    rows = ["a" * 1000] * before + ["y" * (5 << 20), "b"]
    found = shards_of(write(tmp_path / f"in{suffix}", rows), tmp_path / "parts")
    assert [row["text"] for row in found] == rows
    assert [row["id"] for row in found] == [str(number) for number in range(len(rows))]


def test_shards_of_long_texts_have_fewer_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 << 20)
    source = write(tmp_path / "in.jsonl", [str(number % 10) * (1 << 20) for number in range(12)])
    paths = split(source, tmp_path, "text", None)
    assert [row["id"] for path in paths for row in pa.parquet.read_table(path).to_pylist()] == list(map(str, range(12)))
    assert len(paths) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{broken\n', "not readable as jsonl: line 2"),
        ('{"text": "a", "id": ["a"]}\n', "not readable: expected a string or a number, got"),
        ('{"words": "a"}\n', "no column 'text'; the file has the columns .'words'"),
        ("", "no rows"),
    ],
)
def test_bad_json_is_one_clear_line(content, message, checkpoint, tmp_path):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        score_file(ScoreOptions(str(checkpoint)), tmp_path / "in.jsonl", tmp_path / "out.csv")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_ids_are_read_back_exactly(suffix, checkpoint, tmp_path):
    ids = ['a "b"', '"', "2020-01-01", "1,5", "é", "\\t", None]
    source = write(tmp_path / "in.jsonl", [*texts(6), None], id=ids)
    out = tmp_path / f"out{suffix}"
    assert score_file(ScoreOptions(str(checkpoint)), source, out) == (7, 1)
    (tmp_path / "again").mkdir()
    again = split(out, tmp_path / "again", "id", "error")
    assert [row["id"] for row in pa.parquet.read_table(again[0]).to_pylist()] == ids
    errors = [row["text2"] for row in pa.parquet.read_table(again[0]).to_pylist()]
    assert errors == [None] * 6 + [NO_TEXT]


@pytest.mark.parametrize("name", ["a\tb", "a\nb", "a\rb", ""])
def test_an_id_that_a_tsv_cannot_hold_is_refused(name, checkpoint, tmp_path):
    source = write(tmp_path / "in.jsonl", texts(1), id=[name])
    with pytest.raises(ValueError, match=r"out: a \.tsv cannot hold the id"):
        score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.tsv")
    for suffix in (".csv", ".jsonl"):
        score_file(ScoreOptions(str(checkpoint)), source, tmp_path / f"out{suffix}")
        (tmp_path / suffix).mkdir()
        again = split(tmp_path / f"out{suffix}", tmp_path / suffix, "id", None)
        assert pa.parquet.read_table(again[0]).column("id").to_pylist() == [name]


@pytest.mark.parametrize("max_length", [None, 6, 5000])  # the tokenizer names no limit; the table has 512 positions
def test_long_texts_are_cut_and_numbers_stay_texts(checkpoint, tmp_path, max_length):
    source = tmp_path / "in.csv"
    source.write_text("text\n1\n2\n" + "good " * 2000 + "\n")
    options = ScoreOptions(str(checkpoint), max_length=max_length)
    assert score_file(options, source, tmp_path / "out.parquet") == (3, 0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    cut = [2, *tokenizer("good", add_special_tokens=False)["input_ids"] * (min(max_length or 512, 512) - 2), 3]
    rows = [*(tokenizer(text)["input_ids"] for text in ("1", "2")), cut]
    expected = rx.accelerate(rx.load(checkpoint)).stream(rows)
    for row, answer in zip(read(tmp_path / "out.parquet"), expected, strict=True):
        assert row["exit_layer"] == answer.exit_layer and row["logits"] == answer.logits.tolist()


def test_workers_may_have_other_working_directories(checkpoint, tmp_path, monkeypatch):
    write(tmp_path / "in.csv", texts(4))
    monkeypatch.chdir(tmp_path)
    seen = []

    def elsewhere(options, shards):
        seen.extend((options.model, *shards[0]))
        with monkeypatch.context() as patch:
            patch.chdir("/")
            yield from score_module.score_locally(options, shards)

    score_file(ScoreOptions(checkpoint.name), Path("in.csv"), Path("out.csv"), engine=elsewhere)
    assert all(Path(path).is_absolute() for path in seen) and len(read(tmp_path / "out.csv")) == 4


def test_an_answer_that_is_no_number_is_an_error(checkpoint, tmp_path):
    model = rx.load(checkpoint)
    word = AutoTokenizer.from_pretrained(checkpoint)("good")["input_ids"][1]
    with torch.no_grad():
        model.backbone.embeddings.word_embeddings.weight[word] = math.nan
    model.save_pretrained(checkpoint)
    source = write(tmp_path / "in.csv", ["bad film", "good film"])
    assert score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.jsonl") == (2, 1)
    fine, bad = read(tmp_path / "out.jsonl")
    assert fine["error"] is None and bad["error"] == "the model answered [nan, nan], expected finite numbers"
    assert bad["label"] is None and bad["logits"] is None and bad["score"] is None


def test_a_score_that_is_no_number_is_null_in_json(tmp_path):
    table = pa.table({"id": ["0", "1"], "score": pa.array([math.nan, 0.5], pa.float32())})
    shards.write_whole(tmp_path / "part.parquet", table)
    shards.join([tmp_path / "part.parquet"], tmp_path / "out.jsonl", tmp_path)
    assert read(tmp_path / "out.jsonl") == [{"id": "0", "score": None}, {"id": "1", "score": 0.5}]


@pytest.mark.parametrize("name", ["in-000000.parquet", "out-000001.parquet", "whole.parquet"])
def test_an_output_may_be_called_as_a_shard(name, checkpoint, tmp_path, small_shards):
    source = write(tmp_path / "in.csv", texts(60))
    score_file(ScoreOptions(str(checkpoint)), source, tmp_path / name)
    score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "wanted.parquet")
    assert read(tmp_path / name) == read(tmp_path / "wanted.parquet")


def test_a_large_row_group_is_read_in_pieces(tmp_path):
    path = write(tmp_path / "in.parquet", texts(20_000))
    assert pa.parquet.ParquetFile(path).num_row_groups == 1
    assert max(map(len, shards._read(path, "text", None, 1 << 20))) == shards.SHARD_ROWS


def test_two_columns_of_one_name_are_refused(checkpoint, tmp_path):
    cells = pa.array(["good", "bad"])
    pa.parquet.write_table(pa.Table.from_arrays([cells, cells], names=["text", "text"]), tmp_path / "in.parquet")
    (tmp_path / "in.csv").write_text("text,text\ngood,bad\n")
    for name, told in (("in.parquet", "more than one column 'text'"), ("in.csv", "multiple columns named text")):
        with pytest.raises(ValueError, match=rf"{name}: .*{told}"):
            score_file(ScoreOptions(str(checkpoint)), tmp_path / name, tmp_path / "out.csv")


@pytest.mark.parametrize(
    ("workers", "threads", "gpus", "told"),
    [(2, 1, 0, None), (1, 4, 0, None), (2, 3, 0, "threads: 2 workers .* 6 CPUs.* has 4"), (1, 1, 1, "gpus: .* has 0")],
)
def test_workers_that_this_machine_has_no_room_for_are_refused(workers, threads, gpus, told):
    """Ray would wait for ever."""
    with contextlib.nullcontext() if told is None else pytest.raises(ValueError, match=told):
        _check_room({"CPU": 4.0, "memory": 1e9}, workers, {"threads": threads, "gpus": gpus})


def test_options_of_the_command_line(checkpoint, tmp_path):
    source = write(tmp_path / "in.csv", texts(30, 3), body=texts(30, 1), other=texts(30, 2))
    arguments = {"text": "body", "text2": "other", "threshold": 0.3, "max-length": 9, "token-budget": 50, "threads": 1}
    options = [item for name, value in arguments.items() for item in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["score", str(checkpoint), str(source), str(tmp_path / "out.jsonl"), *options])
    assert result.exit_code == 0, result.output
    told = ScoreOptions(str(checkpoint), threshold=0.3, max_length=9, token_budget=50)
    score_file(told, source, tmp_path / "wanted.jsonl", text="body", text2="other")
    score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "others.jsonl")
    assert read(tmp_path / "out.jsonl") == read(tmp_path / "wanted.jsonl") != read(tmp_path / "others.jsonl")
    result = CliRunner().invoke(
        app, ["score", str(checkpoint), str(source), str(tmp_path / "a.csv"), "--patience", "2"]
    )
    assert result.exit_code == 2 and "patience: the rule Entropy has no such field" in " ".join(result.output.split())


def test_names_with_brackets_are_written_and_told(checkpoint, tmp_path):
    write(tmp_path / "in.csv", ["good"])
    out = tmp_path / "out[bold][" / "x].csv"
    out.parent.mkdir()
    result = CliRunner().invoke(app, ["score", str(checkpoint), str(tmp_path / "in.csv"), str(out)])
    assert result.exit_code == 0 and out.exists() and "out[bold][/x].csv" in "".join(result.output.split())


def test_a_rule_that_learns_is_refused_until_it_is_calibrated(checkpoint, tmp_path):
    """Resumed, the bandit would start anew in the middle; on two workers there would be two."""
    model = rx.load(checkpoint)
    model.rule = rx.UcbMaxProb()
    model.save_pretrained(checkpoint)
    source = write(tmp_path / "in.jsonl", texts(40))
    with pytest.raises(ValueError, match=r"model: the rule UcbMaxProb learns as it answers.*calibrate the model first"):
        score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.csv")
    result = CliRunner().invoke(app, ["calibrate", str(checkpoint), str(source), "--speedup", "1.2"])
    assert result.exit_code == 0, result.output
    assert score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.csv") == (40, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.txt", "a", "in: expected a file that ends in"),
        ("in.csv", "words\na\n", "no column 'text'"),
        ("in.csv", "text\n", "no rows"),
        ("in.csv", 'id,text\n1,good\n2,"bad\n3,fine\n', "unexpected end of data"),
        ("in.parquet", "not parquet", "not readable"),
        (None, "", "in: no file"),
    ],
)
def test_bad_input_is_one_clear_line(name, content, message, checkpoint, tmp_path):
    source = tmp_path / (name or "absent.csv")
    if name:
        source.write_text(content)
    result = CliRunner().invoke(app, ["score", str(checkpoint), str(source), str(tmp_path / "out.csv")])
    assert result.exit_code == 2 and message in result.output.replace("\n", " ") and "Traceback" not in result.output
