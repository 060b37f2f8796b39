"""Checkpoint directories: config.json and the tensors, read without running code, loaded strictly. Knows no system."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS_FILE = "model.safetensors"


def read_config(directory: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises FileNotFoundError without one, ValueError for one that holds no object."""
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"directory: expected {path}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not readable as json: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, got {type(config).__name__}")
    return config


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint directory. Never runs code from the file.

    Raises FileNotFoundError where there are none, ValueError for a file that is not whole.
    """
    if (path / WEIGHTS_FILE).is_file():
        return _read_safetensors(path / WEIGHTS_FILE)
    if (path / "pytorch_model.bin").is_file():
        return _read_bin(path / "pytorch_model.bin")
    raise FileNotFoundError(f"directory: expected {WEIGHTS_FILE} or pytorch_model.bin in {path}")


def _read_bin(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:  # torch's own words advise to run code from the file
        raise ValueError(
            f"{path}: expected a dict of tensors as torch.save writes it; "
            "the file is cut short, is something else (a git-lfs pointer, say) or holds more than tensors"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(state).__name__}")
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: object) -> None:
    """``load_state_dict`` that lists every missing and unexpected key and every shape that differs."""
    own = model.state_dict()
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    shapes = [
        f"{name}: expected {list(own[name].shape)}, got {list(state[name].shape)}"
        for name in sorted(set(own) & set(state))
        if own[name].shape != state[name].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(f"{source}: missing keys {missing}; unexpected keys {unexpected}; other shapes {shapes}")
    model.load_state_dict(state)
