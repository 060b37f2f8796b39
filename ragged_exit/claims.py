"""Claims: a file that says which run a folder of unfinished work belongs to, so that only our own work is deleted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_CLAIM, _SCRATCH = "run.json", ".run.json"


def read_claim(folder: Path, keys: Iterable[str], name: str) -> dict[str, Any] | None:
    """The run that claims ``folder``, a dict of these ``keys``; None where the folder is absent or empty.

    Raises ValueError, naming the argument ``name``, for a folder with anything in it and no such claim: it is not ours.
    """
    if not folder.exists() or all(path.name == _SCRATCH for path in folder.iterdir()):
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


def write_json(path: Path, value: object) -> None:
    """Write so that ``path`` is there complete, or not at all."""
    scratch = path.with_name("." + path.name)
    scratch.write_text(json.dumps(value))
    scratch.replace(path)
