"""What the tests of scoring share: a checkpoint, and shards so small that a file of some hundred rows has several."""

from __future__ import annotations

import pytest
from score_cases import save_checkpoint

from ragged_exit.integrations import score as score_module
from ragged_exit.integrations.shards import split


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "model")


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 16 rows, for files of a few hundred."""
    monkeypatch.setattr(score_module, "split", lambda *arguments: split(*arguments, shard_rows=16))
