"""Readers: what every format makes of the same rows, what bad files are told, and the split by hash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragged_exit.data import TextData, count_outputs, read_text_data, split_by_hash

TEXTS = [
    "plain",
    '"opened and not closed',
    '"all of it"',
    'with "quotes", and a comma',
    "clichés – naïve",
    "123",
    "NA",
    "2020-01-31",
]


def write(path, columns):
    """Writes `columns` (name -> list) in the format that the suffix of `path` names."""
    names, rows = list(columns), list(zip(*columns.values(), strict=True))
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".tsv":
        path.write_text("\n".join("\t".join(map(str, row)) for row in [names, *rows]) + "\n", encoding="utf-8")
    else:

        def quoted(cell):
            return '"' + str(cell).replace('"', '""') + '"' if isinstance(cell, str) else str(cell)

        path.write_text("\n".join(",".join(map(quoted, row)) for row in [names, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(params=["csv", "tsv", "jsonl", "parquet"])
def suffix(request):
    return request.param


def test_every_format_reads_the_same_rows(tmp_path, suffix):
    labels = [i % 3 for i in range(len(TEXTS))]
    data = read_text_data(write(tmp_path / f"a.{suffix}", {"text": TEXTS, "label": labels}))
    assert data == TextData(TEXTS, None, labels, [str(i) for i in range(len(TEXTS))], None)
    assert not data.is_regression


def test_pairs_ids_and_float_labels(tmp_path, suffix):
    columns = {"id": [7, 3], "sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [2.0, 3.5]}
    data = read_text_data(write(tmp_path / f"a.{suffix}", columns))
    assert data == TextData(["a", "b"], ["c", "d"], [2.0, 3.5], ["7", "3"], None)
    assert data.is_regression


def test_string_labels_become_sorted_classes(tmp_path, suffix):
    columns = {"text": ["a", "b", "c"], "label": ["neutral", "entailment", "neutral"]}
    data = read_text_data(write(tmp_path / f"a.{suffix}", columns))
    assert data.labels == [1, 0, 1]
    assert data.label_names == ["entailment", "neutral"]


@pytest.mark.parametrize(
    ("column", "labels", "names"),
    [
        (pa.array([True, False]), [1, 0], ["false", "true"]),
        (pa.array([1.0, 0.0]), [1, 0], None),
        (pa.array([-1, 5], pa.int8()), [-1, 5], None),
        (pa.array([1.5, 2.5], pa.float32()), [1.5, 2.5], None),
        (pa.array(["b", "a"]).dictionary_encode(), [1, 0], ["a", "b"]),
        (pa.array([date(2020, 1, 2), date(2020, 1, 1)]), [1, 0], ["2020-01-01", "2020-01-02"]),
    ],
)
def test_label_types(tmp_path, column, labels, names):
    pq.write_table(pa.table({"text": ["x", "y"], "label": column}), tmp_path / "a.parquet")
    data = read_text_data(tmp_path / "a.parquet")
    assert data.labels == labels
    assert [type(v) for v in data.labels] == [type(v) for v in labels]
    assert data.label_names == names


@pytest.mark.parametrize(
    ("columns", "arguments", "text", "pair"),
    [
        (["sentence", "label"], {}, "sentence", None),
        (["text1", "text2", "label"], {}, "text1", "text2"),
        (["text", "text2", "label"], {}, "text", "text2"),
        (["text", "sentence2", "label"], {}, "text", None),
        (["sentence", "text", "label"], {}, "text", None),
        (["body", "text", "label"], {"text": "body"}, "body", None),
        (["body", "text2", "label"], {"text": "body"}, "body", "text2"),
        (["text", "text2", "label"], {"text": "text2"}, "text2", None),
        (["sentence1", "sentence2", "label"], {"text": "sentence2"}, "sentence2", None),
        (["text", "text2", "other", "label"], {"text2": "other"}, "text", "other"),
    ],
)
def test_which_columns_are_taken(tmp_path, columns, arguments, text, pair):
    path = write(tmp_path / "a.csv", {name: [0 if name == "label" else f"in {name}"] for name in columns})
    data = read_text_data(path, **arguments)
    assert data.texts == [f"in {text}"]
    assert data.text_pairs == (pair and [f"in {pair}"])


@pytest.mark.parametrize("text", ["123", "2020-01-31", "true"])
def test_texts_that_look_like_something_else_stay_text(tmp_path, text):
    for path in (tmp_path / "a.csv", tmp_path / "a.tsv"):
        data = read_text_data(write(path, {"id": ["007"], "body": [text], "label": [1]}), text="body")
        assert (data.texts, data.ids) == ([text], ["007"])


@pytest.mark.parametrize(
    ("labels", "known", "found", "names"),
    [
        (["c", "a"], ["a", "b", "c"], [2, 0], ["a", "b", "c"]),
        ([1, 0], ["a", "b"], [1, 0], None),
        ([3, 1], ["1", "2", "3"], [2, 0], ["1", "2", "3"]),  # a file with "3" among words, and one without words
        (["3", "1"], ["1", "2", "3"], [2, 0], ["1", "2", "3"]),
        ([1, 0], [], [1, 0], None),
        ([0.5, 1.0], ["a", "b"], [0.5, 1.0], None),
    ],
)
def test_labels_of_a_later_file_are_known_by_name(labels, known, found, names, tmp_path, suffix):
    data = read_text_data(write(tmp_path / f"a.{suffix}", {"text": ["x", "y"], "label": labels}), label_names=known)
    assert (data.labels, data.label_names) == (found, names)


@pytest.mark.parametrize(("known", "told"), [(["a", "b"], "a, b"), ([], "none, labels are numbers")])
def test_an_unknown_class_is_refused(known, told, tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", {"text": ["x", "y"], "label": ["a" if known else "z", "z"]})
    row = 2 if known else 1
    with pytest.raises(
        ValueError, match=f"column 'label' has the unknown class 'z' in row {row}; known classes: {told}"
    ):
        read_text_data(path, label_names=known)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0] * 4, r"at least 2 classes, got \[0\]"),
        ([1] * 4, r"at least 2 classes, got \[1\]"),
        ([0, 1, -1, 0], "classes from 0 on, got -1"),
        ([0, 1, 10**12, 0], "at most one class for every training row, 3, got 1000000000001"),
    ],
)
def test_labels_that_are_no_classes(labels, message):
    with pytest.raises(ValueError, match=f"label: expected {message}"):
        count_outputs(TextData(list("abcd"), None, labels, list("0123")), 3)


def test_outputs_of_a_model_of_these_labels():
    def count(labels, names=None):
        return count_outputs(TextData(list("abcd"), None, labels, list("0123"), names), 4)

    assert (count([0, 2, 0, 1]), count([0, 1, 0, 1], ["a", "b", "c"]), count([0.5, 1.0, 2.0, 0.0])) == (3, 3, 1)


ODD = ["2020-01-01", "2020-01-01T10:00:00", "10:00", "1e5", "true", "null"]


def test_texts_ids_and_label_names_come_through_as_written(tmp_path, suffix):
    names = ["2020-01-01T10:00:00", "2021-01-01T10:00:00"] * 3
    data = read_text_data(write(tmp_path / f"a.{suffix}", {"id": ODD, "text": ODD, "label": names}))
    assert data.texts == data.ids == ODD
    assert data.label_names == names[:2] and data.labels == [0, 1] * 3


def test_whole_numbers_beyond_64_bits_are_targets(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": ["a", "b"], "label": [float(2**70), 1.0]})
    labels = read_text_data(path).labels
    assert labels == [2**70, 1] and all(type(label) is float for label in labels)


def test_booleans_in_csv_stay_as_written(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,True\nb,False\n")
    assert read_text_data(tmp_path / "a.csv").label_names == ["False", "True"]


@pytest.mark.parametrize("cells", [(" 1", "2 "), ("1", "2.0"), ("01", "2e0")])
def test_strings_that_are_numbers_are_numbers(tmp_path, suffix, cells):
    data = read_text_data(write(tmp_path / f"a.{suffix}", {"text": ["a", "b"], "label": list(cells)}))
    assert (data.labels, data.label_names, data.is_regression) == ([1, 2], None, False)


def test_ten_follows_nine(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", {"text": ["x"] * 12, "label": [str(label) for label in range(12)]})
    for known in (None, [], ["a", "b"]):
        data = read_text_data(path, label_names=known)
        assert (data.labels, data.label_names) == (list(range(12)), None)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_every_type_of_strings_may_hold_numbers(tmp_path, kind):
    pq.write_table(pa.table({"text": ["x", "y"], "label": pa.array(["10", "9"]).cast(kind)}), tmp_path / "a.parquet")
    assert read_text_data(tmp_path / "a.parquet").labels == [10, 9]


def test_large_json_ids_and_columns_that_nobody_asked_for(tmp_path):
    ids = [2**53 + 1, 2**63, 2**80, True]
    path = write(tmp_path / "a.jsonl", {"id": ids, "text": list("abcd"), "label": [0] * 4, "meta": [1, "x", [], None]})
    assert read_text_data(path).ids == [str(2**53 + 1), str(2**63), str(2**80), "true"]


def test_csv_newlines_in_quotes_byte_order_mark_and_empty_string(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label\r\n"two\nlines",0\r\n"",1\r\n')
    assert read_text_data(path).texts == ["two\nlines", ""]


def test_types_come_from_the_whole_file(tmp_path):
    # pyarrow's own default would decide after 1 MiB that labels are integers, and fail at the last row.
    texts = ["x" * 1000] * 2000
    data = read_text_data(write(tmp_path / "a.csv", {"text": texts, "label": [1] * 1999 + [0.5]}))
    assert data.is_regression and data.labels[-1] == 0.5 and len(data) == 2000


def test_one_row_longer_than_a_default_block(tmp_path):
    text = "y" * (3 << 20)
    for path in (tmp_path / "a.csv", tmp_path / "a.jsonl"):
        assert read_text_data(write(path, {"text": [text], "label": [1]})).texts == [text]


def test_labels_may_be_absent_only_on_request(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", {"text": ["a"], "score": ["x"]})
    assert read_text_data(path, require_labels=False).labels is None
    with pytest.raises(ValueError, match=r"column 'label' is missing.*\['text', 'score'\]") as error:
        read_text_data(path)
    assert str(path) in str(error.value)
    assert read_text_data(path, label="score", require_labels=False).label_names == ["x"]
    assert read_text_data(path, label=None).labels is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,1\n,0\n", "column 'text' has no value in row 2 .1 such"),
        ("a.csv", "text,label\na,1\nb,\n", "column 'label' has no value in row 2"),
        ("a.csv", "text,id,label\na,,1\nb,,2\n", "column 'id' has no value in row 1 .2 such"),
        ("a.tsv", "text\tlabel\na\t1\n\t0\n", "column 'text' has no value in row 2"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"label": 1}\n', "column 'text' has no value in row 2"),
        ("a.csv", "text,label\na,1\nb,nan\n", "finite numbers, got nan in row 2"),
        ("a.csv", "body,label\na,1\n", r"column 'text' is missing.*\['body', 'label'\]"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": NaN, "label": 1}\n', "column 'text' has no value in row 2"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": -Infinity}\n', "'label' has no value in row 2"),
        ("a.csv", "text,text,label\na,b,1\n", "column 'text' is there 2 times"),
        ("a.csv", "text,label\na,1,extra\n", "not readable as csv.*Expected 2 columns, got 3"),
        ("a.csv", 'label,text\n1,good\n0,"bad\n1,fine\n', "not readable as csv: up to line 4: unexpected end of data"),
        ("a.csv", 'text,label\n"bad,0\nso "so",1\n', "not readable as csv: up to line 3: ',' expected after '\"'"),
        ("a.csv", "text,label\n\udce9,1\n", "not readable as csv.*UTF8"),
        ("a.csv", "text,caf\udce9\na,1\n", r"names of columns in UTF-8, got b'caf\\xe9'"),
        ("a.tsv", "text\tcaf\udce9\na\t1\n", r"names of columns in UTF-8, got b'caf\\xe9'"),
        ("a.csv", "text,label\n", "the file is empty"),
        ("a.csv", "", "the file is empty"),
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "column 'text' must hold strings, got int64"),
        ("a.jsonl", '{"text": "a", "label": [1]}\n', "column 'label' must hold numbers or strings, got list"),
        (
            "a.jsonl",
            '{"text": "a", "id": [], "label": 1}\n',
            "'id' is not readable: expected a string or a number, got \\[\\]",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b"}\n{"text": "c", "label": "0"}\n',
            "column 'label' is not readable: .*; it holds int from row 1, str from row 3",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": 7, "label": 1}\n',
            "column 'text' is not readable: .*; it holds str from row 1, int from row 2",
        ),
        ("a.jsonl", '{"text": "a", "label": 100000000000000000000}\n', "column 'label' is not readable"),
        ("a.jsonl", '{"text": "a", "label": 1}\n\n{broken\n', "not readable as jsonl: line 3: Expecting property name"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "\udce9"}\n', "not readable as jsonl: line 2: 'utf-8'"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "not readable as jsonl: line 1: 'utf-8'"),
        ("a.jsonl", "[1]\n", "line 1: expected an object, got list"),
        ("a.parquet", "not parquet", "not readable as parquet"),
        ("a.txt", "text,label\na,1\n", r"expected a file that ends in \.csv, .*got '\.txt'"),
        ("a", "text,label\na,1\n", "got 'no suffix'"),
    ],
)
def test_bad_files_are_named_with_the_reason(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        read_text_data(path)
    assert str(path) in str(error.value)


def no_utf8(kind):
    return pa.array([b"good", b"\xff\xfe"]).cast(kind, safe=False)


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("text", no_utf8(pa.string()), "column 'text' is not readable: .*string index 1"),
        ("id", no_utf8(pa.large_string()), "column 'id' is not readable: .*string index 1"),
        ("label", no_utf8(pa.string()), "column 'label' is not readable: .*string index 1"),
        ("id", no_utf8(pa.binary()), "column 'id' must hold numbers or strings, got binary"),
        ("id", pa.array([[1], [2]]), "column 'id' must hold numbers or strings, got list"),
        ("id", pa.array([{"a": 1}, {"a": 2}]), "column 'id' must hold numbers or strings, got struct"),
    ],
)
def test_parquet_columns_that_are_no_text(tmp_path, name, column, message):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", "y"], "label": [0, 1]} | {name: column}), path)
    with pytest.raises(ValueError, match=message) as error:
        read_text_data(path)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_text_data(tmp_path / "a.csv")


def test_select_and_lengths():
    data = TextData(["a", "b", "c"], ["d", "e", "f"], [0, 1, 1], ["x", "y", "z"], ["no", "yes"])
    assert data.select([2, 0, 2]) == TextData(
        ["c", "a", "c"], ["f", "d", "f"], [1, 0, 1], ["z", "x", "z"], ["no", "yes"]
    )
    assert len(data.select(iter([1]))) == 1
    assert TextData(["a"], None, None, ["x"]).select([]) == TextData([], None, None, [])
    for broken in ({"text_pairs": ["d"]}, {"labels": [0]}, {"ids": ["x"]}):
        fields = {"text_pairs": None, "labels": None, "ids": ["x", "y"], **broken}
        with pytest.raises(ValueError, match=f"{next(iter(broken))}: expected 2 values, one per text, got 1"):
            TextData(texts=["a", "b"], **fields)


@given(st.lists(st.text()), st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any))
def test_split_is_a_partition_that_depends_on_ids_alone(ids, weights):
    fractions = [weight / sum(weights) for weight in weights]
    parts = split_by_hash(ids, fractions)
    assert len(parts) == len(fractions)
    assert sorted(i for part in parts for i in part) == list(range(len(ids)))
    assert all(part == sorted(part) for part in parts)
    home = {ids[i]: number for number, part in enumerate(parts) for i in part}
    # Equal ids are together, and reversing the rows or dropping half of them moves nobody.
    for other in (ids, ids[::-1], ids[::2]):
        again = split_by_hash(other, fractions)
        assert all(home[other[i]] == number for number, part in enumerate(again) for i in part)


def test_split_sizes_and_a_frozen_answer():
    ids = [str(i) for i in range(20_000)]
    parts = split_by_hash(ids)
    for part, fraction in zip(parts, (0.70, 0.15, 0.15), strict=True):
        assert abs(len(part) / len(ids) - fraction) < 0.01
    # Frozen: a change of the hash would quietly move test rows into training.
    assert split_by_hash(ids[:12]) == ([0, 1, 3, 4, 7, 8, 9, 10, 11], [2], [5, 6])
    assert split_by_hash(ids, (0.0, 1.0)) == ([], list(range(len(ids))))


def test_split_is_the_same_in_another_process():
    # Python's own hash() of strings is salted per process.
    code = "from ragged_exit.data import split_by_hash; print(split_by_hash([str(i) for i in range(50)]))"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(split_by_hash([str(i) for i in range(50)]))


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.5, -0.5), (float("nan"), 1.0)])
def test_split_refuses_fractions_that_are_none(fractions):
    with pytest.raises(ValueError, match="sum to 1"):
        split_by_hash(["a"], fractions)
