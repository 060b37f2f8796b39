"""rx.load: a checkpoint directory in, the right model out - ours, or the published layouts by their keys."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ragged_exit.models.base import WEIGHTS_FILE, EarlyExitModel, config_from_dict, load_strictly
from ragged_exit.models.deebert import DeeBert
from ragged_exit.rules import Entropy

SYSTEMS: dict[str, type[EarlyExitModel]] = {DeeBert.system: DeeBert}

Rename = tuple[str, str]  # a regular expression for the whole key, and what it becomes


@dataclass(frozen=True)
class PublishedLayout:
    """How a system's original code names its tensors.

    signature: found in some key of this layout and of no earlier one in ``LAYOUTS``. renames: first match wins; a
    replacement of "" drops the tensor. build: (config.json, renamed state, dialect) -> the model to load into.
    """

    system: str
    signature: str
    renames: tuple[Rename, ...]
    build: Callable[[dict, dict[str, Tensor], str], EarlyExitModel]


def _build_deebert(saved: dict, state: dict[str, Tensor], dialect: str) -> EarlyExitModel:
    config = config_from_dict(saved)
    config.num_labels = state["final.classifier.weight"].shape[0]
    return DeeBert(config, Entropy(-1.0, dialect=dialect), exit_at_last_highway=True)  # -1: the original's "never exit"


_BACKBONES = "(?:bert|roberta)"
LAYOUTS = (
    PublishedLayout(
        system="deebert",
        signature=r"encoder\.highway\.\d+\.pooler\.",
        renames=(
            (r".*embeddings\.position_ids", ""),
            (rf"{_BACKBONES}\.encoder\.highway\.(\d+)\.pooler\.dense\.(.*)", r"highways.\1.pooler.\2"),
            (rf"{_BACKBONES}\.encoder\.highway\.(\d+)\.classifier\.(.*)", r"highways.\1.classifier.\2"),
            (rf"{_BACKBONES}\.pooler\.dense\.(.*)", r"final.pooler.\1"),
            (r"classifier\.(.*)", r"final.classifier.\1"),
            (rf"{_BACKBONES}\.(.*)", r"backbone.\1"),
        ),
        build=_build_deebert,
    ),
)


def load(directory: str | Path, *, dialect: str = "hf") -> EarlyExitModel:
    """Load a checkpoint directory: ``config.json`` beside ``model.safetensors`` or ``pytorch_model.bin``.

    The system comes from config.json's ``early_exit`` section, or for published files from their keys; these get the
    original code's behaviour, with the entropy formula of ``dialect`` ("hf" or "castorini").

    Raises FileNotFoundError for a file that is not there, ValueError for an unknown system or layout, and for missing
    or unexpected keys (all listed).
    """
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"directory: expected {path}/config.json")
    saved = json.loads((path / "config.json").read_text())
    section = saved.get("early_exit")
    if section is not None:
        system = section.get("system")
        if system not in SYSTEMS:
            raise ValueError(f"{path}: early_exit.system: expected one of {sorted(SYSTEMS)}, got {system!r}")
        return SYSTEMS[system].from_pretrained(path)
    state = read_state(path)
    layout = detect_layout(state)
    if layout is None:
        raise ValueError(f"{path}: no early_exit section in config.json, and the keys fit no published layout")
    renamed = rename_keys(state, layout.renames)
    try:
        model = layout.build(saved, renamed, dialect)
    except KeyError as error:
        raise ValueError(f"{path}: looks like {layout.system}, but the key {error} is missing") from error
    load_strictly(model, renamed, path)
    return model.eval()


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint directory. Never runs code from the file."""
    if (path / WEIGHTS_FILE).is_file():
        return load_file(path / WEIGHTS_FILE)
    if (path / "pytorch_model.bin").is_file():
        return torch.load(path / "pytorch_model.bin", map_location="cpu", weights_only=True)
    raise FileNotFoundError(f"directory: expected {WEIGHTS_FILE} or pytorch_model.bin in {path}")


def detect_layout(keys: Iterable[str]) -> PublishedLayout | None:
    """The published layout that these keys belong to, or None."""
    names = list(keys)
    for layout in LAYOUTS:
        if any(re.search(layout.signature, name) for name in names):
            return layout
    return None


def rename_keys(state: dict[str, Tensor], renames: Iterable[Rename]) -> dict[str, Tensor]:
    """Published names -> ours; old LayerNorm names (gamma, beta) too. A key that fits no rename stays as it is."""
    renamed = {}
    for name, value in state.items():
        modern = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        for pattern, replacement in renames:
            if re.fullmatch(pattern, modern):
                modern = re.sub(pattern, replacement, modern)
                break
        if modern:
            renamed[modern] = value
    return renamed
