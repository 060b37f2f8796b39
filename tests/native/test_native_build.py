"""The extension tells whether it was built from the checkout's C++."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ragged_exit._native", reason="the C++ extension is not built")

from ragged_exit import _native
from ragged_exit.ops import dispatch
from ragged_exit.ops.sources import digest


def available() -> bool:
    return dispatch._native_available.__wrapped__()  # the cache's function


def test_the_digest_is_of_what_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text("int a;")
    (tmp_path / "a.h").write_text("")
    seen = [digest(str(tmp_path))]
    (tmp_path / "README.md").write_text("of a")
    assert digest(str(tmp_path)) == seen[0]
    (tmp_path / "a.h").write_text("int b;")
    seen.append(digest(str(tmp_path)))
    (tmp_path / "a.h").rename(tmp_path / "b.h")
    seen.append(digest(str(tmp_path)))
    assert len(set(seen)) == 3


@pytest.mark.parametrize("sources", ["of another commit", None])
def test_a_build_of_other_sources_is_refused(sources: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions may take other arguments; None: a build from before there was a digest."""
    checkout = Path(dispatch.__file__).parents[2]
    if not (checkout / "csrc").is_dir():
        pytest.skip("this is an installed package, without its sources")
    assert available()
    if sources is None:
        monkeypatch.delattr(_native, "sources")
    else:
        monkeypatch.setattr(_native, "sources", sources)
    with pytest.raises(
        RuntimeError, match=r"_native\S* was built from other sources than those in csrc/: build it again"
    ):
        available()


def test_an_installed_package_has_no_sources_to_compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_native, "sources", "of the wheel")
    monkeypatch.setattr(dispatch, "_ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()  # another package's
    assert available()
