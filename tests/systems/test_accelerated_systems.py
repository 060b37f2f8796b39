"""Every system accelerated, as one ragged batch, answers as its plain model does row by row."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from system_cases import BY_THRESHOLD, CASES, LAYERS, Case, Reference, Tip, batch_of, config_of, randomised
from tiny import impls, native_built, random_rows
from torch import Tensor

import ragged_exit as rx
from ragged_exit.outputs import ExitOutput

MARGIN = 1e-5  # on what decides
TOLERANCE = 2e-5  # on logits and scores in fp32
NAMES = [case.name for case in CASES]

exit_subsets = st.one_of(
    st.none(),
    st.sets(st.integers(1, LAYERS - 1)).map(lambda layers: [*sorted(layers), LAYERS]),
)


def assert_same(output: ExitOutput, found: Reference, tolerance: float = TOLERANCE) -> None:
    for name in ("exit_layer", "exit_member", "executed_layers"):
        assert torch.equal(getattr(output, name), found.gather(name)), name
    for name in ("logits", "score"):
        torch.testing.assert_close(getattr(output, name), found.gather(name), rtol=0, atol=tolerance)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("case", CASES, ids=NAMES)
@settings(max_examples=8)
@given(
    data=st.data(),
    seed=st.integers(0, 10_000),
    exit_layers=exit_subsets,
    count=st.integers(1, 8),
    share=st.sampled_from((0.1, 0.4, 0.7)),
)
def test_accelerated_equals_the_reference_row_by_row(
    case: Case, impl: str, data: st.DataObject, seed: int, exit_layers: list[int] | None, count: int, share: float
) -> None:
    kind = data.draw(st.sampled_from(case.backbones))
    model = case.build(kind, seed, exit_layers)
    rows = random_rows(count, seed, longest=12)
    found = Reference(model, rows)
    model.rule = found.quiet(share)
    found.use(model.rule)
    assume(found.closest_tie() > MARGIN)
    ids, mask = batch_of(rows, kind)
    assert_same(rx.accelerate(model, impl=impl)(ids, mask), found)
    with torch.no_grad():
        assert_same(model(ids, mask), found)  # the padded reference as one batch


@pytest.mark.skipif(not native_built(), reason="the C++ extension is not built")
@pytest.mark.parametrize("name", ["berxit", "deebert_mean", "fastbert", "pabee", "de3bert"])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra"])
def test_a_rows_bits_depend_on_that_row_alone_in_every_kind_of_head(name: str, kind: str) -> None:
    case = next(case for case in CASES if case.name == name)
    if kind not in case.backbones:
        pytest.skip(f"{name} is not for {kind}")
    model = case.build(kind, 0)
    rows = random_rows(70, 3, longest=12)
    model.rule = Reference(model, rows).quiet(0.3)
    fast = rx.accelerate(model, impl="native")
    alone = [fast(*batch_of([row], kind)) for row in rows]
    for count in (7, 33, 70):
        together = fast(*batch_of(rows[:count], kind))
        for field in ("logits", "score", "exit_layer"):
            assert torch.equal(getattr(together, field), torch.cat([getattr(row, field) for row in alone[:count]]))


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_copy_answers_alike(case: Case, impl: str) -> None:
    fast = rx.accelerate(case.build(case.backbones[-1], 0), impl=impl)
    inputs = batch_of(random_rows(9, 3, longest=12), case.backbones[-1])
    expected = fast(*inputs)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(again(*inputs).logits, expected.logits)
        again.refresh()
        assert again._source[0] is not fast._source[0]
        assert torch.equal(again(*inputs).logits, expected.logits)


INNER = {
    "patience": (rx.Pabee, rx.Patience(1)),
    "bandit": (rx.ElasticBert, rx.UcbMaxProb()),
    "prototypes": (rx.De3Bert, rx.DistanceEntropy(0.3)),
    "tokens": (rx.FastBert, rx.Entropy(0.5, dialect="categorical")),
}


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("kind", INNER)
def test_a_cascade_of_early_exit_models_restarts_their_rules_with_the_rows(kind: str, place: int, impl: str) -> None:
    """Row state, thresholds per row and lessons of a member begin anew with the rows that reach it."""
    system, rule = INNER[kind]
    config = config_of("bert")
    members = [randomised(rx.FullDepth(config_of("bert", num_hidden_layers=3)), 3), randomised(rx.Pabee(config), 5)]
    members.insert(place, randomised(system(config, copy.deepcopy(rule)), 4))
    members[-1].rule = rx.Patience(2)
    plain = rx.CascadeBert.from_members(members, rx.MaxProb(0.8))
    source = copy.deepcopy(plain)  # what a bandit learns in one must not reach the other
    ids, mask = batch_of(random_rows(16, 2, longest=10), "bert")
    with torch.no_grad():
        expected = plain(ids, mask)
    output = rx.accelerate(source, impl=impl)(ids, mask)
    for name in ("exit_layer", "exit_member", "executed_layers"):
        assert torch.equal(output[name], expected[name]), name
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=TOLERANCE)
    assert len(set(zip(output.exit_member.tolist(), output.exit_layer.tolist(), strict=True))) > 2
    depths = torch.tensor([0, *(member.config.num_hidden_layers for member in members)]).cumsum(0)
    assert torch.equal(output.executed_layers, depths[output.exit_member - 1] + output.exit_layer)
    if kind == "bandit":
        learned = [cascade.members[place].rule.state_dict() for cascade in (source, plain)]
        assert learned[0]["rewarded"] == learned[1]["rewarded"] and sum(learned[0]["rewarded"]) > 0
        assert learned[0]["reward_sum"] == pytest.approx(learned[1]["reward_sum"], abs=1e-4)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_rows_leave_at_several_exits(case: Case) -> None:
    """The property above is not about models in which everybody leaves at once."""
    model = case.build(case.backbones[0], seed=1)
    rows = random_rows(24, seed=1, longest=12)
    found = Reference(model, rows)
    found.use(found.quiet(0.4))
    executed = found.gather("executed_layers")
    assert executed.unique().numel() > 1, executed.tolist()


@pytest.mark.parametrize("case", BY_THRESHOLD, ids=lambda case: case.name)
def test_thresholds_per_exit_count_exits_and_layers_are_reported(case: Case) -> None:
    model = case.build(case.backbones[0], 0, [2, LAYERS])
    always, never = (1e9, -1e9) if case.rule.compare.startswith("<") else (-1e9, 1e9)
    ids, mask = batch_of(random_rows(3, longest=8), case.backbones[0])
    layers = {True: 2, False: LAYERS}
    for leaves in (True, False):
        fast = rx.accelerate(model, threshold=[always if leaves else never, never], impl="reference")
        assert fast(ids, mask).exit_layer.tolist() == [layers[leaves]] * 3
    with pytest.raises(ValueError, match=r"threshold: expected one number or 2 \(one per exit\), got 4"):
        rx.accelerate(model, threshold=[0.1] * 4)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("case", BY_THRESHOLD, ids=lambda case: case.name)
def test_bf16_errs_no_more_than_plain_bf16_does(case: Case, impl: str) -> None:
    """Every exit's logits, from runs that stop there: the error to fp64 is within twice that of the bf16 reference."""
    kind = case.backbones[0]
    model = case.build(kind, seed=2)
    ids, mask = batch_of(random_rows(12, seed=2, longest=12), kind)
    exact = _all_logits(case.build(kind, seed=2).double(), ids, mask)
    plain = _all_logits(model.to(torch.bfloat16), ids, mask)
    always, never = (1e9, -1e9) if case.rule.compare.startswith("<") else (-1e9, 1e9)
    for index in range(model.num_exits):
        thresholds = [never] * model.num_exits
        thresholds[index] = always
        logits = rx.accelerate(model, threshold=thresholds, impl=impl)(ids, mask).logits
        place = min(index, len(exact) - 1)  # deebert's last highway is asked before its final classifier
        budget = 2 * (plain[place] - exact[place]).square().mean().sqrt() + 1e-3
        assert (logits - exact[place]).square().mean().sqrt() <= budget, index


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_bf16_decides_as_float64_outside_the_margin(case: Case, record_property: Any) -> None:
    """Rows and thresholds are taken so that no asked exit is within the margin: 4 times what plain bf16 errs there."""
    kind = case.backbones[0]
    rows = random_rows(32, seed=1, longest=12)
    exact = Reference(case.build(kind, seed=1).double(), rows)
    plain = Reference(case.build(kind, seed=1).to(torch.bfloat16), rows)
    rule = exact.quiet(0.4)
    exact.use(rule)
    plain.use(rule)
    clear = rows_outside_the_margin(exact, plain)
    record_property("rows inside the margin", len(rows) - len(clear))
    assert len(clear) >= len(rows) // 2
    expected = exact.gather("executed_layers")[clear]
    assert expected.unique().numel() > 1
    ids, mask = batch_of([rows[row] for row in clear], kind)
    for impl in ["reference", *(["native"] if native_built() else [])]:
        fast = rx.accelerate(case.build(kind, seed=1), rule=rule, dtype=torch.bfloat16, impl=impl)
        output = fast(ids, mask)
        assert torch.equal(output.executed_layers, expected), impl
        assert torch.equal(output.exit_layer, exact.gather("exit_layer")[clear]), impl


