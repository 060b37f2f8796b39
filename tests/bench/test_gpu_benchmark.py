"""benchmarks/gpu.py from end to end without a GPU: answers, figures, refusals. Its times mean nothing here."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from tiny import one_thread  # noqa: F401

from ragged_exit.bench import gpu, synthetic
from ragged_exit.bench.check import Measured
from ragged_exit.bench.contenders import Answers, Contender
from ragged_exit.bench.gpu import CardReport

_SPEC = importlib.util.spec_from_file_location("gpu_benchmark", Path(__file__).parents[2] / "benchmarks" / "gpu.py")
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)
TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 3}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(synthetic.SHAPES, "tiny", TINY)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the benchmark at toy sizes. A call's first argument: what to make of the contenders."""
    monkeypatch.setattr(benchmark, "CHECKED_ROWS", 24)
    monkeypatch.setattr(synthetic, "HEAD_ROWS", 128)
    monkeypatch.setitem(synthetic.CALIBRATION_ROWS, "sst2", 128)
    monkeypatch.setattr(gpu, "TOKEN_BUDGETS", (256, 1024))
    made = benchmark.card_contenders
    options = {"dtype": benchmark.DType.fp32, "rows": 48, "repeats": 2, "compiled": False, "device": "cpu"}

    def main(change=lambda contenders: contenders) -> None:
        monkeypatch.setattr(benchmark, "card_contenders", lambda *args, **kwargs: change(made(*args, **kwargs)))
        benchmark.main(profile="sst2", shape="tiny", json=tmp_path / "new" / "r.json", **options)

    return main


def written(tmp_path) -> dict:
    return json.loads((tmp_path / "new" / "r.json").read_text())


def failing(contenders: list[Contender], name: str, call: int, error: BaseException) -> list[Contender]:
    """The contender ``name`` raises when it is asked for the ``call``-th time."""
    calls = 0

    def change(contender: Contender) -> Contender:
        def raises(workload, size):
            nonlocal calls
            calls += 1
            if calls >= call:
                raise error
            return contender.run(workload, size)

        return replace(contender, run=raises, sizes=contender.sizes[:1]) if contender.name == name else contender

    return [change(contender) for contender in contenders]


def test_a_contender_that_raises_costs_the_others_nothing(run, tmp_path, capsys):
    """One in its check, one in its second repeat (its third call: there is a size less to choose)."""

    def change(contenders):
        return failing(failing(contenders, "padded_sorted", 1, TypeError("no [kernel]")), "ragged", 3, OSError("lost"))

    with pytest.raises(typer.Exit) as stopped:
        run(change)
    assert stopped.value.exit_code == 1
    found = written(tmp_path)
    rows = {row["name"]: row for row in found["contenders"]}
    assert list(rows) == ["padded", "ragged_full", "padded_sorted", "ragged"]
    assert rows["padded_sorted"] == {
        "name": "padded_sorted",
        "error": "TypeError: no [kernel]",
        "seconds_of_repeats": [],
    }
    assert rows["ragged"]["error"] == "OSError: lost" and len(rows["ragged"]["seconds_of_repeats"]) == 1
    assert len(rows["ragged_full"]["seconds_of_repeats"]) == 2 and rows["ragged_full"]["speedup_vs_padded"] > 0
    assert found["realised_over_ideal"] == {} and found["best_peer"] is None
    said = capsys.readouterr().out
    assert "padded_sorted: TypeError: no [kernel]" in said and re.search(r" ragged \d", said).start() < said.index(
        "OSError: lost"
    )


@pytest.mark.parametrize(("call", "repeats"), [(1, 0), (3, 1)])
def test_what_is_known_is_on_disk_when_a_run_is_cut(run, tmp_path, call, repeats):
    with pytest.raises(KeyboardInterrupt):
        run(lambda contenders: failing(contenders, "ragged", call, KeyboardInterrupt()))
    found = written(tmp_path)
    rows = {row["name"]: row for row in found["contenders"]}
    assert rows["padded"]["decisions_match"] and len(rows["padded"].get("seconds_of_repeats", [])) == repeats
    assert ("ragged" in rows) == (repeats > 0) and len(found["realised_over_ideal"]) == repeats


def test_from_end_to_end(run, tmp_path, capsys):
    run()
    found = written(tmp_path)
    rows = {row["name"]: row for row in found["contenders"]}
    assert set(rows) == {"padded", "padded_sorted", "ragged_full", "ragged"}
    assert all(row["decisions_match"] and len(row["seconds_of_repeats"]) == 2 for row in rows.values())
    assert found["workload"]["sequences"] == 48 and 1 < found["workload"]["mean_exit_layer"] < 3
    assert found["matrix_tflop_s"] > 0 and found["best_peer"] == "padded_sorted"
    repeats = zip(
        *(rows[name]["seconds_of_repeats"] for name in ("ragged_full", "ragged")),
        found["workload"]["work_fractions"],
        strict=True,
    )
    expected = statistics.median(full / ours * fraction for full, ours, fraction in repeats)
    assert found["realised_over_ideal"] == {"ragged": pytest.approx(expected)}
    assert "realised / ideal" in capsys.readouterr().out


def test_a_contender_that_differs_gets_no_figure():
    contenders = [Contender(name, lambda *_: None, (1,), exits=name == "ragged") for name in gpu.PAIRS | {"padded": ""}]
    contenders.append(Contender("ragged_full", lambda *_: None, (1,), exits=False))
    answers = Answers(torch.zeros(1, 2), torch.ones(1, dtype=torch.int64))
    measured = [Measured(item, 1, answers, [number + 1.0]) for number, item in enumerate(contenders)]
    facts = {"sequences": 1, "work_fraction": 0.5, "work_fractions": [0.5], "flops": 4.0, "full_flops": 8.0}
    report = CardReport("", measured, facts, 2.0, 0)
    seconds = {item.contender.name: item.median for item in measured}
    assert report.share_of_matrix_rate(report.of("ragged")) == 4.0 / seconds["ragged"] / 2
    assert report.share_of_matrix_rate(report.of("ragged_full")) == 8.0 / seconds["ragged_full"] / 2
    assert report.realised_over_ideal("ragged") == [seconds["ragged_full"] / seconds["ragged"] / 2]
    wrong = replace(report, measured=[replace(item, matches=False) for item in measured])
    console = Console(width=200, record=True)
    wrong.print(console)
    assert "DIFFER" in console.export_text() and wrong.to_dict()["realised_over_ideal"] == {}
    for row in wrong.to_dict()["contenders"]:
        assert row["speedup_vs_padded"] is None and row["share_of_matrix_rate"] is None


def test_the_matrix_rate_counts_a_products_flops(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: float(next(ticks)))  # every round takes a second
    assert gpu.matrix_rate(torch.device("cpu"), torch.float32, size=8) == 4 * 2 * 8**3


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_benchmark_says_so(capsys):
    with pytest.raises(typer.Exit) as stopped:
        benchmark.main(shape="tiny")
    assert stopped.value.exit_code == 2
    assert "no CUDA device" in capsys.readouterr().out
