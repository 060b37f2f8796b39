"""A table of any size as shards on disk: split in order, one file written at a time and whole, joined in order."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet

from ragged_exit.data import SUFFIXES, as_written, check_quotes, csv_options, header, json_lines, text_columns

SHARD_ROWS = 4096
SHARD_BYTES = 1 << 26  # of long texts fewer rows, so that memory stays flat
_LARGEST_BLOCK = 2**31 - 1
_TSV_BREAKS = re.compile(r"[\t\r\n]")


class _RowTooLong(Exception):
    """A row does not fit into one of the reader's blocks."""


def write_whole(path: Path, table: pa.Table) -> None:
    """Write parquet so that ``path`` is there complete, or not at all, whenever the process dies."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    pa.parquet.write_table(table, scratch)
    _publish(scratch, path)


def split(source: Path, folder: Path, text: str, text2: str | None, *, shard_rows: int = SHARD_ROWS) -> list[Path]:
    """Write the rows of ``source`` to ``folder`` as shards with the columns id, text[, text2]; their paths in order.

    Reads a block at a time. id is the column of that name, else the row's position. Texts and ids stay as they are
    written; what is no text (a list or object in jsonl, bytes that are not UTF-8 in parquet) is null. Raises ValueError
    for a column that is not there, or a file that cannot be read.
    """
    if source.suffix.lower() == ".csv":
        check_quotes(source)
    block_size = 1 << 20
    while True:
        try:
            return _split(_numbered(_read(source, text, text2, block_size)), folder, shard_rows)
        except _RowTooLong:  # begin again: the same files are written
            block_size = min(4 * block_size, _LARGEST_BLOCK)


def _split(batches: Iterable[pa.RecordBatch], folder: Path, shard_rows: int) -> list[Path]:
    paths: list[Path] = []
    waiting: list[pa.RecordBatch] = []
    count = size = 0

    def flush(rows: int) -> None:
        nonlocal waiting, count, size
        table = pa.Table.from_batches(waiting)
        paths.append(folder / f"in-{len(paths):06d}.parquet")
        write_whole(paths[-1], table.slice(0, rows).combine_chunks())
        rest = table.slice(rows)
        waiting, count, size = rest.to_batches(), len(rest), rest.nbytes

    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        size += batch.nbytes
        while count >= shard_rows:
            flush(shard_rows)
        if size >= SHARD_BYTES:
            flush(count)
    if count:
        flush(count)
    return paths


def join(parts: Iterable[Path], out: Path, folder: Path) -> None:
    """Write the shards ``parts``, in their order, to one .parquet, .jsonl, .csv or .tsv file, whole or not at all.

    folder: on the same disk, where what is not whole yet lies.
    In a .tsv a tab or line break inside a cell becomes a space; see ``check_tsv_ids``.
    """
    scratch = folder / "whole"  # no shard's name, whatever out is called
    tables = (pa.parquet.read_table(part) for part in parts)
    writers = {".parquet": _write_parquet, ".jsonl": _write_jsonl, ".csv": _write_csv, ".tsv": _write_tsv}
    writers[out.suffix.lower()](tables, scratch)
    _publish(scratch, out)


def check_tsv_ids(shards: Iterable[Path]) -> None:
    """Raise ValueError for an id that a .tsv cannot hold: there is no way to write it that reads back."""
    for shard in shards:
        for cell in pa.parquet.read_table(shard, columns=["id"]).column("id").to_pylist():
            if cell is not None and (not cell or _TSV_BREAKS.search(cell)):
                raise ValueError(f"out: a .tsv cannot hold the id {cell!r}; write a .csv, .jsonl or .parquet")


def check_suffix(path: Path, name: str) -> None:
    """Raise ValueError, naming the argument, unless it is a table's file name."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name}: expected a file that ends in {', '.join(SUFFIXES)}, got {path}")


def _publish(scratch: Path, path: Path) -> None:
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)


def _read(source: Path, text: str, text2: str | None, block_size: int) -> Iterator[pa.RecordBatch]:
    """Batches of the columns text[, text2][, id], as strings."""
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    try:
        yield from readers.get(source.suffix.lower(), _read_csv)(source, text, text2, block_size)
    except (pa.ArrowException, OSError) as error:
        if "straddling object" in str(error) and block_size < _LARGEST_BLOCK:
            raise _RowTooLong from error
        raise ValueError(f"{source}: not readable: {error}") from error


def _read_csv(source: Path, text: str, text2: str | None, block_size: int) -> Iterator[pa.RecordBatch]:
    """A .csv or .tsv: columns of texts stay texts."""

    def table(strings: Iterable[str]) -> pa.dataset.Dataset:
        options = csv_options(source.suffix.lower(), strings)
        reading = pa.csv.ReadOptions(block_size=block_size)
        return pa.dataset.dataset(source, format=pa.dataset.CsvFileFormat(read_options=reading, **options))

    columns = _columns(source, header(source, table(()).schema), text, text2)
    wanted = {name: pa.dataset.field(column) for name, column in columns.items()}
    for batch in table(columns.values()).to_batches(columns=wanted):
        yield pa.record_batch({name: _strings(name, batch.column(name)) for name in columns})


