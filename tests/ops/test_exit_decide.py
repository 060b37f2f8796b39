"""exit_decide: every score against float64 and against published values, the comparisons' edges, and row state."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import INTERPRETED, check_decide, decide, decide_cases, has_ties, seeds

from ragged_exit.ops import exit_decide
from ragged_exit.rules import (
    COMPARISONS,
    ENTROPY_DIALECTS,
    ConfidentPatience,
    DistanceEntropy,
    Energy,
    Entropy,
    LearnedUncertainty,
    MaxProb,
    Patience,
)
from ragged_exit.testing import (
    ENOUGH_ROWS,
    MarginTally,
    assert_error_budget,
    assert_plan,
    assert_same_decisions,
    assert_same_values,
    decide_oracle,
    random_batch,
    random_logits,
    random_state,
    seeded,
)

TALLY = MarginTally()
LN2 = math.log(2)
LARGEST = torch.finfo(torch.float32).max


def entropy_of(logits: list[float], dialect: str, impl: str, device: str) -> float:
    return float(decide([logits], Entropy(0.5, dialect=dialect), impl, device).score[0])


@given(data=st.data())
def test_decides_as_the_oracle(impl, dtype, device, data):
    case = data.draw(decide_cases(dtype, device))
    report, decision, oracle = check_decide(case, impl)
    if not has_ties(case.rule, dtype):
        TALLY.add(report)
    live = case.batch.rows
    assert_same_values(decision.logits[:live], case.logits[:live].float())
    if not oracle.counts:
        plain = exit_decide(case.batch, case.logits, case.rule, signal=case.signal, impl="reference")
        assert_error_budget(decision.score[:live], plain.score[:live], oracle.score, torch.float32)


def test_rows_inside_the_margin():
    if TALLY.rows < ENOUGH_ROWS:
        pytest.skip(f"{TALLY}: too few to mean anything")
    TALLY.check()


# SYSTEMS' table, from the published formulas; "exact" and "normalised" are the true entropy.
REFERENCE_VALUES = [
    (
        [0.0, 0.0],
        {"hf": 0.69314718, "castorini": 0.69314718, "categorical": 1.0, "exact": LN2, "normalised": 1.0},
        1e-6,
    ),
    ([5.0, -5.0], {"hf": 4.99725e-4, "castorini": 4.99398e-4, "categorical": 7.2048e-4, "exact": 4.993984e-4}, 1e-6),
    ([20.0, -20.0], {"hf": 1.907e-6, "castorini": 1.7e-16, "categorical": 1.72e-7, "exact": 1.7e-16}, 2e-9),
    ([-1.0, -2.0], {"hf": 0.5822032, "castorini": 0.5822031, "categorical": 0.83994, "exact": 0.58220309}, 4e-6),
]


def hf_slack(on_cpu: float, largest: float, device: str) -> float:
    """How far a kernel's hf, ln A - B / A, may be from the literal formula: for large logits both terms are near one.

    On a GPU 4 ulp of the largest logit: two of the quotient (div.full), one of the logarithm, one of what goes in
    (ex2.approx, and the rounding of a product).
    """
    ulp = 2.0 ** (math.frexp(largest)[1] - 24)
    return max(on_cpu, 4 * ulp) if device == "cuda" else on_cpu


@pytest.mark.parametrize(("logits", "expected", "tolerance"), REFERENCE_VALUES, ids=lambda value: str(value)[:14])
def test_reference_values(impl, device, logits, expected, tolerance):
    for dialect, value in expected.items():
        # a kernel's hf may differ from the literal formula by its own error, on a CPU 4e-6 at most
        slack = hf_slack(4e-6, max(logits), device) if dialect == "hf" and impl != "reference" else tolerance
        assert entropy_of(logits, dialect, impl, device) == pytest.approx(value, abs=slack), dialect


def test_the_dialects_differ(impl, device):
    """Logits on which each dialect gives itself away."""
    hf, castorini, categorical, normalised, exact = (
        lambda logits, dialect=dialect: entropy_of(logits, dialect, impl, device)
        for dialect in ("hf", "castorini", "categorical", "normalised", "exact")
    )
    assert math.isnan(hf([100.0, 0.0])) and math.isnan(hf([1e4, 0.0]))  # e^z overflows
    assert not math.isnan(castorini([89.0, 0.0])) and exact([1e4, 0.0]) == 0
    assert math.isnan(castorini([60.0, -60.0]))  # p underflows, 0 ln 0
    assert hf([60.0, -60.0]) == pytest.approx(0, abs=hf_slack(1e-5, 60.0, device)) and exact([60.0, -60.0]) == 0
    assert categorical([20.0, -20.0]) == pytest.approx(1.72e-7, rel=0.01)  # its floor for two classes
    assert categorical([1e4, 0.0]) == pytest.approx(1.72e-7, rel=0.01)
    assert 0 <= normalised([20.0, -20.0]) < 1e-12
    four = [1.0, 0.5, -1.0, 0.0]
    assert normalised(four) == pytest.approx(exact(four) / math.log(4), abs=1e-6)
    assert categorical(four) == pytest.approx(exact(four) / math.log(4), abs=1e-6)
    assert castorini(four) == pytest.approx(exact(four), abs=1e-6) and exact(four) > 1.0
    for bad in ([math.inf, 0.0], [math.nan, 0.0]):
        assert all(math.isnan(entropy_of(bad, dialect, impl, device)) for dialect in ENTROPY_DIALECTS)


@pytest.mark.parametrize(("dialect", "fixture"), [("hf", "deebert_hf.pt"), ("castorini", "deebert_castorini_c2.pt")])
def test_literal_formulas_reproduce_the_originals_bits(shared, dialect, fixture):
    edges = torch.load(shared / "fixtures" / fixture, weights_only=True)["entropy_edges"]
    assert len(edges) >= 10
    for key, expected in edges.items():
        logits = json.loads(key.replace("inf", "Infinity").replace("nan", "NaN"))
        actual = entropy_of(logits, dialect, "reference", "cpu")
        assert actual == expected or (math.isnan(actual) and math.isnan(expected)), f"{key}: {actual!r}, {expected!r}"


@given(
    rows=st.lists(
        st.lists(
            st.one_of(
                st.floats(-LARGEST, LARGEST, width=32),
                st.floats(-20, 20, width=32),
                st.sampled_from((0.0, -0.0, 1e-30, 88.7, 89.0, -104.0, -math.inf, LARGEST, -LARGEST)),
            ),
            min_size=3,
            max_size=3,
        ),
        min_size=1,
        max_size=8,
    )
)
def test_exact_is_never_negative(impl, device, rows):
    """Whatever the logits: in [0, ln C], and NaN only where no finite logit is left."""
    score = decide(rows, Entropy(0.0), impl, device).score.cpu()
    for row, value in zip(rows, score.tolist(), strict=True):
        if all(z == -math.inf for z in row):
            assert math.isnan(value)
        else:
            assert 0 <= value <= math.log(3) + 1e-6
    assert not decide(rows, Entropy(0.0), impl, device).exits.any()  # so a threshold of 0 lets nobody leave


def test_masked_classes(impl, device):
    """A logit of -inf is a class that cannot be: exact, normalised, categorical and max_prob see the others alone."""
    masked, plain = [[1.0, -math.inf, 0.5, -math.inf]], [[1.0, 0.5]]
    for rule in (Entropy(0.4), MaxProb(0.4), MaxProb(0.4, temperature=2.0), Energy(0.4)):
        expected = decide(plain, rule, "reference", "cpu").score
        torch.testing.assert_close(decide(masked, rule, impl, device).score.cpu(), expected, rtol=1e-6, atol=1e-7)
    expected = decide(plain, Entropy(0.4), "reference", "cpu").score / math.log(4)
    for dialect in ("normalised", "categorical"):
        actual = decide(masked, Entropy(0.4, dialect=dialect), impl, device).score.cpu()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_one_class(impl, device):
    """No uncertainty to speak of: entropy 0, probability 1; what divides by ln 1 never exits."""
    assert decide([[3.0]], Entropy(0.5), impl, device).score.tolist() == [0.0]
    assert decide([[3.0]], MaxProb(0.5), impl, device).score.tolist() == [1.0]
    assert float(decide([[1.5]], Energy(0.5), impl, device).score[0]) == pytest.approx(
        1 / (1 + math.exp(1.5)), abs=1e-6
    )
    for dialect in ("normalised", "categorical"):
        decision = decide([[3.0]], Entropy(99.0, dialect=dialect), impl, device)
        assert not math.isfinite(decision.score[0]) and not decision.exits[0]


def test_energy_and_temperature(impl, device):
    """COSEE's literal 1 / (1 + (sum e^(z/T))^T), and max softmax(z/T); an overflowing sum gives 0 and so an exit."""
    z = [1.0, -0.5, 0.25]
    for temperature in (0.5, 1.0, 3.0):
        total = sum(math.exp(value / temperature) for value in z)
        score = decide([z], Energy(0.5, temperature=temperature), impl, device).score[0]
        assert float(score) == pytest.approx(1 / (1 + total**temperature), abs=2e-6)
        score = decide([z], MaxProb(0.5, temperature=temperature), impl, device).score[0]
        assert float(score) == pytest.approx(math.exp(1.0 / temperature) / total, abs=1e-6)
    overflow = decide([[1000.0, 0.0]], Energy(0.5), impl, device)
    assert overflow.score.tolist() == [0.0] and overflow.exits.tolist() == [True]


