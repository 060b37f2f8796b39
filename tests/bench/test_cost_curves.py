"""The cost curves run, on two layers and few sequences, and a long stream needs no more memory than a short one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import typer
from tiny import one_thread  # noqa: F401  (autouse)
from typer.testing import CliRunner

from ragged_exit.bench.synthetic import random_deebert
from ragged_exit.cli import DType


@pytest.fixture(scope="module")
def curves():
    path = Path(__file__).parents[2] / "benchmarks" / "cost_curves.py"
    spec = importlib.util.spec_from_file_location("cost_curves", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_points_and_picture(curves, tmp_path):
    curves.main("tiny", ["sequences", "depth"], 1000, DType.fp32, 1, tmp_path / "c.json", tmp_path / "new" / "c.png")
    found = json.loads((tmp_path / "c.json").read_text())["curves"]
    assert [point["sequences"] for point in found["sequences"]] == [1000]
    speedups = [point["layer_speedup"] for point in found["depth"]]
    assert speedups[0] == 1.0 and speedups[-1] > 1.5  # the threshold does what the axis says
    assert (tmp_path / "new" / "c.png").stat().st_size > 5_000


@pytest.mark.parametrize(("arguments", "name"), [
    (["--curve", "nonsense"], "nonsense"), (["--curve", "length", "--largest", "500"], "--largest"),
])  # fmt: skip
def test_bad_options_are_refused_before_anything_is_measured(curves, monkeypatch, arguments, name):
    monkeypatch.setattr(curves, "random_deebert", lambda *_: pytest.fail("measured"))
    app = typer.Typer()
    app.command()(curves.main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and name in result.output


def test_memory_is_flat(curves):
    model = random_deebert("tiny", 20)
    short, long = (curves._point(model, torch.float32, 0, rows) for rows in (5_000, 40_000))
    assert short["megabytes"] < 300
    assert long["megabytes"] < 20  # after the short one; a kilobyte kept for each row would be 40