def rows_outside_the_margin(exact: Reference, plain: Reference) -> list[int]:
    """The rows whose decisions, up to the exit that answers in float64, are further from the bar than the margin."""
    pairs = list(zip(exact.tips(), plain.tips(), strict=True))
    margins: dict[tuple[int, str], float] = {}  # of an exit and what it goes by

    def widen(place: int, name: str, exact_tip: Tip, plain_tip: Tip) -> None:
        error = abs(exact_tip.value - plain_tip.value)
        margins[place, name] = max(MARGIN, 4 * error, margins.get((place, name), 0.0))

    def is_clear(tips: dict[str, Tip], place: int, names: Iterable[str]) -> bool:
        return all(abs(tips[name].value - tips[name].bar) > margins[place, name] for name in names)

    for name in ("entropy", "change", "choice", "score"):  # a score is compared where the choice below it is clear
        for exact_row, plain_row in pairs:
            for place, (tips, other) in enumerate(zip(exact_row, plain_row, strict=True)):
                if name in tips and (name != "score" or is_clear(tips, place, tips.keys() - {name})):
                    widen(place, name, tips[name], other[name])
    leaves = exact.gather("executed_layers").tolist()
    asked = [
        [point.executed_layers for point in points].index(left)
        for points, left in zip(exact.points, leaves, strict=True)
    ]
    return [
        number
        for number, (tips, _) in enumerate(pairs)
        if all(is_clear(tips[place], place, tips[place]) for place in range(min(asked[number] + 1, len(tips) - 1)))
    ]


