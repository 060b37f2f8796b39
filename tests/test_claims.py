"""Claims: one process a folder, nobody else's files are touched, and an end that is cut short is still the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ragged_exit.claims import end_claim, only_process, read_claim, read_outcome, write_claim

RUN = {"command": "test", "settings": [1, 2]}


def work(folder: Path) -> Path:
    """A claimed folder with files and a folder in it."""
    write_claim(folder, RUN)
    for name in ("a", "z", "deep/b"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_an_end_that_is_cut_short_anywhere(tmp_path, monkeypatch):
    real, cuts = Path.unlink, 0

    for allowed in range(10):
        folder = work(tmp_path / str(allowed))
        count = 0

        def unlink(path: Path, missing_ok: bool = False) -> None:
            nonlocal count
            if count == allowed:  # noqa: B023
                raise KeyboardInterrupt
            count += 1
            real(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            try:
                end_claim(folder, [3, 0])
            except KeyboardInterrupt:
                cuts += 1
        found = read_claim(folder, RUN, "out")  # never a folder that is not ours
        if found is not None:
            assert found == RUN and (read_outcome(folder) == [3, 0] or not (folder / "a").exists())
            end_claim(folder, [3, 0])
            assert not folder.exists()
    assert 3 <= cuts < 10


def test_an_outcome_does_not_make_a_folder_ours(tmp_path):
    (tmp_path / "outcome.json").write_text("[3, 0]")
    with pytest.raises(ValueError, match="holds files that are no unfinished run"):
        read_claim(tmp_path, RUN, "out")


def test_the_claim_goes_after_the_work(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: seen.append(path.name))
    end_claim(work(tmp_path / "run"), 1)
    assert set(seen[:-2]) == {"a", "z"} and seen[-2:] == ["outcome.json", "run.json"]


OTHER = """
import sys
from pathlib import Path
from ragged_exit.claims import only_process
with only_process(Path(sys.argv[1]), ["command", "settings"], "out"):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path):
    folder = work(tmp_path / "run")
    other = subprocess.Popen([sys.executable, "-c", OTHER, folder], stdin=-1, stdout=-1, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match="out: another process is at work in"), only_process(folder, RUN, "out"):
        pass
    other.kill()
    other.communicate()
    with only_process(folder, RUN, "out"):
        assert read_claim(folder, RUN, "out") == RUN
    assert (folder / "a").read_text() == "a"


def test_what_nothing_came_into_goes(tmp_path):
    with pytest.raises(KeyError), only_process(tmp_path / "new", RUN, "out"):
        assert read_claim(tmp_path / "new", RUN, "out") is None
        raise KeyError
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_ours_gets_no_lock(tmp_path):
    (tmp_path / "precious.txt").write_text("precious")
    with pytest.raises(ValueError, match="out: the folder"), only_process(tmp_path, RUN, "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
