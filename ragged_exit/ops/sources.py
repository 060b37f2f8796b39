"""Which files the C++ extension is made of. setup.py runs this file by its path, so it imports nothing of ours."""

import hashlib
from glob import glob
from pathlib import Path


def sources(folder: str) -> list[str]:
    """What is compiled."""
    return sorted(glob(f"{folder}/*.cpp"))


def headers(folder: str) -> list[str]:
    """What those include."""
    return sorted(glob(f"{folder}/*.h"))


def digest(folder: str) -> str:
    """Of the names and contents of both: the extension says it as ``_native.sources``."""
    found = hashlib.sha256()
    for path in map(Path, sources(folder) + headers(folder)):
        found.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return found.hexdigest()