def _all_logits(model: rx.EarlyExitModel, ids: Tensor, mask: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [point.output.logits.double() for point in model.exit_points(ids, mask, None)]


INTERPRETED = """
import torch
from system_cases import CASES, Reference, batch_of
from test_accelerated_systems import assert_same
from tiny import random_rows
import ragged_exit as rx

torch.set_num_threads(1)
systems = {"deebert", "berxit", "berxit_regression", "de3bert", "cascade", "pabee", "elasticbert", "fastbert"}
for case in [case for case in CASES if case.name in systems]:  # the op suites have every rule
    kind = case.backbones[0]
    rows = random_rows(3, 3, longest=5)
    counts = case.rule.spec.score.endswith("patience")  # and cannot leave before its third exit
    for seed in range(100):  # the first model whose rows leave at several exits
        model = case.build(kind, seed, None if counts else [1, 4])
        found = Reference(model, rows)
        found.use(found.quiet(0.4))
        if found.gather("executed_layers").unique().numel() > 1 and found.closest_tie() > 1e-4:
            break
    else:
        raise AssertionError(case.name)
    ids, mask = batch_of(rows, kind)
    assert_same(rx.accelerate(model, rule=found.rule, impl="triton")(ids, mask), found, 5e-5)
    print(case.name, "agrees")
"""


def test_the_interpreted_triton_kernels_agree() -> None:
    """In a process of its own: the interpreter is chosen before triton is imported."""
    pytest.importorskip("triton")
    pytest.importorskip("ragged_exit.ops.triton")
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *sys.path]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == 8