@pytest.mark.parametrize("compare", COMPARISONS)
def test_comparisons_at_equality(impl, device, compare):
    signal = torch.tensor([0.25, 0.5, 0.75, math.nan], device=device)
    decision = decide([[0.0, 1.0]] * 4, LearnedUncertainty(0.5, compare=compare), impl, device, signal=signal)
    expected = {
        "<": [True, False, False, False],
        "<=": [True, True, False, False],
        ">": [False, False, True, False],
        ">=": [False, True, True, False],
    }[compare]
    assert decision.exits.tolist() == expected
    assert_same_values(decision.score, signal)
    assert decide([[0.0, 1.0]] * 4, MaxProb(0.5), impl, device, final=True).exits.all()


def test_infinite_thresholds(impl, device):
    for rule, exits in (
        (Entropy(math.inf), True),
        (Entropy(-math.inf), False),
        (MaxProb(math.inf), False),
        (MaxProb(-math.inf), True),
    ):
        assert decide([[0.3, 1.0]] * 2, rule, impl, device).exits.tolist() == [exits] * 2


# shapes, memory, dtypes, errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 1023, 1024, 1025, 4096, 50_000])
def test_many_classes(impl, device, classes):
    generator = seeded(classes)
    logits = random_logits(3, classes, generator, device=device)
    rules = [Entropy(0.5), Energy(0.1), MaxProb(0.02), Patience(2, tolerance=0.3)]
    if classes > 1:
        rules += [Entropy(0.5, dialect=dialect) for dialect in ("hf", "castorini", "categorical", "normalised")]
        rules += [DistanceEntropy(0.4, dr_order=order) for order in ("prob", "distance")]
        rules.append(ConfidentPatience(2, tolerance=0.5))
    if INTERPRETED and classes > 10_000:  # one rule of each pass over the classes
        rules = [Entropy(0.5), Patience(2), DistanceEntropy(0.4)]
    distances = 0.1 + torch.rand(3, classes, generator=generator).to(device)
    for rule in rules:
        batch = random_batch([1, 4, 2], 1, generator, device=device)
        batch.state = random_state(rule, 3, classes, generator, device=device)
        signal = distances if rule.needs else None
        oracle = decide_oracle(batch, logits, rule, signal=signal)
        decision = exit_decide(batch, logits, rule, signal=signal, impl=impl)
        assert_same_decisions(decision, oracle)
        if not oracle.counts:
            plain = exit_decide(batch, logits, rule, signal=signal, impl="reference")
            assert_error_budget(decision.score, plain.score, oracle.score, torch.float32)


