"""Labelled text: what a table on disk becomes, and how its rows are split.

Nothing here knows a model: texts stay strings, labels become integers (classification) or floats (regression).
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")

# The column of first texts, tried in this order when the caller keeps the default, and the column that is its partner.
_PARTNER = {"text": "text2", "sentence": "sentence2", "text1": "text2", "sentence1": "sentence2"}
_ID = "id"
_LONGEST_CELL = 2**31 - 1  # as Arrow's


@dataclass(frozen=True)
class TextData:
    """Rows of text, or of text pairs, with or without labels.

    texts: one string a row.
    text_pairs: the second string of each row, or None for single texts.
    labels: integers are classes, floats are regression targets, None is unlabelled.
    ids: one string a row; what `split_by_hash` hashes and what results are reported under.
    label_names: class names, `label_names[label]`; None where the labels came as integers or are not classes.

    Raises ValueError if the lists differ in length.
    """

    texts: list[str]
    text_pairs: list[str] | None
    labels: list[int] | list[float] | None
    ids: list[str]
    label_names: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("text_pairs", "labels", "ids"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.texts):
                raise ValueError(f"{name}: expected {len(self.texts)} values, one per text, got {len(values)}")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def is_regression(self) -> bool:
        """Whether the labels are floats."""
        return self.labels is not None and any(isinstance(label, float) for label in self.labels[:1])

    def select(self, indices: Iterable[int]) -> TextData:
        """The rows at `indices`, in that order; repeats are allowed. IndexError past the end."""
        indices = list(indices)

        def pick(values):
            return None if values is None else [values[i] for i in indices]

        return TextData(pick(self.texts), pick(self.text_pairs), pick(self.labels), pick(self.ids), self.label_names)


def read_text_data(
    path: str | Path,
    text: str = "text",
    text2: str | None = None,
    label: str | None = "label",
    require_labels: bool = True,
    label_names: Sequence[str] | None = None,
) -> TextData:
    """Reads a .csv, .tsv, .jsonl or .parquet file with a header (or field names) into `TextData`.

    text: column of the texts. If it is the default and missing, the first of `sentence`, `text1`, `sentence1` is taken.
    text2: column of the second texts of pairs. None: the partner of the text column (`sentence2` of `sentence` and
        `sentence1`, `text2` of any other), if it is present and another column.
    label: integers are kept as they are; floats are regression targets, unless every one is a whole number, then
        they are classes too; strings and booleans become indices into their sorted distinct values (`label_names`),
        unless every string is a number, then they are those numbers, in every format. None: labels are not read.
    require_labels: False lets the label column be absent (`labels=None`).
    label_names: the classes that there are, as another file or a checkpoint has them: named labels become indices into
        these, and whole numbers that are not all among the names stay as they are. Empty: only numbers are labels.

    Row ids are the column `id` if there is one, else the row's position ("0", "1", …). In a .tsv quote characters are
    ordinary text. In .csv and .tsv an empty cell is null (in a .csv `""` is the empty string), and nothing else is:
    `NA` is a word. Texts, ids and string labels stay as they are written, whatever they look like.

    Raises ValueError, naming the file, for an unknown suffix, an unreadable or empty file, a missing or repeated
    column, a column of the wrong type, a name that `label_names` does not have, and a null cell (rows are counted
    from 1); FileNotFoundError without a file.
    """
    path = Path(path)
    table = _read_table(path, {*_PARTNER, *_PARTNER.values(), text, text2 or text, label or text, _ID})
    if table.num_rows == 0:
        raise ValueError(f"{path}: the file is empty, expected at least one row")
    names = header(path, table.schema)
    text, text2 = text_columns(names, text, text2)

    labels, names_found = None, None
    if label is not None and (require_labels or label in names):
        labels, names_found = _labels(path, label, _column(path, table, label), label_names)
    ids = _written(path, _ID, _column(path, table, _ID)) if _ID in names else map(str, range(table.num_rows))
    return TextData(
        texts=_strings(path, table, text),
        text_pairs=None if text2 is None else _strings(path, table, text2),
        labels=labels,
        ids=list(ids),
        label_names=names_found,
    )


def header(path: Path, schema: pa.Schema) -> list[str]:
    """The columns' names. Raises ValueError for one that is no UTF-8, which Arrow reads without a look at it."""
    try:
        return schema.names
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected names of columns in UTF-8, got {error.object!r:.80}") from error


