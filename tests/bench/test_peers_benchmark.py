"""benchmarks/peers.py without its measuring: what it asks for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import typer
from tiny import one_thread  # noqa: F401  (autouse)
from typer.testing import CliRunner

from ragged_exit.accelerate import accelerate
from ragged_exit.bench import synthetic
from ragged_exit.bench.synthetic import random_workload
from ragged_exit.rules import Entropy

_SPEC = importlib.util.spec_from_file_location("peers_benchmark", Path(__file__).parents[2] / "benchmarks" / "peers.py")
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 6}


class _Asked(Exception):
    pass


@pytest.fixture
def asked(monkeypatch):
    """Calls the benchmark with these options; the model and the rule that it would have compared."""
    monkeypatch.setitem(synthetic.SHAPES, "tiny", SHAPE)
    monkeypatch.setattr(synthetic, "HEAD_ROWS", 128)

    def refuse(title, model, rule, *arguments, **options):
        raise _Asked(model, rule)

    monkeypatch.setattr(benchmark, "compare", refuse)

    def call(**options):
        with pytest.raises(_Asked) as found:
            benchmark.main(shape="tiny", threads=1, others=False, **options)
        return found.value.args

    return call


def test_few_rows_leave_as_uniformly_as_many(asked):
    model, rule = asked(rows=12)
    assert asked(rows=96)[1] == rule
    fast = accelerate(model, rule=rule)
    layers = [row.exit_layer for row in fast.stream(random_workload(2_000, 77).sequences)]
    shares = [layers.count(layer) / 2_000 for layer in range(1, 7)]
    assert shares == pytest.approx([1 / 6] * 6, abs=0.03)


def test_no_rows_are_refused():
    app = typer.Typer()
    app.command()(benchmark.main)
    result = CliRunner().invoke(app, ["--shape", "tiny", "--rows", "0"])
    assert result.exit_code == 2 and "--rows" in result.output


def test_all_at_once_or_never(asked):
    assert asked(exits=benchmark.Exits.first)[1] == Entropy(10.0)
    assert asked(exits=benchmark.Exits.none)[1] == Entropy(-1.0)