def test_many_rows(impl, device):
    """More rows than any block of a kernel: the plan crosses block borders in order."""
    rows = 600 if INTERPRETED else 5000
    generator = seeded(3)
    logits = random_logits(rows, 2, generator, device=device)
    lengths = torch.randint(1, 9, (rows,), generator=generator).tolist()
    batch = random_batch(lengths, 1, generator, device=device, spare_rows=3, spare_tokens=3)
    logits = torch.cat((logits, torch.full((3, 2), math.nan, device=device)))
    rule = Entropy(0.3)
    decision = exit_decide(batch, logits, rule, impl=impl)
    report = assert_same_decisions(decision, decide_oracle(batch, logits, rule))
    assert report.inside <= 0.01 * rows
    assert_plan(batch, decision)
    assert 0.2 * rows < int(decision.exits.sum()) < 0.8 * rows and report.rows == rows


def test_low_precision_logits_are_upcast_first(impl, device):
    logits = random_logits(9, 5, seeded(4), dtype=torch.bfloat16, device=device)
    for rule in (Entropy(0.4), Entropy(0.4, dialect="hf"), MaxProb(0.5), Energy(0.2)):
        low, high = (decide(some, rule, impl, device) for some in (logits, logits.float()))
        for a, b in zip(low[:6], high[:6], strict=True):
            assert_same_values(a, b)


def test_odd_memory(impl, device):
    logits = random_logits(9, 5, seeded(5), device=device)
    distances = torch.rand(9, 5, generator=seeded(6)).to(device)
    wide = torch.full((9, 11), math.nan, device=device)
    wide[:, 3:8] = logits
    for rule in (Entropy(0.4), DistanceEntropy(0.4)):
        signal = distances if rule.needs else None
        expected = decide(logits, rule, impl, device, signal=signal)
        for some in (wide[:, 3:8], logits.T.contiguous().T, logits.repeat_interleave(2, 1)[:, ::2]):
            odd = distances.T.contiguous().T if rule.needs else None
            for a, b in zip(decide(some, rule, impl, device, signal=odd)[:6], expected[:6], strict=True):
                assert_same_values(a, b)


