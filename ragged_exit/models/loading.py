"""rx.load: a checkpoint directory in, the right model out - ours, or the published layouts by their keys."""

from __future__ import annotations

import re
from pathlib import Path

# each import registers a system and its published layouts: a new system is a line here
from ragged_exit.models import berxit, cascade, de3bert, deebert, elasticbert, fastbert, full_depth, pabee  # noqa: F401
from ragged_exit.models.base import EarlyExitModel, read_own
from ragged_exit.models.checkpoint import load_strictly, read_config, read_state
from ragged_exit.models.published import detect_layout, rename_keys, with_architecture

NOT_SUPPORTED = {"GPFEE": r"pred_layer\.", "ConsistentEE": r"Policy_network\."}


def load(directory: str | Path, *, dialect: str | None = None) -> EarlyExitModel:
    """Load a checkpoint directory: ``config.json`` beside ``model.safetensors`` or ``pytorch_model.bin``.

    The system comes from config.json's ``early_exit`` section, or for published files from their keys; these get the
    original code's behaviour, with the entropy formula of ``dialect`` ("hf", the default, or "castorini").

    Raises FileNotFoundError for a file that is not there, ValueError for a file that is broken, an unknown system or
    layout, for missing or unexpected keys (all listed), and for a ``dialect`` where the checkpoint has its own rule.
    """
    path = Path(directory)
    saved = read_config(path)
    if saved.get("early_exit") is not None:
        if dialect is not None:
            raise ValueError(f"dialect: expected None for {path}, whose config.json holds its rule, got {dialect!r}")
        return read_own(path, saved)
    state = read_state(path)
    layout = detect_layout(state)
    if layout is None:
        for system, pattern in NOT_SUPPORTED.items():
            if any(re.search(pattern, name) for name in state):
                raise ValueError(f"{path}: the keys are those of {system}, which is not among the systems here")
        raise ValueError(f"{path}: no early_exit section in config.json, and the keys fit no published layout")
    renamed = rename_keys(state, layout.renames)
    try:
        model = layout.build(with_architecture(saved, state), renamed, dialect or "hf")
    except KeyError as error:
        raise ValueError(f"{path}: looks like {layout.system}, but the key {error} is missing") from error
    load_strictly(model.float(), renamed, path)  # whatever torch's default dtype
    return model.eval()


def is_early_exit(source: str | Path) -> bool:
    """Is this a directory that ``load`` takes, ours or in a published layout?"""
    path = Path(source)
    if not (path / "config.json").is_file():
        return False
    if read_config(path).get("early_exit") is not None:
        return True
    try:
        return detect_layout(read_state(path)) is not None
    except FileNotFoundError:
        return False


def class_names(directory: str | Path) -> list[str]:
    """The names of a checkpoint's classes, in the order of their numbers; empty where config.json has none."""
    names = read_config(Path(directory)).get("id2label") or {}
    return [names[label] for label in sorted(names, key=int)]
