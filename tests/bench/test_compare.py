"""The benchmark refuses to praise wrong answers, and its figures follow from its timings."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AlbertConfig, BertConfig, DistilBertConfig, ElectraConfig

import ragged_exit as rx
from ragged_exit.bench import check as checking
from ragged_exit.bench import measure as measuring
from ragged_exit.bench.compare import compare
from ragged_exit.bench.contenders import (
    ROW_BATCHES,
    Answers,
    Contender,
    _leaves,
    contenders,
    with_prepacked_linears,
)
from ragged_exit.bench.report import workload_facts
from ragged_exit.bench.synthetic import uniform_exits
from ragged_exit.bench.workload import Workload, work
from ragged_exit.calibration.exit_table import exit_table
from ragged_exit.ops import exit_decide

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def random_model(config):
    torch.manual_seed(0)
    model = rx.DeeBert(config, rx.Entropy(0.0)).eval()
    for head in (*model.highways, model.final):
        torch.nn.init.normal_(head.classifier.weight, std=2.0)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model(BertConfig(**SIZES, num_labels=2))


def exit_layers(model, rule, rows: Workload) -> torch.Tensor:
    return torch.tensor([row.exit_layer for row in rx.accelerate(model, rule=rule).stream(rows.sequences)])


def workload(rows: int, seed: int) -> Workload:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (rows,), generator=generator).tolist()
    sequences = [torch.randint(1, 50, (length,), generator=generator).tolist() for length in lengths]
    return Workload(sequences, torch.randint(0, 2, (rows,), generator=generator))


@pytest.fixture(scope="module")
def rule(model):
    return uniform_exits(exit_table(rx.accelerate(model), workload(60, 1).sequences))


@pytest.fixture(scope="module")
def report(model, rule):
    return compare(
        "tiny",
        model,
        rule,
        workload(40, 2),
        lambda number: workload(40, 100 + number),
        batch_size=8,
        dtype=torch.float32,
        repeats=3,
        say=lambda line: None,
    )


def test_every_contender_matches_its_reference(report):
    assert [item.contender.name for item in report.measured if not item.matches] == []
    assert {item.contender.name for item in report.measured} == {
        "padded",
        "padded_sorted",
        "padded_sorted_prepacked",
        "batch1",
        "padded_exit",
        "ragged_full",
        "ragged",
    }


@pytest.mark.parametrize(
    "config",
    [
        AlbertConfig(**SIZES, embedding_size=16, num_hidden_groups=2),
        DistilBertConfig(vocab_size=50, dim=32, n_layers=3, n_heads=4, hidden_dim=48),
        ElectraConfig(**SIZES, embedding_size=16),
    ],
    ids=lambda config: config.model_type,
)
def test_other_backbones_are_compared_too(config):
    model = random_model(config)
    rule = uniform_exits(exit_table(rx.accelerate(model), workload(60, 1).sequences))
    arguments = (workload(40, 2), lambda number: workload(40, 100 + number))
    found = compare(
        "tiny", model, rule, *arguments, batch_size=8, dtype=torch.float32, repeats=1, say=lambda line: None
    )
    assert [item.contender.name for item in found.measured if not item.matches] == []
    assert found.roofline_fraction > 0


def test_exits_on_some_layers_with_a_threshold_each():
    torch.manual_seed(0)
    model = rx.DeeBert(BertConfig(**SIZES, num_labels=2), rx.Entropy(0.0), exit_layers=[2, 3]).eval()
    rows = workload(30, 5)
    table = exit_table(rx.accelerate(model), rows.sequences)
    rule = rx.Entropy([float(table.scores[0].median()), 0.0])
    expected = checking.references(model, rule, rows)
    assert expected.exits.exit_layer.unique().tolist() == [2, 3]
    for contender in contenders(model, rx.accelerate(model, rule=rule)):
        measured = checking.Measured(contender, 8, contender.run(rows, 8))
        checking.check(measured, rows, expected, torch.float32)
        assert measured.matches, contender.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prepacked_linears_are_the_same_model(model, dtype):
    plain = copy.deepcopy(model).to(dtype)
    ids = torch.randint(0, 50, (3, 7))
    with torch.inference_mode():
        found, expected = (one(input_ids=ids).logits.float() for one in (with_prepacked_linears(plain), plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.05)


def test_uniform_exits_are_uniform(model, rule):
    found = exit_layers(model, rule, workload(60, 1))
    assert torch.bincount(found, minlength=4)[1:].tolist() == [20, 20, 20]


def test_figures_follow_from_the_timings(report):
    for item, seconds in zip(report.measured, (8.0, 4.0, 3.0, 9.0, 5.0, 2.0, 1.0), strict=True):
        item.seconds = [seconds] * 3
    facts = report.workload | {"work_fractions": [0.3, 0.45, 0.4]}
    changed = replace(report, workload=facts, linear_seconds=[0.5, 0.7, 0.8])
    found, console = changed.to_dict(), Console(width=200, record=True)
    changed.print(console)
    assert "realised / ideal 0.800 (0.600 to 0.900)" in console.export_text()
    by_name = {item["name"]: item for item in found["contenders"]}
    assert by_name["ragged"]["speedup_vs_padded"] == 8.0
    assert found["factors"] == {"gemm_library": 4 / 3, "padding": 2.0 * 1.5, "depth": 2.0}
    assert found["realised_over_ideal"] == pytest.approx(2 * 0.4)
    assert found["realised_over_ideal_of_repeats"] == pytest.approx([2 * 0.3, 2 * 0.45, 2 * 0.4])
    assert found["roofline_fraction"] == pytest.approx(0.7)


def test_the_facts_are_of_the_rows_that_were_timed(model, rule, report):
    timed = [workload(40, 100 + number) for number in range(3)]
    layers = [exit_layers(model, rule, rows) for rows in timed]
    fractions = [
        work(model.config, rows.lengths, exits, exits) / work(model.config, rows.lengths, exits * 0 + 3, exits * 0 + 1)
        for rows, exits in zip(timed, layers, strict=True)
    ]
    assert len(set(fractions)) == 3
    facts = report.workload
    assert facts["work_fractions"] == pytest.approx(fractions)
    assert facts["work_fraction"] == pytest.approx(sum(fractions) / 3) and 0 < facts["work_fraction"] < 1
    assert facts["mean_exit_layer"] == pytest.approx(float(torch.cat(layers).double().mean()))
    assert facts["tokens"] == pytest.approx(sum(map(sum, (rows.lengths for rows in timed))) / 3)
    token_layers = [
        sum(map(math.prod, zip(rows.lengths, exits.tolist(), strict=True)))
        for rows, exits in zip(timed, layers, strict=True)
    ]
    rates = [seconds / done for seconds, done in zip(report.linear_seconds, token_layers, strict=True)]
    assert rates == pytest.approx([rates[0]] * 3)


def test_only_exits_that_there_are_count_as_work():
    model = rx.DeeBert(BertConfig(**SIZES, num_labels=2), exit_layers=[2, 3])
    rows, layers, asked = workload(2, 5), torch.tensor([2, 3]), torch.tensor([1, 2])
    found = workload_facts([rows], [layers], model)
    assert found["flops"] == work(model.config, rows.lengths, layers, asked)
    full = work(model.config, rows.lengths, torch.tensor([3, 3]), torch.tensor([1, 1]))
    assert found["work_fraction"] == pytest.approx(found["flops"] / full)


def test_wrong_answers_get_no_speed_up(report, tmp_path):
    broken = replace(report, measured=[replace(item) for item in report.measured])
    broken.of("ragged").matches = False
    found = broken.to_dict()
    by_name = {item["name"]: item for item in found["contenders"]}
    assert by_name["ragged"]["speedup_vs_padded"] is None
    assert found["realised_over_ideal"] is None and found["roofline_fraction"] is None
    console = Console(width=200, record=True)
    broken.print(console)
    assert "DIFFER" in console.export_text()


def test_check_sees_a_wrong_label_logit_and_exit(model, rule):
    rows = workload(30, 5)
    expected = checking.references(model, rule, rows)
    ragged = contenders(model, rx.accelerate(model, rule=rule))[-1]
    right = ragged.run(rows, 256)

    def verdict(answers: Answers) -> bool:
        measured = checking.Measured(ragged, 256, answers)
        checking.check(measured, rows, expected, torch.float32)
        return measured.matches

    assert verdict(right)
    assert not verdict(Answers(-right.logits, right.exit_layer))
    assert not verdict(Answers(right.logits + 2e-3, right.exit_layer))
    row = int((expected.may_leave.sum(1) == 1).nonzero()[0])
    other = right.exit_layer.clone()
    other[row] = 3 if other[row] != 3 else 2
    assert not verdict(Answers(right.logits, other))
    allowed = expected.may_leave.clone()
    allowed[row, other[row]] = True  # but not with anything, and not at another layer still
    expected = replace(expected, may_leave=allowed)
    assert verdict(Answers(right.logits, other))
    third = other.clone()
    third[row] = 6 - right.exit_layer[row] - other[row]
    assert not verdict(Answers(right.logits, third))
    nothing = right.logits.clone()
    nothing[row] = torch.nan
    assert not verdict(Answers(nothing, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [
    lambda answers: Answers(torch.zeros_like(answers.logits), torch.ones_like(answers.exit_layer)),
    lambda answers: Answers(answers.logits, answers.exit_layer.roll(1)),
    lambda answers: Answers(answers.logits.roll(1, 0), answers.exit_layer),
    lambda answers: Answers(answers.logits * torch.nan, answers.exit_layer),
], ids=["zeros", "exits of others", "logits of others", "nan"])  # fmt: skip
@pytest.mark.parametrize("name", ["ragged", "batch1"])
def test_who_answers_wrongly_when_timed_differs(model, rule, name, change, dtype):
    checked = workload(30, 5)

    def lying(contender: Contender) -> Contender:
        def run(rows: Workload, size: int) -> Answers:
            answers = contender.run(rows, 8)
            return answers if rows.sequences == checked.sequences[: len(rows)] else change(answers)

        return replace(contender, run=run if contender.name == name else contender.run, sizes=(8,))

    measured = measuring.measure(
        [lying(contender) for contender in contenders(model, rx.accelerate(model, rule=rule), batch1_rows=24)],
        checked,
        checking.references(model, rule, checked),
        lambda number: workload(30, 100 + number),
        repeats=1,
        dtype=dtype,
        config=model.config,
    )
    assert [item.contender.name for item in measured if not item.matches] == [name]
    assert [item.contender.name for item in measured if item.differs_when_timed] == [name]


@pytest.mark.parametrize("rule", [
    *(rx.Entropy(0.4, dialect=dialect) for dialect in ("exact", "hf", "castorini", "categorical", "normalised")),
    rx.Entropy([0.9, 0.4], compare="<="), rx.MaxProb(0.7), rx.Energy(0.3, compare="<"),
], ids=str)  # fmt: skip
def test_padded_exit_asks_each_exit_by_a_plain_formula(rule):
    logits = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) * 2
    batch = rx.RaggedBatch.from_sequences([[1]] * 200)
    with Operations() as found:
        leaves = _leaves(logits, rule, 1)
    assert 0 < int(leaves.sum()) < 200 and found.count <= 16
    assert torch.equal(leaves, exit_decide(batch, logits, rule, exit_index=1, impl="reference").exits)


class Operations(TorchDispatchMode):
    """Counts what runs inside."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += 1
        return function(*arguments, **(options or {}))