def test_batch_invariance(impl, device):
    if impl == "reference":
        pytest.skip("the reference makes no such promise")
    logits = random_logits(40, 7, seeded(7), device=device)
    order = torch.randperm(40, generator=seeded(8)).tolist()
    for dialect in ENTROPY_DIALECTS:
        together = decide(logits, Entropy(0.4, dialect=dialect), impl, device).score
        for some in (order, order[:1], order[:2], order[:17]):
            alone = decide(logits[some], Entropy(0.4, dialect=dialect), impl, device).score
            assert_same_values(alone, together[some])


def test_never_returns_an_input(impl, device):
    logits = random_logits(4, 3, seeded(9), device=device)
    signal = torch.rand(4, generator=seeded(10)).to(device)
    batch = random_batch([1, 2, 1, 3], 1, seeded(11), device=device)
    batch.state = random_state(Patience(2), 4, 3, seeded(12), device=device)
    for rule in (LearnedUncertainty(0.5), Patience(2), ConfidentPatience(2, tolerance=0.5)):
        inputs = [logits, signal, batch.cu_seqlens, batch.live, *batch.state.values()]
        copies = [value.clone() for value in inputs]
        decision = exit_decide(batch, logits, rule, signal=signal if rule.needs else None, impl=impl)
        outputs = [*decision[:6], *decision.state.values()]
        storages = [value.untyped_storage().data_ptr() for value in [*inputs, *outputs]]
        assert len(set(storages)) == len(storages)
        for value, copy in zip(inputs, copies, strict=True):
            assert_same_values(value, copy)


@given(seed=seeds)
def test_scores_ignore_the_threshold(impl, device, seed):
    """The score is the score: the same with every threshold, and with final."""
    logits = random_logits(5, 3, seeded(seed), device=device)
    decisions = [decide(logits, Entropy(threshold), impl, device) for threshold in (0.0, 0.5, 9.0)]
    decisions.append(decide(logits, Entropy(0.5), impl, device, final=True))
    for decision in decisions[1:]:
        assert_same_values(decision.score, decisions[0].score)
    assert [int(decision.exits.sum()) for decision in (decisions[0], decisions[2], decisions[3])] == [0, 5, 5]


def test_errors_name_the_argument(impl, device):
    batch = random_batch([1, 2], 1, seeded(13), device=device)
    logits = torch.zeros(2, 3, device=device)
    for bad in (logits[:1], logits[0], logits.int()):
        with pytest.raises(ValueError, match="logits: expected float"):
            exit_decide(batch, bad, Entropy(0.4), impl=impl)
    with pytest.raises(ValueError, match="logits: expected the device of batch"):
        exit_decide(batch, torch.zeros(2, 3, device="meta"), Entropy(0.4), impl=impl)
    for rule, shape in ((LearnedUncertainty(0.4), (2,)), (DistanceEntropy(0.4), (2, 3))):
        with pytest.raises(ValueError, match=r"signal: .* got None"):
            exit_decide(batch, logits, rule, impl=impl)
        with pytest.raises(ValueError, match=r"signal: .* got \[7\]"):
            exit_decide(batch, logits, rule, signal=torch.zeros(7, device=device), impl=impl)
        with pytest.raises(ValueError, match="signal: expected the device of batch"):
            exit_decide(batch, logits, rule, signal=torch.zeros(shape, device="meta"), impl=impl)
        exit_decide(batch, logits, rule, signal=torch.full(shape, 0.5, device=device), impl=impl)
    with pytest.raises(ValueError, match="at least 2 classes"):
        exit_decide(batch, logits[:, :1], DistanceEntropy(0.4), signal=torch.zeros(2, 1, device=device), impl=impl)
    with pytest.raises(ValueError, match="row state"):
        exit_decide(batch, logits, Patience(2), impl=impl)
    good = {"counter": torch.zeros(2, dtype=torch.int32, device=device), "previous": torch.zeros(2, device=device)}
    for key, bad in (
        ("counter", good["counter"].long()),
        ("counter", good["counter"][:1]),
        ("previous", good["previous"].double()),
        ("previous", good["previous"].to("meta")),
    ):
        batch.state = good | {key: bad}
        with pytest.raises(ValueError, match=f'state."{key}".: expected torch'):
            exit_decide(batch, logits, Patience(2), impl=impl)
    batch.state = good | {"threshold": torch.zeros(2, device="meta")}
    with pytest.raises(ValueError, match=r'state."threshold".: expected torch.float32 .* on meta'):
        exit_decide(batch, logits, Patience(2), impl=impl)