def _read_parquet(source: Path, text: str, text2: str | None, block_size: int) -> Iterator[pa.RecordBatch]:
    """A few rows at a time, whatever the row groups: Arrow's datasets would read gigabytes ahead."""
    file = pa.parquet.ParquetFile(source)
    columns = _columns(source, header(source, file.schema_arrow), text, text2)
    for batch in file.iter_batches(batch_size=SHARD_ROWS, columns=list(columns.values())):
        yield pa.record_batch({name: _strings(name, batch.column(column)) for name, column in columns.items()})


def _strings(name: str, cells: pa.Array) -> pa.Array:
    """As strings. Bytes that are not UTF-8 are null in a text; in an id they raise ArrowInvalid, and lists anywhere."""
    try:
        strings = cells.cast(pa.string())
        strings.validate(full=True)  # Arrow reads strings from parquet without a look at them
        return strings
    except pa.ArrowException as error:
        if name == "id" or not isinstance(error, pa.ArrowInvalid):
            raise pa.ArrowInvalid(f"column {name!r}: {error}") from error
        return pa.array([_decoded(cell) for cell in cells.cast(pa.binary()).to_pylist()], pa.string())


def _decoded(cell: bytes | None) -> str | None:
    try:
        return None if cell is None else cell.decode()
    except UnicodeDecodeError:
        return None


def _read_jsonl(source: Path, text: str, text2: str | None, block_size: int) -> Iterator[pa.RecordBatch]:
    """In two passes: a field that only later lines have is a column, too."""
    names = list(dict.fromkeys(name for _, row in json_lines(source) for name in row))
    if not names:
        return
    columns = _columns(source, names, text, text2)
    rows: list[list[str | None]] = []
    size = 0
    for _, row in json_lines(source, parse_int=str, parse_float=str):
        rows.append([_cell(name, row.get(column)) for name, column in columns.items()])
        size += sum(len(cell or "") for cell in rows[-1])
        if size >= block_size or len(rows) == SHARD_ROWS:
            yield _batch(columns, rows)
            rows, size = [], 0
    if rows:
        yield _batch(columns, rows)


def _cell(name: str, value: Any) -> str | None:
    """A text that is a list or an object is null; such an id raises ArrowTypeError."""
    return None if name != "id" and isinstance(value, list | dict) else as_written(value)


def _batch(names: Iterable[str], rows: list[list[str | None]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    return pa.record_batch({name: pa.array(cells, pa.string()) for name, cells in zip(names, columns, strict=True)})


def _columns(source: Path, names: Sequence[str], text: str, text2: str | None) -> dict[str, str]:
    """The names that the columns have in ``source``, by the names that they have in shards."""
    text, text2 = text_columns(names, text, text2)
    columns = {"text": text} | ({} if text2 is None else {"text2": text2}) | ({"id": "id"} if "id" in names else {})
    for column in columns.values():
        if names.count(column) != 1:
            problem = "no column" if column not in names else "more than one column"
            raise ValueError(f"{source}: {problem} {column!r}; the file has the columns {names}")
    return columns


def _numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Rows without ids get their position."""
    start = 0
    for batch in batches:
        if "id" not in batch.schema.names:
            ids = pa.array([str(row) for row in range(start, start + len(batch))])
            batch = batch.append_column("id", ids)
        start += len(batch)
        yield batch


def _write_parquet(tables: Iterable[pa.Table], path: Path) -> None:
    writer = None
    for table in tables:
        writer = writer or pa.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _write_jsonl(tables: Iterable[pa.Table], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for table in tables:
            rows = ({name: _json_value(value) for name, value in row.items()} for row in table.to_pylist())
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _json_value(value: Any) -> Any:
    """A score that is no number is null: JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_csv(tables: Iterable[pa.Table], path: Path) -> None:
    writer = None
    for table in tables:
        flat = _flat(table)
        writer = writer or pa.csv.CSVWriter(path, flat.schema)
        writer.write_table(flat)
    if writer is not None:
        writer.close()


def _write_tsv(tables: Iterable[pa.Table], path: Path) -> None:
    """Without quotes, which are ordinary text in a .tsv; Arrow's writer refuses cells that hold one."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, table in enumerate(tables):
            if number == 0:
                file.write("\t".join(table.column_names) + "\n")
            columns = [column.cast(pa.string()).to_pylist() for column in _flat(table).columns]
            file.writelines("\t".join(map(_tsv_cell, row)) + "\n" for row in zip(*columns, strict=True))


def _tsv_cell(cell: str | None) -> str:
    return "" if cell is None else _TSV_BREAKS.sub(" ", cell)


def _flat(table: pa.Table) -> pa.Table:
    """Lists as JSON text: a cell holds one value."""
    for index, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            cells = [None if value is None else json.dumps(value) for value in table.column(index).to_pylist()]
            table = table.set_column(index, field.name, pa.array(cells, pa.string()))
    return table