def test_a_sample_is_scaled_by_its_work(model, rule, monkeypatch):
    """A clock that counts padded FLOPs of executed layers; the sampled rows are the short ones."""
    clock = 0.0
    found = {contender.name: contender for contender in contenders(model, rx.accelerate(model, rule=rule))}

    def drawn(number: int) -> Workload:
        rows = workload(40, 100 + number)
        return Workload(sorted(rows.sequences, key=len))

    def by_work(name: str, batch_size: int, rows: int | None) -> Contender:
        def run(part: Workload, size: int) -> Answers:
            nonlocal clock
            answers = found[name].run(part, 8)
            for row, layers in enumerate(answers.exit_layer.tolist()):
                first = row - row % batch_size
                tokens = max(part.lengths[first : first + batch_size])
                clock += layers * (2 * tokens * (4 * 32**2 + 2 * 32 * 48) + 4 * tokens**2 * 32)
            return answers

        return replace(found[name], run=run, sizes=(batch_size,), rows=rows)

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock)
    checked = workload(10, 5)
    for name, size, whole in (("padded", 8, "padded_sorted"), ("batch1", 1, "padded_exit")):
        sample, all_rows = by_work(name, size, 16), by_work(whole, size, None)
        for order in ((sample, all_rows), (all_rows, sample)):
            measured = measuring.measure(
                order, checked, checking.references(model, rule, checked), drawn, repeats=2, dtype=torch.float32,
                config=model.config,
            )  # fmt: skip
            assert measured[0].seconds == pytest.approx(measured[1].seconds)


