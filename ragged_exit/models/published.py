"""PublishedLayout: how a system's original code names its tensors. Each system's file adds its own to LAYOUTS."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from ragged_exit.backbones import ROBERTA_LIKE
from ragged_exit.models.base import EarlyExitModel

Rename = tuple[str, str]  # a regular expression for the whole key, and what it becomes
BACKBONES = "(?:bert|roberta)"
_ARCHITECTURES = {  # by what the backbone's keys start with
    "albert": "albert",
    "bert": "bert",
    "cascade_models": "bert",
    "distilbert": "distilbert",
    "elasticbert": "bert",
    "roberta": "roberta",
}


@dataclass(frozen=True)
class PublishedLayout:
    """How a system's original code names its tensors.

    signature: a regular expression found in some key of this layout; without: in none of them. renames: first match
    wins; a replacement of "" drops the tensor. build: (config.json ``with_architecture``, renamed state, dialect) ->
    the model to load into; it may move keys of the state where a rename cannot.
    """

    system: str
    signature: str
    renames: tuple[Rename, ...]
    build: Callable[[dict, dict[str, Tensor], str], EarlyExitModel]
    without: str = "$^"

    def fits(self, keys: Iterable[str]) -> bool:
        """Is this a checkpoint in this layout?"""
        names = list(keys)
        found = any(re.search(self.signature, name) for name in names)
        return found and not any(re.search(self.without, name) for name in names)


LAYOUTS: list[PublishedLayout] = []


def detect_layout(keys: Iterable[str]) -> PublishedLayout | None:
    """The published layout that these keys belong to, or None."""
    names = list(keys)
    return next((layout for layout in LAYOUTS if layout.fits(names)), None)


def rename_keys(state: dict[str, Tensor], renames: Iterable[Rename]) -> dict[str, Tensor]:
    """Published names -> ours; old LayerNorm names (gamma, beta) too. A key that fits no rename stays as it is."""
    renamed = {}
    for name, value in state.items():
        modern = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        for pattern, replacement in ((r".*embeddings\.position_ids", ""), *renames):
            if re.fullmatch(pattern, modern):
                modern = re.sub(pattern, replacement, modern)
                break
        if modern:
            renamed[modern] = value
    return renamed


def with_architecture(saved: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """config.json with the model_type that the published keys tell: old ones have none, or name another architecture.

    The padding id of another architecture goes with its name: positions may count from it. FastBERT's keys tell none.
    """
    kind = next((_ARCHITECTURES[start] for name in keys if (start := name.partition(".")[0]) in _ARCHITECTURES), None)
    given = saved.get("model_type")
    if kind == given == "roberta" and saved.get("pad_token_id") == 0:  # old transformers counted from 1 all the same
        return {name: value for name, value in saved.items() if name != "pad_token_id"}
    if kind in (None, given) or (kind == "roberta" and given in ROBERTA_LIKE):  # whose keys start alike
        return saved
    return {name: value for name, value in saved.items() if name != "pad_token_id"} | {"model_type": kind}


def read_labels(config: PretrainedConfig, state: dict[str, Tensor], classifier: str) -> None:
    """Set ``num_labels`` from the rows of this weight; where it is missing, strict loading will say so."""
    if classifier in state:
        config.num_labels = state[classifier].shape[0]


def count_prefixes(state: Iterable[str], pattern: str) -> int:
    """1 + the largest number that the group of ``pattern`` matches at the start of a key; 0 without a match."""
    return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)