def text_columns(names: Sequence[str], text: str = "text", text2: str | None = None) -> tuple[str, str | None]:
    """The columns of the texts and of their partners (or None) among ``names``, as `read_text_data` chooses them."""
    if text == "text" and text not in names:
        text = next((name for name in _PARTNER if name in names), text)
    if text2 is None and (partner := _PARTNER.get(text, "text2")) in names and partner != text:
        text2 = partner
    return text, text2


def count_outputs(data: TextData, rows: int) -> int:
    """How many outputs a model of these labels has: 1 for a regression, else a class for every name or number.

    Raises ValueError for labels of fewer than 2 classes, negative ones, and more classes than ``rows`` to learn from:
    large numbers are ids or targets, no classes.
    """
    if data.is_regression:
        return 1
    labels = [int(label) for label in data.labels or ()]
    if len(set(labels)) < 2:
        raise ValueError(f"label: expected at least 2 classes, got {sorted(set(labels))}")
    count = max(labels) + 1 if data.label_names is None else len(data.label_names)
    if min(labels) < 0:
        raise ValueError(f"label: expected classes from 0 on, got {min(labels)}")
    if count > rows:
        raise ValueError(f"label: expected at most one class for every training row, {rows}, got {count} classes")
    return count


def split_by_hash(ids: Iterable[str], fractions: Sequence[float] = (0.70, 0.15, 0.15)) -> tuple[list[int], ...]:
    """Splits rows by a hash of their id: one list of row indices per fraction, each in increasing order.

    Where a row goes depends on its id alone, not on its place, its neighbours, the platform or a seed, so a file that
    is shuffled or grows keeps its split. Equal ids stay together. The sizes are the fractions only on average.

    Raises ValueError unless the fractions are non-negative and sum to 1.
    """
    if not fractions or min(fractions) < 0 or not math.isclose(math.fsum(fractions), 1.0, abs_tol=1e-9):
        raise ValueError(f"fractions: expected non-negative numbers that sum to 1, got {tuple(fractions)}")
    bounds = list(accumulate(fractions))[:-1]  # the last part takes the rest, so rounding loses no row
    parts: tuple[list[int], ...] = tuple([] for _ in fractions)
    for index, row_id in enumerate(ids):
        digest = hashlib.sha256(row_id.encode()).digest()
        position = (int.from_bytes(digest[:8]) >> 11) / 2**53  # 53 bits: exact as a float, and always below 1
        parts[bisect_right(bounds, position)].append(index)
    return parts


