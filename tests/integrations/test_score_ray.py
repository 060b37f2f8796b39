"""The Ray engine on a real local cluster: the local engine's answers, also when a worker is killed on the way."""

from __future__ import annotations

import os
import signal
import threading
import time

import pyarrow as pa
import pyarrow.parquet
import pytest
from score_cases import save_checkpoint, texts

from ragged_exit.integrations import score as score_module
from ragged_exit.integrations.score import score_file
from ragged_exit.integrations.scorer import ScoreOptions
from ragged_exit.integrations.shards import split

pytestmark = pytest.mark.slow  # a cluster and its workers take a minute to start
ray = pytest.importorskip("ray", reason="ray is not installed")
psutil = pytest.importorskip("psutil", reason="psutil, which finds the workers, is not installed")


@pytest.fixture
def cluster(monkeypatch):
    """Two cores, hence at most two workers. This package is importable on them."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ray.init(num_cpus=3, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def workers() -> list[int]:
    """Process ids of the actors that answer shards."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::") and "MapWorker" in title:
            found.append(process.pid)
    return found


def test_the_same_bytes_with_a_worker_killed_midway(tmp_path, monkeypatch, cluster):
    from ragged_exit.integrations.ray_engine import ray_engine

    monkeypatch.setattr(score_module, "split", lambda *arguments: split(*arguments, shard_rows=256))
    checkpoint, source = save_checkpoint(tmp_path / "model"), tmp_path / "in.parquet"
    pa.parquet.write_table(pa.table({"text": texts(20_000)}), source)
    out, local = tmp_path / "ray.jsonl", tmp_path / "local.jsonl"
    killed, seen = [], set()

    def kill_one():
        parts = tmp_path / "ray.jsonl.parts"
        while not list(parts.glob("out-*.parquet")):
            seen.update(workers())
            time.sleep(0.02)
        alive = workers()
        seen.update(alive)
        os.kill(alive[0], signal.SIGKILL)
        killed.append((alive[0], len(list(parts.glob("out-*.parquet")))))

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    scored = score_file(ScoreOptions(str(checkpoint)), source, out, engine=ray_engine(workers=2))
    killer.join(timeout=10)
    assert scored.rows == 20_000 and scored.errors == 0
    assert len(killed) == 1 and killed[0][1] < 79, "the worker outlived the work"
    assert len(seen) >= 2
    score_file(ScoreOptions(str(checkpoint)), source, local)
    assert out.read_bytes() == local.read_bytes()


def test_options_that_do_not_fit_are_told_before_a_cluster_starts(tmp_path):
    from ragged_exit.integrations.ray_engine import ray_engine

    checkpoint, source = save_checkpoint(tmp_path / "model"), tmp_path / "in.parquet"
    pa.parquet.write_table(pa.table({"text": texts(20)}), source)
    with pytest.raises(ValueError, match="threshold: expected numbers, got NaN"):
        score_file(
            ScoreOptions(str(checkpoint), threshold=float("nan")),
            source,
            tmp_path / "out.csv",
            engine=ray_engine(workers=1),
        )
    assert not ray.is_initialized()
