"""At least 100,000 rows through the exit ops of every implementation: no wrong decision outside the margin.

Each implementation is fuzzed in a process of its own, since an access out of bounds would kill it. By hand:
``python -m tests.fuzz.test_fuzz_ops native 1000000 --seed 7``. The line it prints counts the rows compared, the wrong
decisions outside the margin (must be 0) and the rows inside (at most 1 % of the whole run).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ragged_exit.batch import RaggedBatch
from ragged_exit.heads import MlpHead
from ragged_exit.ops import compact, exit_decide, exit_step
from ragged_exit.ops.dispatch import native_available
from ragged_exit.ops.exit_step import packed_for
from ragged_exit.rules import Entropy, ExitRule, LearnedUncertainty, MaxProb, Patience
from ragged_exit.testing import (
    Margin,
    MarginReport,
    MarginTally,
    assert_compacted,
    assert_plan,
    assert_same_decisions,
    decide_oracle,
    decision_margin,
    every_rule,
    quiet_threshold,
    random_batch,
    random_distances,
    random_head,
    random_lengths,
    random_logits,
    random_state,
    seeded,
    step_oracle,
)

ROOT = Path(__file__).parents[2]
ROWS = 100_000
RULES: list[ExitRule] = [
    *every_rule(),
    Entropy(0.5, compare="<="),
    MaxProb(0.5, compare=">=", temperature=2.0),
    LearnedUncertainty(0.5, compare=">"),
    Patience(1, tolerance=0.5),
]


def choose(generator: torch.Generator, options: tuple):
    return options[int(torch.randint(len(options), (), generator=generator))]


def set_threshold(
    rule: ExitRule, batch: RaggedBatch, scores: torch.Tensor, margin: Margin, generator: torch.Generator
) -> ExitRule:
    """One threshold in a gap of the scores, or in every third batch one a row: some other row's score, changed."""
    if choose(generator, (False, False, True)):
        order = torch.randperm(batch.rows, generator=generator)
        rows = torch.zeros(batch.row_capacity)
        rows[: batch.rows] = scores[order].float() * (0.7 + 0.6 * torch.rand(batch.rows, generator=generator))
        batch.state["threshold"] = rows
        return rule
    share = float(torch.rand((), generator=generator))
    return dataclasses.replace(rule, threshold=quiet_threshold(scores, share, margin.score))


def one_batch(impl: str, rows: int, index: int, generator: torch.Generator, tally: MarginTally) -> None:
    rule = RULES[index % len(RULES)]
    counts = rule.spec.score.endswith("patience")
    least = 1 if isinstance(rule, Patience) else 2
    classes = choose(generator, (2, 2, 3, 5, 20, 150)) if rule.needs != "prototypes" else choose(generator, (2, 3, 20))
    classes = classes if choose(generator, (True, True, True, False)) else least
    hidden_size = choose(generator, (32, int(torch.randint(4, 49, (), generator=generator))))
    # thresholds in fp32 sit among thousands of scores; in bf16 the margin is wide, and few rows leave a gap
    dtype = torch.float32 if choose(generator, (True, True, False)) else torch.bfloat16
    rows = rows if dtype == torch.float32 else 24
    spare = choose(generator, (0, 0, 5))
    lengths = random_lengths(rows, 8, generator)
    batch = random_batch(
        lengths, hidden_size, generator, dtype=dtype, spare_rows=spare, spare_tokens=spare * 3, token_ids=True
    )
    batch.state = random_state(rule, batch.row_capacity, classes, generator)
    final = choose(generator, (False,) * 9 + (True,))
    if choose(generator, (True, False)):
        logits = random_logits(batch.row_capacity, classes, generator, dtype=dtype)
        signal = None
        if rule.needs == "uncertainty":
            signal = torch.rand(batch.row_capacity, generator=generator)
        elif rule.needs == "prototypes":
            signal = random_distances(batch.row_capacity, classes, generator)
        first = decide_oracle(batch, logits, rule, signal=signal)
        margin = decision_margin([(exit_decide(batch, logits, rule, signal=signal, impl="reference"), first)], rule)
        if not counts:
            rule = set_threshold(rule, batch, first.score, margin, generator)
        oracle = decide_oracle(batch, logits, rule, final, signal=signal)
        decision = exit_decide(batch, logits, rule, final, signal=signal, impl=impl)
    else:
        head = fuzz_head(rule, hidden_size, classes, dtype, generator)
        first = step_oracle(batch, head, rule)
        margin = step_margin(batch, head, rule, generator)
        if not counts and dtype == torch.bfloat16:  # 2.5 margins from each row's score, on either side
            side = 2.5 * margin.score * (2 * torch.randint(2, (rows,), generator=generator) - 1)
            batch.state["threshold"] = torch.cat((first.score.float() + side, torch.zeros(spare)))
        elif not counts:
            rule = set_threshold(rule, batch, first.score, margin, generator)
        oracle = step_oracle(batch, head, rule, final)
        head = choose(generator, (head, packed_for(impl, head)))
        decision = exit_step(batch, head, rule, final, impl=impl)
    tally.add(assert_same_decisions(decision, oracle, margin, final=final))
    assert_plan(batch, decision)
    if int(decision.live[0]):
        capacity = int(decision.live[1]) + choose(generator, (0, 13))
        assert_compacted(batch, decision, compact(batch, decision, capacity, impl=impl), capacity)