@pytest.mark.parametrize("kept", [0, 20, 60])
def test_who_loses_rows_is_not_measured(model, rule, kept):
    """Or repeats them; in the rows that are checked, or only in those that are timed."""
    rows = workload(30, 5)
    expected = checking.references(model, rule, rows)
    ragged = contenders(model, rx.accelerate(model, rule=rule))[-1]
    runs = []

    def losing(part: Workload, size: int) -> Answers:
        runs.append(part)
        answers = ragged.run(part, size)
        if len(runs) <= honest:
            return answers
        return Answers(answers.logits.repeat(2, 1)[:kept], answers.exit_layer.repeat(2)[:kept])

    for honest in (0, 1):
        runs.clear()
        with pytest.raises(RuntimeError, match=rf"ragged: expected 30 answers, got {kept}"):
            measuring.measure(
                [replace(ragged, run=losing, sizes=(256,))],
                rows,
                expected,
                lambda number: workload(30, 6 + number),
                repeats=1,
                dtype=torch.float32,
                config=model.config,
            )
        assert len(runs) == honest + 1


def test_who_changes_the_threads_is_not_measured(model, rule):
    """The others would run on as many as it left."""
    rows = workload(10, 5)
    expected = checking.references(model, rule, rows)
    ragged = contenders(model, rx.accelerate(model, rule=rule))[-1]
    threads = torch.get_num_threads()

    def run(part: Workload, size: int) -> Answers:
        torch.set_num_threads(threads + 1)
        return ragged.run(part, size)

    changing = replace(ragged, run=run, sizes=(256,))
    options = {"repeats": 1, "dtype": torch.float32, "config": model.config}
    try:
        with pytest.raises(RuntimeError, match=f"ragged: expected {threads} threads after it, got {threads + 1}"):
            measuring.measure([changing], rows, expected, lambda number: rows, **options)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("best", [1, 2, 32, 128])
