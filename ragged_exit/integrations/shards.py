"""A table of any size as shards on disk: split in order, one file written at a time and whole, joined in order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.json
import pyarrow.parquet

from ragged_exit.data import SUFFIXES, text_columns

SHARD_ROWS = 4096


def write_whole(path: Path, table: pa.Table) -> None:
    """Write parquet so that ``path`` is there complete, or not at all, whenever the process dies."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    pa.parquet.write_table(table, scratch)
    _publish(scratch, path)


def split(source: Path, folder: Path, text: str, text2: str | None, *, shard_rows: int = SHARD_ROWS) -> list[Path]:
    """Write the rows of ``source`` to ``folder`` as shards with the columns id, text[, text2]; their paths in order.

    Reads a block at a time. id is the column of that name, else the row's position. Raises ValueError for a column
    that is not there, or a file that cannot be read.
    """
    paths: list[Path] = []
    waiting: list[pa.RecordBatch] = []
    count = 0

    def flush(rows: int) -> None:
        nonlocal waiting, count
        table = pa.Table.from_batches(waiting)
        paths.append(folder / f"in-{len(paths):06d}.parquet")
        write_whole(paths[-1], table.slice(0, rows).combine_chunks())
        rest = table.slice(rows)
        waiting, count = rest.to_batches(), len(rest)

    for batch in _numbered(_read(source, text, text2)):
        waiting.append(batch)
        count += len(batch)
        while count >= shard_rows:
            flush(shard_rows)
    if count:
        flush(count)
    return paths


def join(parts: Iterable[Path], out: Path) -> None:
    """Write the shards ``parts``, in their order, to one .parquet, .jsonl, .csv or .tsv file, whole or not at all."""
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    tables = (pa.parquet.read_table(part) for part in parts)
    writers = {".parquet": _write_parquet, ".jsonl": _write_jsonl, ".csv": _write_csv, ".tsv": _write_tsv}
    writers[out.suffix.lower()](tables, scratch)
    _publish(scratch, out)


def check_suffix(path: Path, name: str) -> None:
    """Raise ValueError, naming the argument, unless it is a table's file name."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name}: expected a file that ends in {', '.join(SUFFIXES)}, got {path}")


def _publish(scratch: Path, path: Path) -> None:
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)


def _read(source: Path, text: str, text2: str | None) -> Iterator[pa.RecordBatch]:
    """Batches of the columns text[, text2][, id], as strings."""
    try:
        names = pa.dataset.dataset(source, format=_format(source, ())).schema.names
        text, text2 = text_columns(names, text, text2)
        columns = {"text": text} | ({} if text2 is None else {"text2": text2}) | ({"id": "id"} if "id" in names else {})
        missing = [column for column in columns.values() if column not in names]
        if missing:
            raise ValueError(f"{source}: no column {missing[0]!r}; the file has the columns {names}")
        table = pa.dataset.dataset(source, format=_format(source, columns.values()))
        wanted = {name: pa.dataset.field(column).cast(pa.string()) for name, column in columns.items()}
        yield from table.to_batches(columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{source}: not readable: {error}") from error


def _format(source: Path, strings: Iterable[str]) -> Any:
    """How to read ``source``; the columns ``strings`` stay text even where they look like numbers or dates."""
    suffix = source.suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    types = dict.fromkeys(strings, pa.string())
    if suffix == ".jsonl":
        explicit = pa.schema(types) if types else None
        return pa.dataset.JsonFileFormat(default_fragment_scan_options=pa.dataset.JsonFragmentScanOptions(
            parse_options=pa.json.ParseOptions(explicit_schema=explicit)))  # fmt: skip
    quoting: dict[str, Any] = (
        {"delimiter": "\t", "quote_char": False} if suffix == ".tsv" else {"newlines_in_values": True}
    )
    return pa.dataset.CsvFileFormat(
        parse_options=pa.csv.ParseOptions(**quoting),
        convert_options=pa.csv.ConvertOptions(
            column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
        ),
    )


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
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())


def _write_csv(tables: Iterable[pa.Table], path: Path, delimiter: str = ",") -> None:
    writer = None
    for table in tables:
        flat = _flat(table)
        writer = writer or pa.csv.CSVWriter(path, flat.schema, write_options=pa.csv.WriteOptions(delimiter=delimiter))
        writer.write_table(flat)
    if writer is not None:
        writer.close()


def _write_tsv(tables: Iterable[pa.Table], path: Path) -> None:
    _write_csv(tables, path, "\t")


def _flat(table: pa.Table) -> pa.Table:
    """Lists as JSON text: a cell holds one value."""
    for index, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            cells = [None if value is None else json.dumps(value) for value in table.column(index).to_pylist()]
            table = table.set_column(index, field.name, pa.array(cells, pa.string()))
    return table