def fuzz_head(
    rule: ExitRule, hidden_size: int, classes: int, dtype: torch.dtype, generator: torch.Generator
) -> MlpHead:
    return random_head(
        hidden_size,
        classes,
        generator,
        pooling=choose(generator, ("cls", "cls", "mean")),
        pooled_size=choose(generator, (None, 8, 32, 33)),
        bias=choose(generator, (True, True, False)),
        uncertainty=rule.needs == "uncertainty",
        prototype_size=choose(generator, (4, 17)) if rule.needs == "prototypes" else None,
        dtype=dtype,
    )


def step_margin(batch: RaggedBatch, head: MlpHead, rule: ExitRule, generator: torch.Generator) -> Margin:
    """The margin from plain PyTorch's error on the batch and on 200 rows more, so that few rows cannot be lucky."""
    assert batch.hidden is not None
    lengths = random_lengths(200, 3, generator)
    more = random_batch(lengths, batch.hidden.shape[1], generator, dtype=batch.hidden.dtype)
    more.state = random_state(rule, 200, head.num_labels, generator)
    return decision_margin(
        [(exit_step(some, head, rule, impl="reference"), step_oracle(some, head, rule)) for some in (batch, more)], rule
    )


def fuzz(impl: str, rows: int, seed: int) -> str:
    """Fuzz until ``rows`` rows are compared. Raises AssertionError at the first wrong decision (naming seed and batch),
    and at the end where more than 1 % of all rows lay inside the margin."""
    generator, tally = seeded(seed), MarginTally()
    sizes = (1, 2, 7, 33, 200, 1000) if impl == "triton" else (1, 2, 7, 33, 200, 1000, 4000)
    while tally.rows < rows:
        index = tally.batches
        try:
            one_batch(impl, choose(generator, sizes), index, generator, tally)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, batch {index}: {error}") from error
    tally.check()
    return f"{impl}: {tally}, 0 wrong outside it"


def test_the_whole_run_is_judged():
    """One batch may lie in a dense place; more than 1 % of all rows may not."""
    tally = MarginTally()
    tally.add(MarginReport(1000, 12))
    with pytest.raises(AssertionError, match="too many"):
        tally.check()
    tally.add(MarginReport(200, 0))
    tally.check()
    tally.add(MarginReport(100, 2))
    with pytest.raises(AssertionError, match="too many"):
        tally.check()


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_fuzz(impl):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if impl == "native" and not native_available():
            pytest.skip("the C++ extension is not built")
    if impl == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if impl == "triton" else {})
    command = [sys.executable, "-m", "tests.fuzz.test_fuzz_ops", impl, str(ROWS)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    print(run.stdout)
    assert "0 wrong" in run.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("impl", choices=("reference", "native", "triton"))
    parser.add_argument("rows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1 if chosen.impl == "triton" else 2)  # the interpreter has one thread
    print(fuzz(chosen.impl, chosen.rows, chosen.seed))