def test_padded_contenders_run_at_their_best_size(monkeypatch, best):
    """A clock that counts what each size is said to take; the best one's first timing is a slow one."""
    clock, runs = 0.0, []

    def run(rows: Workload, size: int) -> Answers:
        nonlocal clock
        first = runs.count(size) < 2  # the warm-up and one timing
        clock += max(size / best, best / size) ** 0.25 + (0.2 if first and size == best else 0)
        runs.append(size)
        return Answers(torch.zeros(len(rows), 2), torch.ones(len(rows), dtype=torch.int64))

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock)
    contender = Contender("padded_sorted", run, ROW_BATCHES, exits=False)
    assert measuring._best_size(contender, lambda number: workload(4, number)) == best
    assert {size for size in ROW_BATCHES if runs.count(size) == 3} == {
        size for size in ROW_BATCHES if best / 4 <= size <= 4 * best
    }


def test_few_rows_inside_the_margin_may_leave_elsewhere(model, rule):
    rows = workload(30, 5)
    ragged = contenders(model, rx.accelerate(model, rule=rule))[-1]
    right = ragged.run(rows, 256)
    expected = replace(checking.references(model, rule, rows), may_leave=torch.ones(30, 4, dtype=torch.bool))
    for others, matches in ((0, True), (1, True), (2, False)):
        answers = Answers(right.logits.clone(), right.exit_layer.clone())
        answers.exit_layer[:others] = torch.where(answers.exit_layer[:others] == 3, 2, 3)
        answers.logits[:others] *= -1
        measured = checking.Measured(ragged, 256, answers)
        checking.check(measured, rows, expected, torch.float32)
        assert measured.matches == matches
    negated = checking.Measured(ragged, 256, Answers(-right.logits, right.exit_layer))
    checking.check(negated, rows, expected, torch.float32)
    assert not negated.matches  # the same exits: nothing is excused


