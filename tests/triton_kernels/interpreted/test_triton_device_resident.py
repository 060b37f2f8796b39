"""A whole tiny model on the Triton kernels with row capacities that stay, as on a GPU."""

from __future__ import annotations

import pytest
from device_cases import check_ends, check_system
from tiny import random_rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinity


ROWS = random_rows(3, seed=3, longest=4)


@pytest.mark.parametrize("name", ["pabee", "fastbert", "cascade"])  # row state, exit_decide, restarts
def test_a_whole_model_answers_as_on_the_host(name: str, monkeypatch) -> None:
    check_system(name, "triton", ROWS, monkeypatch)


def test_all_leave_at_once_or_nobody_does(monkeypatch) -> None:
    check_ends("deebert", "triton", ROWS[:2], monkeypatch)
