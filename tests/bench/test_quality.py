"""The quality study on models of a few weights: tasks are read, thresholds come from validation, figures follow."""

import json
import math
from dataclasses import replace

import pytest
import torch
from recipe_cases import task, tiny
from rich.console import Console
from tiny import one_thread  # noqa: F401  (autouse)

import ragged_exit as rx
from ragged_exit.bench.quality import points as points_module
from ragged_exit.bench.quality.models import Budget, Study
from ragged_exit.bench.quality.points import TARGETS, Point, measure
from ragged_exit.bench.quality.published import FULL, QUALITY, retention
from ragged_exit.bench.quality.report import TaskReport, draw, write_json
from ragged_exit.bench.quality.tasks import TASKS, load_task
from ragged_exit.calibration.exit_table import Exit, ExitTable
from ragged_exit.examples import Examples
from ragged_exit.training.fit import fit


class TinyTask:
    name = "sst2"
    num_labels = 2


class TinyStudy:
    """A Study's face on tiny models; ``reads`` says when dev was looked at."""

    task, num_layers = TinyTask(), 3

    def __init__(self, models):
        self.models, self.valid, self.reads = models, task(60, 5), []
        self._dev = task(60, 6)

    @property
    def dev(self) -> Examples:
        self.reads.append("dev")
        return self._dev

    def baselines(self):
        return [name for name in self.models if name.startswith("bert-")]

    def model(self, name):
        self.reads.append(name)
        return self.models[name]