def test_an_exit_that_will_not_be_asked_is_not_close(model):
    """All rows leave at the first exit, and sit on the threshold of the second."""
    rows = workload(4, 5)
    table = exit_table(rx.accelerate(model), rows.sequences)
    for row in range(4):
        rule = rx.Entropy([100.0, float(table.scores[1, row]), 0.0])
        assert not checking.references(model, rule, rows.select([row])).close
        rule = rx.Entropy([-1.0, float(table.scores[1, row]), 0.0])
        assert checking.references(model, rule, rows.select([row])).close == 1


def test_bf16_answers_that_do_not_match(model, rule):
    """Everybody leaves early; each leaves where another row does; no number where the label is 0."""
    rows = workload(60, 5)
    expected = checking.references(model, rule, rows)
    ragged = contenders(model, rx.accelerate(model, rule=rule))[-1]

    def matches(answers: Answers) -> bool:
        measured = checking.Measured(ragged, 256, answers)
        checking.check(measured, rows, expected, torch.bfloat16)
        return measured.matches

    logits, layers = expected.exits.logits, expected.exits.exit_layer
    assert matches(expected.exits)
    assert not matches(Answers(logits, layers.clamp_max(1)))
    assert not matches(Answers(logits, layers.roll(1)))
    assert not matches(Answers(torch.where(logits.argmax(1, keepdim=True) == 0, torch.nan, logits), layers))
    assert not matches(Answers(logits.roll(1, 0), layers))


def test_a_row_may_leave_where_its_scores_are_within_what_the_dtype_is_off(model):
    """The first exits' scores are e apart in both dtypes: the margin is 4 e."""
    rows, other = workload(20, 5), copy.deepcopy(model)
    with torch.no_grad():
        other.highways[0].classifier.bias += torch.tensor([0.1, 0.0])
    scores = exit_table(rx.accelerate(model), rows.sequences).scores[0]
    off = (scores - exit_table(rx.accelerate(other), rows.sequences).scores[0]).abs()
    threshold = float(scores.sort().values[9:11].mean())
    rule = rx.Entropy([threshold, -1.0, -1.0])
    found = checking.references(model, rule, rows, other)
    near = (scores - threshold).abs() <= 4 * off
    assert 0 < int(near.sum()) < 20
    assert torch.equal(found.may_leave[:, 1], near | (scores < threshold))
    assert torch.equal(found.may_leave[:, 3], near | (scores >= threshold))
    assert not found.may_leave[:, (0, 2)].any() and found.close == int(near.sum())
    assert checking.references(model, rule, rows).close == 0


def test_token_types_reach_every_contender(model, rule):
    """Where token types change the answers, one that drops them differs from the reference."""
    rows = workload(40, 6)
    pairs = replace(rows, token_type_ids=[[0] + [1] * (length - 1) for length in rows.lengths])
    loud = copy.deepcopy(model)
    torch.nn.init.normal_(loud.backbone.embeddings.token_type_embeddings.weight, std=3.0)
    expected = checking.references(loud, rule, pairs)

    def verdicts(asked: Workload) -> dict[str, bool]:
        found = {}
        for contender in contenders(loud, rx.accelerate(loud, rule=rule), batch_size=8):
            measured = checking.Measured(contender, 8, contender.run(asked, contender.sizes[0]))
            checking.check(measured, pairs, expected, torch.float32)
            found[contender.name] = measured.matches
        return found

    assert all(verdicts(pairs).values()), verdicts(pairs)
    assert not any(verdicts(rows).values()), verdicts(rows)


def test_json_and_picture(report, tmp_path):
    report.write_json(tmp_path / "deep" / "r.json")
    saved = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert set(saved) >= {"environment", "workload", "contenders", "realised_over_ideal", "roofline_fraction"}
    report.plot(tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
