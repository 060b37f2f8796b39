"""What a caller gives, checked: numbers of any library's are numbers, and an error names the argument."""

from __future__ import annotations

import operator
from typing import Any, SupportsFloat


def whole_number(name: str, value: Any) -> int:
    """``value`` as Python's integer, also where it is NumPy's or a tensor's. Raises TypeError for what is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None


def check_number(name: str, value: object) -> None:
    """Raise TypeError for what is no number; text is none, whatever it says."""
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"{name}: expected a number, got {value!r}")
