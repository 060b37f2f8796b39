"""The contenders run under pytest-benchmark, on two layers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import one_thread  # noqa: F401  (autouse)

from ragged_exit.bench import contenders, synthetic


def test_every_contender_is_checked_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(synthetic.SHAPES, "small", synthetic.SHAPES["tiny"])
    sizes, in_batches = [], contenders._in_batches

    def noted(workload, batch_size, *arguments):
        sizes.append(batch_size)
        return in_batches(workload, batch_size, *arguments)

    monkeypatch.setattr(contenders, "_in_batches", noted)
    path, report = Path(__file__).parents[2] / "benchmarks" / "test_throughput.py", tmp_path / "report.xml"
    assert pytest.main([str(path), "-q", "--benchmark-disable", "-p", "no:cacheprovider", f"--junitxml={report}"]) == 0
    assert set(sizes) == {1, 32} and sizes.count(32) == 4 * sizes.count(1)  # batch1 alone runs one row at a time
    assert 'tests="7"' in report.read_text() and 'skipped="0"' in report.read_text()
