"""Score a file of any size: split into shards, answer each once, join. A run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from ragged_exit.claims import end_claim, only_process, read_claim, read_outcome, write_claim, write_json
from ragged_exit.integrations.scorer import ScoreOptions, Scorer
from ragged_exit.integrations.shards import check_suffix, check_tsv_ids, join, split, write_whole

_LISTING = "shards.json"
Engine = Callable[[ScoreOptions, Sequence["Shard"]], Iterator[int]]


class Shard(NamedTuple):
    """Where a shard's texts lie, and where its answers go."""

    source: str
    target: str


class Scored(NamedTuple):
    """rows in all, and how many of them have an error."""

    rows: int
    errors: int


def score_shard(scorer: Scorer, shard: Shard) -> int:
    """Answer one shard; its rows. Doing it twice writes the same file twice."""
    table = scorer.score(pa.parquet.read_table(shard.source))
    write_whole(Path(shard.target), table)
    return len(table)


def score_locally(options: ScoreOptions, shards: Sequence[Shard]) -> Iterator[int]:
    """The local engine: one after the other, in this process."""
    scorer = Scorer(options)
    for shard in shards:
        yield score_shard(scorer, shard)


def score_file(
    options: ScoreOptions,
    source: Path,
    out: Path,
    *,
    text: str = "text",
    text2: str | None = None,
    engine: Engine = score_locally,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> Scored:
    """Answer every row of ``source`` (csv, tsv, jsonl, parquet) in ``out``, in input order.

    What is done lies in the folder ``<out>.parts`` until ``out`` is complete: call again after a kill with the same
    arguments and the missing shards are answered, no row is lost or repeated, and ``out`` is what an uninterrupted run
    writes. on_rows: told (rows done, rows in all) as shards finish.

    Raises ValueError for file names that are no table's, unreadable input, ids that a .tsv cannot hold (empty, or with
    a tab or line break), an ``out`` that is there already, a folder of that name with anything else in it, answers of a
    run with other arguments there, or another process that is at work there; FileNotFoundError without an input.
    """
    check_suffix(source, "in")
    check_suffix(out, "out")
    if not source.is_file():
        raise FileNotFoundError(f"in: no file {source}")
    source, out = source.resolve(), out.resolve()  # workers have working directories of their own
    if Path(options.model).exists():
        options = replace(options, model=str(Path(options.model).resolve()))
    folder = out.with_name(out.name + ".parts")
    run = _description(options, source, text, text2)
    with only_process(folder, run, "out"):
        _claim(folder, out, run)
        if (scored := read_outcome(folder)) is None:
            scored = _score(options, source, out, folder, text, text2, engine, on_rows)
        end_claim(folder, scored)
    return Scored(*scored)


def _score(
    options: ScoreOptions,
    source: Path,
    out: Path,
    folder: Path,
    text: str,
    text2: str | None,
    engine: Engine,
    on_rows: Callable[[int, int], None],
) -> Scored:
    """``score_file`` where ``folder`` is ours."""
    sources = _split_once(source, folder, text, text2)
    if out.suffix.lower() == ".tsv":
        check_tsv_ids(sources)
    shards = [Shard(str(path), str(path.with_name("out" + path.name[2:]))) for path in sources]
    total = sum(_rows_of(shard.source) for shard in shards)
    missing = [shard for shard in shards if not Path(shard.target).is_file()]
    done = total - sum(_rows_of(shard.source) for shard in missing)
    on_rows(done, total)
    for rows in engine(options, missing) if missing else ():
        done += rows
        on_rows(done, total)
    join((Path(shard.target) for shard in shards), out, folder)
    return Scored(total, sum(_errors_of(shard.target) for shard in shards))


def _description(options: ScoreOptions, source: Path, text: str, text2: str | None) -> dict[str, Any]:
    """All that decides the answers, as JSON."""
    stat = source.stat()
    weights = [[path.name, _digest(path)] for path in sorted(Path(options.model).glob("*")) if path.is_file()]
    return {
        "options": options.as_dict(),
        "model": weights,
        "in": [str(source), stat.st_size, stat.st_mtime_ns],
        "columns": [text, text2],
    }


def _claim(folder: Path, out: Path, run: dict[str, Any]) -> None:
    """Claim ``folder`` for this run, unless another run has answers there: one that answered nothing is in no way."""
    found = read_claim(folder, run, "out")
    if found == run:
        return
    if out.exists():
        raise ValueError(f"out: {out} is there already; delete it or give another name")
    if found is not None and (any(folder.glob("out-*.parquet")) or read_outcome(folder) is not None):
        raise ValueError(f"out: {folder} holds parts of a run with another model, input or options; delete it first")
    (folder / _LISTING).unlink(missing_ok=True)
    write_claim(folder, run)


def _split_once(source: Path, folder: Path, text: str, text2: str | None) -> list[Path]:
    listing = folder / _LISTING
    if not listing.is_file():  # a split that was cut short starts again: it writes the same files
        paths = split(source, folder, text, text2)
        if not paths:
            raise ValueError(f"in: {source} has no rows")
        write_json(listing, [path.name for path in paths])
    return [folder / name for name in json.loads(listing.read_text())]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rows_of(path: str) -> int:
    return pa.parquet.read_metadata(path).num_rows


def _errors_of(path: str) -> int:
    errors = pa.parquet.read_table(path, columns=["error"]).column("error")
    return len(errors) - errors.null_count