def test_a_model_of_other_settings_is_not_measured_again(tmp_path):
    class OfTiny(Study):
        def __init__(self, seed):  # without the encoder, which is fetched
            self.task, self.folder, self.say = TinyTask(), tmp_path, lambda line: None
            self.budget, self.seed, self.bf16 = Budget(None, 1, 1e-3, 16), seed, False
            self.train, self.valid = task(32, 1), task(16, 2)

        def _fresh(self, name):
            return tiny("pabee", seed=self.seed)

    first, again = (OfTiny(1).model("pabee").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(ValueError, match=r"work_dir: .* other settings"):
        OfTiny(2).model("pabee")


@pytest.fixture(scope="module")
def study() -> TinyStudy:
    models = {"bert-12l": tiny("full_depth"), "deebert": tiny("deebert"), "pabee": tiny("pabee")}
    for model in models.values():
        fit(model, task(128, 1), task(32, 2), epochs=1, learning_rate=2e-3, batch_size=16, show_progress=False)
    models["cascade"] = rx.CascadeBert.from_members([models["bert-12l"], models["bert-12l"]])
    return TinyStudy(models)


def test_measure(study):
    study.reads.clear()
    found = measure(study, ["deebert", "pabee", "cascade"], repeats=2, say=lambda line: None)
    first_dev = study.reads.index("dev")
    assert not set(study.reads[first_dev:]) - {"dev"}  # every rule was settled before dev was read
    assert [point.name for point in found].count("bert-12l") == 1 and found[0].target is None
    assert {point.target for point in found if point.name == "deebert"} <= set(TARGETS)
    for point in found:
        assert point.matches and len(point.seconds) == 2 and 0 <= point.quality["accuracy"] <= 1
    at_two = next(point for point in found if point.name == "deebert" and point.target == 2.0)
    assert at_two.layer_speedup == pytest.approx(2.0, rel=0.25)  # chosen on validation: near, not equal


def test_answers_that_differ_are_told(study, monkeypatch):
    real = points_module._answers

    def off(fast, examples):
        record = real(fast, examples)
        return record._replace(logits=record.logits + 0.01)

    monkeypatch.setattr(points_module, "_answers", off)
    (point,) = measure(study, [], repeats=1, say=lambda line: None)
    assert not point.matches


def points() -> list[Point]:
    def point(name, target, quality, seconds, matches=True):
        return Point(name, target, {"name": "MaxProb"}, {"accuracy": quality}, 2.0, matches, seconds=seconds)

    return [
        point("bert-3l", None, 0.8, [1.0, 1.1, 9.0]),
        point("bert-6l", None, 0.86, [2.0, 2.0, 2.0]),
        point("bert-12l", None, 0.9, [4.4, 4.0, 4.4]),
        point("deebert", 2.0, 0.88, [1.4, 1.5, 1.45]),
        point("berxit", 4.0, 0.7, [0.5, 0.5, 0.5]),
        point("pabee", 2.0, 0.9, [1.0, 1.0, 1.0], matches=False),
    ]


def test_patience_is_close_in_what_it_counts():
    """The two largest logits, or a regression's change against its tolerance; the counter itself is never close."""
    rows = {"clear": [[2.0, 0.0], [0.0, 2.0]], "tied at one exit": [[2.0, 0.0], [1.0, 1.0 + 1e-6]]}
    logits = torch.tensor(list(rows.values())).transpose(0, 1)  # [exits, N, C]
    rule = rx.Patience(1)
    table = ExitTable(torch.zeros(2, 2), logits, [Exit(rule, index, index + 1, index + 1) for index in range(2)])
    assert points_module._close_calls(table, rule).tolist() == [False, True]
    values = torch.tensor([[1.0, 1.0], [1.3, 1.1 + 1e-6]])[..., None]
    found = points_module._close_calls(replace(table, logits=values), rx.Patience(1, 0.1))
    assert found.tolist() == [False, True]


def test_answers_that_are_all_the_same_are_the_worst():
    constant, good = rx.Patience(1, 0.4), rx.Patience(1, 0.1)
    for options in ([(math.nan, constant), (-0.2, good)], [(-0.2, good), (math.nan, constant)]):
        assert points_module._best(options) is good


def test_report_derives_ratios_and_interpolates():
    report = TaskReport("sst2", "accuracy", {"dev": 10}, {}, points())
    deebert, berxit, pabee = report.points[3:]
    speed = 4.4 / 1.45
    assert report.wallclock(deebert) == pytest.approx(speed)
    assert report.retention(deebert) == pytest.approx(0.88 / 0.9)
    # between the 6 layers at 2.2x and the 3 layers at 4x
    assert report.baseline_at(speed) == pytest.approx(0.86 + (0.8 - 0.86) * (speed - 2.2) / (4.0 - 2.2))
    assert report.baseline_at(report.wallclock(berxit)) is None
    saved = {entry["name"]: entry for entry in report.as_dict()["points"]}
    assert saved["pabee"]["wallclock_speedup"] is None and saved["deebert"]["wallclock_speedup"] == pytest.approx(speed)
    assert pabee.matches is False


def test_report_prints_writes_and_draws(tmp_path):
    report = TaskReport("sst2", "accuracy", {"dev": 10}, {}, points())
    console = Console(width=160, record=True, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    report.print(console)
    text = console.export_text()
    assert "answers differ" in text and "90.2 %" not in text and "96.5 % at 2x" in text  # 90.2 / 93.5 of full depth
    write_json(tmp_path / "q.json", [report])
    assert json.loads((tmp_path / "q.json").read_text())["tasks"]["sst2"]["metric"] == "accuracy"
    draw(tmp_path / "q.png", [report])
    assert (tmp_path / "q.png").stat().st_size > 5_000


def test_published_retention():
    assert retention("sst2", "cascade")[3] == pytest.approx(90.9 / 93.5)
    assert retention("stsb", "berxit") == {}
    assert set(QUALITY) == set(FULL) == set(TASKS)


def test_tasks_are_read_in_their_published_formats(tmp_path):
    for name in TASKS:
        (tmp_path / name).mkdir()
    for part in ("train", "valid", "dev"):
        (tmp_path / "sst2" / f"{part}.tsv").write_text('sentence\tlabel\na "b\t1\nc\t0\n')
    rows = "".join(f"{i}\tone {i}\ttwo\t{'not_entailment' if i % 2 else 'entailment'}\n" for i in range(40))
    for part in ("train", "dev"):
        (tmp_path / "rte" / f"{part}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + rows)
    pairs = "".join(f'{i % 2}\t{i}\t{i + 1}\tHe said "no\tHe did\n' for i in range(40))
    for part in ("train", "test"):
        (tmp_path / "mrpc" / f"msr_paraphrase_{part}.txt").write_text("Quality\t#1\t#2\tA\tB\n" + pairs, "utf-8-sig")
    scores = "".join(
        f"news\tfile\t2014\t{i:04d}\t{i % 6}.000\ta\tb{chr(9) + 'x' if i % 2 else ''}\n" for i in range(40)
    )
    for part in ("train", "dev"):
        (tmp_path / "stsb" / f"sts-{part}.csv").write_text(scores)

    found = {name: load_task(name, tmp_path) for name in TASKS}
    assert found["sst2"].train.texts == ['a "b', "c"] and found["sst2"].num_labels == 2
    assert found["mrpc"].dev.texts[0] == 'He said "no' and found["mrpc"].dev.labels[:2] == [0, 1]
    assert found["rte"].dev.text_pairs[0] == "two" and found["rte"].dev.labels[:2] == [0, 1]
    assert found["stsb"].dev.labels[:3] == [0.0, 1.0, 2.0] and found["stsb"].num_labels == 1
    for name in ("mrpc", "rte", "stsb"):
        part = found[name]
        assert len(part.train) + len(part.valid) == 40 and 1 <= len(part.valid) <= 15
        assert not set(part.train.ids) & set(part.valid.ids)
    with pytest.raises(ValueError, match="name"):
        load_task("cola", tmp_path)


def test_regressions_patience_tries_tolerances(monkeypatch):
    model = tiny("pabee", num_labels=1)
    study = TinyStudy({"bert-12l": tiny("full_depth", num_labels=1), "pabee": model})
    study.task = type("T", (), {"name": "stsb", "num_labels": 1})()
    for part in ("valid", "_dev"):
        examples = getattr(study, part)
        setattr(study, part, Examples(examples.sequences, [float(label) for label in examples.labels]))
    found = measure(study, ["pabee"], repeats=1, say=lambda line: None)
    tolerances = {point.rule["tolerance"] for point in found if point.target is not None}
    assert tolerances and tolerances <= set(points_module.TOLERANCES)
    assert all(torch.isfinite(torch.tensor(point.layer_speedup)) for point in found)
