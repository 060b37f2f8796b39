"""Claims: which run a folder of unfinished work belongs to, which process is at work there, and how the run ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_CLAIM, _SCRATCH, _OUTCOME, _LOCK = "run.json", ".run.json", "outcome.json", ".lock"


def read_claim(folder: Path, keys: Iterable[str], name: str) -> dict[str, Any] | None:
    """The run that claims ``folder``, a dict of these ``keys``; None where the folder is absent or empty.

    Raises ValueError, naming the argument ``name``, for a folder with anything in it and no such claim: it is not ours.
    """
    if not folder.exists() or all(path.name in (_SCRATCH, _LOCK) for path in folder.iterdir()):
        return None
    try:
        found = json.loads((folder / _CLAIM).read_text())
    except (FileNotFoundError, ValueError):
        found = None
    if not isinstance(found, dict) or found.keys() != set(keys):
        raise ValueError(f"{name}: the folder {folder} holds files that are no unfinished run; move or delete it first")
    return found


def write_claim(folder: Path, run: dict[str, Any]) -> None:
    """Claim ``folder``, new or not, for ``run``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _CLAIM, run)


@contextmanager
def only_process(folder: Path, keys: Iterable[str], name: str) -> Iterator[None]:
    """Nobody else is within this for ``folder``, which is made where it is not there, and goes if nothing comes in.

    Raises ValueError, naming the argument ``name``, where another process is, or for what ``read_claim`` refuses.
    """
    read_claim(folder, keys, name)  # nothing is written into a folder that is not ours
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / _LOCK, blocking=False):
            try:
                yield
            finally:
                if folder.exists() and [path.name for path in folder.iterdir()] == [_LOCK]:
                    shutil.rmtree(folder)
    except Timeout:
        raise ValueError(f"{name}: another process is at work in {folder}") from None


def end_claim(folder: Path, outcome: Any) -> None:
    """The run that claims ``folder`` is over: delete it. Where that is cut short, ``read_outcome`` knows ``outcome``.

    outcome: any JSON value but None. The claim goes last, so that the folder stays ours.
    """
    write_json(folder / _OUTCOME, outcome)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (_CLAIM, _OUTCOME, _LOCK):
            path.unlink()
    (folder / _OUTCOME).unlink()
    (folder / _CLAIM).unlink()
    shutil.rmtree(folder)


def read_outcome(folder: Path) -> Any:
    """What the run that claims ``folder`` (see ``read_claim``) came to, where it is over and still there; else None."""
    outcome = folder / _OUTCOME
    return json.loads(outcome.read_text()) if outcome.is_file() else None


def write_json(path: Path, value: object) -> None:
    """Write so that ``path`` is there complete, or not at all."""
    scratch = path.with_name("." + path.name)
    scratch.write_text(json.dumps(value))
    scratch.replace(path)