def json_lines(path: Path, **options: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every object of a .jsonl file with its line, counted from 1; blank lines are skipped. options: JSONDecoder's.

    NaN and Infinity, which JSON does not have and others write for a missing value, are null. Arrow's reader would
    turn strings that look like dates into dates, and large integers into floats. Raises ValueError, naming file and
    line, for a line that is no object.
    """
    decode = json.JSONDecoder(parse_constant=lambda constant: None, **options).decode
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _json_object(decode, line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        problem = getattr(error, "msg", error)  # without the position that json adds: it has a line number, too
        raise ValueError(f"{path}: not readable as jsonl: line {number}: {problem}") from error


def _json_object(decode: Callable[[str], Any], line: str) -> dict[str, Any]:
    row = decode(line)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    if "\\u" in line:
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    return row


def as_written(value: Any) -> str | None:
    """A JSON value's text; null stays None. Raises ArrowTypeError for lists and objects."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | dict):
        raise pa.ArrowTypeError(f"expected a string or a number, got {value!r:.80}")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_table(path: Path, wanted: set[str]) -> pa.Table:
    """The columns ``wanted`` as they are written; of the others the names are right."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}, got {suffix or 'no suffix'!r}")
    # One block: pyarrow guesses a column's type from the first block only, and a row must fit into one.
    block_size = min(max(path.stat().st_size, 1), 2**31 - 1)
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty, expected at least one row")
    try:
        if suffix == ".parquet":
            return pa.parquet.read_table(path)
        if suffix == ".jsonl":
            return _read_jsonl(path, wanted)
        if suffix == ".csv":
            check_quotes(path)
        return pa.csv.read_csv(
            path, read_options=pa.csv.ReadOptions(block_size=block_size), **csv_options(suffix, wanted)
        )
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not readable as {suffix[1:]}: {error}") from error


def check_quotes(path: Path) -> None:
    """Raise ValueError for a .csv with a quote that does not close: Arrow would take all that follows for one cell."""
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        # what is no UTF-8 Arrow says
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file, strict=True)
            for _ in rows:
                pass
    except csv.Error as error:
        raise ValueError(f"{path}: not readable as csv: up to line {rows.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def csv_options(suffix: str, strings: Iterable[str]) -> dict[str, Any]:
    """How pyarrow reads a .csv or .tsv; the columns ``strings`` stay text, even what looks like numbers or dates."""
    quoting: dict[str, Any] = (
        {"delimiter": "\t", "quote_char": False} if suffix == ".tsv" else {"newlines_in_values": True}
    )
    return {
        "parse_options": pa.csv.ParseOptions(**quoting),
        "convert_options": pa.csv.ConvertOptions(
            column_types=dict.fromkeys(strings, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    }


def _read_jsonl(path: Path, wanted: set[str]) -> pa.Table:
    rows = [row for _, row in json_lines(path)]

    def column(name: str) -> Any:
        if name not in wanted:
            return pa.nulls(len(rows))
        values = [row.get(name) for row in rows]
        try:
            return pa.array([as_written(value) for value in values], pa.string()) if name == _ID else pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            raise ValueError(f"{path}: column {name!r} is not readable: {error}; {_first_of_types(values)}") from error

    return pa.table({name: column(name) for name in dict.fromkeys(name for row in rows for name in row)})


def _first_of_types(values: list[Any]) -> str:
    """Where each of its JSON types is first: what does not belong into a column is mostly of another type."""
    rows: dict[str, int] = {}
    for row, value in enumerate(values, start=1):
        if value is not None:
            rows.setdefault(type(value).__name__, row)
    return "it holds " + ", ".join(f"{kind} from row {row}" for kind, row in rows.items())


def _column(path: Path, table: pa.Table, name: str) -> pa.ChunkedArray:
    """The column, free of nulls and of what is no UTF-8."""
    count = table.column_names.count(name)
    if count != 1:
        problem = "missing" if count == 0 else f"there {count} times"
        raise ValueError(f"{path}: column {name!r} is {problem}; the file has the columns {table.column_names}")
    column = table.column(name)
    if column.null_count:
        row = column.is_null().index(True).as_py() + 1
        raise ValueError(f"{path}: column {name!r} has no value in row {row} ({column.null_count} such rows in all)")
    try:
        column.validate(full=True)  # Arrow reads strings from parquet without a look at them
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: column {name!r} is not readable: {error}") from error
    return column


def _strings(path: Path, table: pa.Table, name: str) -> list[str]:
    column = _column(path, table, name)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not _is_text(kind):
        raise ValueError(f"{path}: column {name!r} must hold strings, got {kind}")
    return column.to_pylist()


def _labels(
    path: Path, name: str, column: pa.ChunkedArray, known: Sequence[str] | None
) -> tuple[list[int] | list[float], list[str] | None]:
    """Labels and, where the classes have names, those."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    written = None if _is_real(column) else _written(path, name, column)
    if known and written is not None and set(written) <= set(known):
        return _indices(written, known), list(known)
    if _is_text(column.type):
        column = _numbers_if_all_are(column.cast(pa.string()))
    if pa.types.is_integer(column.type):
        return column.to_pylist(), None
    if _is_real(column):
        values = [float(value) for value in column.to_pylist()]
        row = next((i for i, value in enumerate(values, start=1) if not math.isfinite(value)), None)
        if row is not None:
            raise ValueError(f"{path}: column {name!r} must hold finite numbers, got {values[row - 1]} in row {row}")
        if all(value.is_integer() and abs(value) < 2**63 for value in values):
            return [int(value) for value in values], None
        return values, None
    assert written is not None
    if known is not None:
        row, text = next((i, text) for i, text in enumerate(written, start=1) if text not in known)
        names = ", ".join(known) or "none, labels are numbers"
        raise ValueError(f"{path}: column {name!r} has the unknown class {text!r} in row {row}; known classes: {names}")
    classes = sorted(set(written))
    return _indices(written, classes), classes


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_real(column: pa.ChunkedArray) -> bool:
    return pa.types.is_floating(column.type) or pa.types.is_decimal(column.type)


def _written(path: Path, name: str, column: pa.ChunkedArray) -> list[str]:
    try:
        return column.cast(pa.string()).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: column {name!r} must hold numbers or strings, got {column.type}") from error


def _indices(values: Sequence[str], classes: Sequence[str]) -> list[int]:
    index = {value: i for i, value in enumerate(classes)}
    return [index[value] for value in values]


def _numbers_if_all_are(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cells of text as integers, else as floats, else as they are."""
    for kind in (pa.int64(), pa.float64()):
        try:
            return pa.compute.utf8_trim_whitespace(column).cast(kind)
        except pa.ArrowInvalid:
            continue
    return column
