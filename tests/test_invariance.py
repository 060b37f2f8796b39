"""The promise of the native CPU path, in fp32 and on own linears: a row's bits depend on that row alone.

Not "close": equal to the bit, in logits, score and exit layer, however 500 rows are grouped and ordered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from tiny import bert_config, native_built, one_thread, random_rows, tiny_deebert  # noqa: F401
from torch import Tensor

import ragged_exit as rx
from ragged_exit.executor import ExitRecord
from ragged_exit.linears import prepacking_available
from ragged_exit.ops import linears_available
from ragged_exit.testing.compare import quiet_threshold

pytestmark = [
    pytest.mark.skipif(not native_built(), reason="the C++ extension is not built"),
    pytest.mark.skipif(
        not linears_available(torch.float32) and not prepacking_available(),
        reason="neither own linears here nor prepacked oneDNN ones in this torch",
    ),
]


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """An accelerated model, rows for it, and what each row answers in a batch of one."""

    fast: rx.AcceleratedModel
    rows: list[list[int]]
    alone: ExitRecord

    def run(self, places: list[int]) -> ExitRecord:
        batch = self.fast.encoder.pack_sequences([self.rows[place] for place in places])
        with torch.inference_mode():
            return self.fast.executor.run(batch)

    def check(self, groups: list[list[int]]) -> None:
        """Run these groups and compare every row, bit by bit, with its answer alone."""
        for places in groups:
            for name, got, expected in zip(ExitRecord._fields, self.run(places), self.alone, strict=True):
                same = bits(got) == bits(expected[places])
                if not bool(same.all()):
                    row = int((~same).nonzero()[0, 0])
                    alone = expected[places[row]].tolist()
                    raise AssertionError(
                        f"{name} of row {places[row]}, {row} of {len(places)}: {got[row].tolist()}, alone {alone}"
                    )


def bits(values: Tensor) -> Tensor:
    """fp32 as the integers that it is stored as: tells -0 from 0, and NaN equals itself."""
    return values.contiguous().view(torch.int32) if values.dtype == torch.float32 else values


def make(
    rows: int,
    longest: int,
    *,
    pooling: str = "cls",
    rule: rx.ExitRule | None = None,
    dtype: torch.dtype = torch.float32,
    **config: int | str,
) -> Case:
    """The default rule is an entropy whose threshold spreads the rows over the exits."""
    model = tiny_deebert(bert_config(max_position_embeddings=longest, **config), pooling=pooling)
    fast = rx.accelerate(model, threshold=-1.0, impl="native", dtype=dtype)
    sequences = random_rows(rows, seed=7, longest=longest)
    case = Case(fast, sequences, alone=None)  # type: ignore[arg-type]
    if rule is None:
        scores: list[Tensor] = []
        fast.executor.run(fast.encoder.pack_sequences(sequences), lambda decision: scores.append(decision.score))
        rule = rx.Entropy([quiet_threshold(score, 0.3) for score in scores])
    case.fast = rx.accelerate(model, rule=rule, impl="native", dtype=dtype)
    with threads(1):  # a fixture of a module does not have the thread count of its tests
        singles = [case.run([place]) for place in range(rows)]
    case.alone = ExitRecord(*(torch.cat(columns) for columns in zip(*singles, strict=True)))
    shares = case.alone.exit_layer.bincount() / rows
    several = 3 if isinstance(rule, rx.Entropy) else 2
    assert (shares > 0).sum() >= several, f"rows should leave at several exits, and leave by {shares.tolist()}"
    return case


def regroupings(rows: int, count: int, seed: int) -> Iterator[list[list[int]]]:
    """``count`` random orders, each cut into groups of random size, from a few rows to all at once."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        order = torch.randperm(rows, generator=generator).tolist()
        largest = 2 ** (number % 4 + 6)  # 64 ... 512
        groups = []
        while order:
            size = int(torch.randint(max(1, largest // 4), largest + 1, (), generator=generator))
            groups.append(order[:size])
            order = order[size:]
        yield groups


@pytest.fixture(scope="module")
def small() -> Case:
    return make(500, 16, hidden_size=64, num_attention_heads=4, intermediate_size=128)


def test_500_rows_in_200_regroupings(small: Case) -> None:
    for groups in regroupings(500, 200, seed=0):
        small.check(groups)


def test_two_threads_change_no_bit(small: Case) -> None:
    """Answers with one thread and with two are the same, and two keep the promise too."""
    with threads(2):
        for groups in regroupings(500, 6, seed=1):
            small.check([group for group in groups if len(group) > 10][:8])  # of all sizes, and not for long


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu", "tanh"])
def test_three_threads_and_other_activations(activation: str) -> None:
    """PyTorch cuts an activation's numbers into equal shares, of which a third may end anywhere in a row."""
    case = make(60, 16, hidden_size=32, num_attention_heads=4, intermediate_size=992, hidden_act=activation)
    with threads(3):
        for groups in regroupings(60, 4, seed=5):
            case.check([list(range(60)), *groups])


def test_every_row_beside_every_number_of_neighbours(small: Case) -> None:
    """One row among 0 ... 80 copies of others: every small token bucket, every place of a vector register."""
    for size in range(1, 81):
        small.check([[(size + 7 * place) % 500 for place in range(size)]])


def test_the_same_row_twice_in_a_batch(small: Case) -> None:
    small.check([[3] * 40, [3, 4] * 20, list(range(20)) * 3])


@pytest.mark.parametrize("rule", [None, rx.Patience(1)], ids=["entropy", "patience"])
def test_mean_pooling_and_patience(rule: rx.ExitRule | None) -> None:
    case = make(120, 16, pooling="mean", rule=rule, hidden_size=64, num_attention_heads=4, intermediate_size=128)
    for groups in regroupings(120, 12, seed=2):
        case.check(groups)


def test_hidden_384() -> None:
    """The embedded default's width: more groups of weights, and sequences of several attention tiles."""
    case = make(64, 70, hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_hidden_layers=3)
    for groups in regroupings(64, 6, seed=3):
        case.check(groups)


@pytest.mark.skipif(not linears_available(torch.bfloat16), reason="no kernels for bfloat16 linears")
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_bfloat16(pooling: str) -> None:
    case = make(
        90, 70, pooling=pooling, dtype=torch.bfloat16, hidden_size=128, num_attention_heads=4, intermediate_size=512
    )
    assert case.fast.encoder.layers[0].qkv.kind == "packed"
    for groups in regroupings(90, 12, seed=4):
        case.check(groups)
    with threads(2):
        case.check([list(range(90)), list(range(40, 60))])


def test_stream_and_forward_give_the_same_bits(small: Case) -> None:
    """However stream() cuts its batches."""
    for budget in (64, 1000):
        results = list(small.fast.stream(small.rows, token_budget=budget))
        logits = torch.stack([result.logits for result in results])
        assert torch.equal(bits(logits), bits(small.alone.logits))
        assert [result.exit_layer for result in results] == small.alone.exit_layer.tolist()
