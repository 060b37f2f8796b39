"""Runs of `score` that end early, meet another run or find its work: nothing is lost, repeated or overwritten."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from score_cases import read, start, texts, write
from tiny import one_thread  # noqa: F401  (autouse)

from ragged_exit.claims import end_claim
from ragged_exit.integrations import score as score_module
from ragged_exit.integrations import shards
from ragged_exit.integrations.score import score_file
from ragged_exit.integrations.scorer import ScoreOptions


def test_a_raised_engine_keeps_what_is_done(checkpoint, tmp_path, small_shards):
    source = write(tmp_path / "in.parquet", texts(80))
    answered = []

    def dies_after_two(options, shards):
        for number, rows in enumerate(score_module.score_locally(options, shards)):
            if number == 2:
                raise KeyboardInterrupt
            answered.append(rows)
            yield rows

    with pytest.raises(KeyboardInterrupt):
        score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.csv", engine=dies_after_two)
    assert not (tmp_path / "out.csv").exists()
    seen = []
    score_file(
        ScoreOptions(str(checkpoint)),
        source,
        tmp_path / "out.csv",
        on_rows=lambda done, total: seen.append(done),
    )
    assert seen[0] >= 32 and seen[-1] == 80  # two shards at least were not done again


def test_a_kill_while_the_parts_are_deleted_is_no_failure(checkpoint, tmp_path, monkeypatch):
    source, out = write(tmp_path / "in.parquet", [*texts(4), None]), tmp_path / "out.csv"

    def killed(folder, outcome):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: (_ for _ in ()).throw(KeyboardInterrupt))
            end_claim(folder, outcome)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(score_module, "end_claim", killed)
        score_file(ScoreOptions(str(checkpoint)), source, out)
    assert out.exists() and (tmp_path / "out.csv.parts").exists()
    with pytest.raises(ValueError, match=r"out: .* is there already"):  # not the answers that these options ask for
        score_file(ScoreOptions(str(checkpoint), threshold=0.1), source, out)
    assert score_file(ScoreOptions(str(checkpoint)), source, out) == (5, 1)
    assert not (tmp_path / "out.csv.parts").exists()


def test_two_runs_do_not_write_one_file(checkpoint, tmp_path):
    source, out = write(tmp_path / "in.parquet", texts(4)), tmp_path / "out.csv"

    def second(options, shards):
        with pytest.raises(ValueError, match="out: another process is at work in"):
            score_file(ScoreOptions(str(checkpoint), threshold=100.0), source, out)
        yield from score_module.score_locally(options, shards)

    score_file(ScoreOptions(str(checkpoint)), source, out, engine=second)
    assert len(read(out)) == 4


def test_a_failed_join_leaves_nothing_beside_the_output(checkpoint, tmp_path, monkeypatch):
    source = write(tmp_path / "in.csv", texts(4))
    before = set(tmp_path.iterdir())

    def full(tables, path):
        path.write_text("half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(shards, "_write_jsonl", full)
        score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.jsonl")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out.jsonl.parts"}
    assert score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.jsonl") == (4, 0)
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out.jsonl"}


def test_another_runs_parts_are_refused(checkpoint, tmp_path, small_shards):
    source = write(tmp_path / "in.parquet", texts(40))

    def dies_after_one(options, shards):
        yield next(score_module.score_locally(options, shards))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.csv", engine=dies_after_one)
    with pytest.raises(ValueError, match="another model, input or options"):
        score_file(ScoreOptions(str(checkpoint), threshold=0.1), source, tmp_path / "out.csv")


@pytest.mark.parametrize(
    "wrong", [{"threshold": float("nan")}, {"model": "nowhere"}, {"text": "words"}, {"text": "other"}], ids=str
)
def test_a_call_that_failed_does_not_block_the_right_one(wrong, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = write(tmp_path / "in.parquet", texts(4), other=[[1]] * 4)
    options = {"model": str(checkpoint)} | {name: value for name, value in wrong.items() if name != "text"}
    with pytest.raises((ValueError, OSError)):
        score_file(ScoreOptions(**options), source, tmp_path / "out.csv", text=wrong.get("text", "text"))
    assert score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.csv") == (4, 0)


@pytest.mark.parametrize("name", ["precious.txt", "run.json"])
def test_a_folder_that_is_not_ours_is_refused_and_stays(name, checkpoint, tmp_path):
    precious = tmp_path / "out.csv.parts" / name
    precious.parent.mkdir()
    source = write(tmp_path / "in.csv", texts(4))
    precious.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"out: the folder .*parts holds files that are no unfinished run"):
        score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.csv")
    assert precious.read_text() == '{"a": 1}'
    precious.unlink()  # an empty folder is nobody's
    assert score_file(ScoreOptions(str(checkpoint)), source, tmp_path / "out.csv").rows == 4


def test_killed_three_times_and_resumed_is_uninterrupted(checkpoint, tmp_path):
    """SIGKILL while shards are being answered; the joined file is the uninterrupted run's, byte for byte."""
    source = write(tmp_path / "in.jsonl", texts(60_000))
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    parts = tmp_path / "out.jsonl.parts"
    kills = []
    for kill in range(3):
        process = start(checkpoint, source, out, "--threads", 1)
        deadline = time.monotonic() + 240
        while process.poll() is None and len(list(parts.glob("out-*.parquet"))) < 2 * (kill + 1):
            assert time.monotonic() < deadline, "no shard was answered"
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills.append(len(list(parts.glob("out-*.parquet"))))
        process.communicate()
    assert len(kills) == 3 and not out.exists()
    for path in (out, whole):
        process = start(checkpoint, source, path, "--threads", 1)
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert out.read_bytes() == whole.read_bytes()
    assert len(out.read_text().splitlines()) == 60_000


def test_an_output_that_is_there_is_not_overwritten(checkpoint, tmp_path):
    out = tmp_path / "out.csv"
    out.write_text("precious")
    source = write(tmp_path / "in.csv", ["good"])
    with pytest.raises(ValueError, match="out: "):
        score_file(ScoreOptions(str(checkpoint)), source, out)
    assert out.read_text() == "precious"
