"""The contenders under pytest-benchmark: pytest benchmarks [--benchmark-autosave] [--benchmark-compare]

Hidden 384, SST-2-like lengths, the same number of rows leaving at each of the 12 layers. Every contender's answers are
compared with its reference before it is timed, and every round is on other rows. Contenders run one after the other:
good for comparing two versions of this package; ratios between contenders are better taken from `ragged-exit bench` and
peers.py, which interleave them.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from ragged_exit.accelerate import accelerate
from ragged_exit.bench.check import Measured, References, check, references
from ragged_exit.bench.contenders import Contender, contenders
from ragged_exit.bench.environment import one_process_for_all
from ragged_exit.bench.synthetic import fit_heads, random_deebert, random_workload, uniform_rule
from ragged_exit.bench.workload import Workload

SIZES = {  # rows, or tokens for ours; not tuned, so that two versions run the same
    "padded": 32,
    "padded_sorted": 32,
    "padded_sorted_prepacked": 32,
    "batch1": 1,
    "padded_exit": 32,
    "ragged_full": 8192,
    "ragged": 8192,
}
SEED = 20
ROWS, CHECKED_ROWS, ROUNDS, THREADS = 256, 64, 3, 2


@pytest.fixture(scope="module")
def case() -> tuple[dict[str, Contender], Workload, References]:
    """The contenders by name, rows to check them on, and what they must answer."""
    one_process_for_all(THREADS)
    model = random_deebert("small", SEED)
    fit_heads(model, SEED + 100, "sst2")
    rule = uniform_rule(model, SEED, "sst2")
    checked = random_workload(CHECKED_ROWS, SEED + 1)
    found = {contender.name: contender for contender in contenders(model, accelerate(model, rule=rule))}
    return found, checked, references(model, rule, checked)


@pytest.mark.parametrize("name", SIZES)
def test_throughput(name: str, case: tuple, benchmark: Any) -> None:
    found, checked, expected = case
    contender, size = found[name], SIZES[name]
    measured = Measured(contender, size, contender.run(checked, size))
    check(measured, checked, expected, torch.float32)
    assert measured.matches, f"{measured.wrong_exits} wrong exits, logits differ by {measured.max_logit_error:.1e}"
    rows, number = min(ROWS, contender.rows or ROWS), itertools.count(1000)
    benchmark.extra_info["sequences a round"], benchmark.extra_info["batch size"] = rows, size

    def fresh() -> tuple[tuple[Workload, int], dict]:
        return (random_workload(rows, next(number)), size), {}

    benchmark.pedantic(contender.run, setup=fresh, rounds=ROUNDS, warmup_rounds=1)
