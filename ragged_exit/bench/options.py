"""Options that the benchmarks on random weights share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated

import typer

from ragged_exit.bench.synthetic import PROFILES, SHAPES


def _one_of(names: Iterable[str]) -> Callable[[str], str]:
    def parse(name: str) -> str:
        if name not in names:
            raise typer.BadParameter(f"expected one of {', '.join(names)}, got {name!r}")
        return name

    return parse


Profile = Annotated[str, typer.Option("--profile", parser=_one_of(PROFILES), metavar="|".join(PROFILES))]
Shape = Annotated[str, typer.Option("--shape", parser=_one_of(SHAPES), metavar="|".join(SHAPES))]
