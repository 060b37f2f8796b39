"""The folder is not called "triton": tests/ is on the import path, where it would pass for the package of that name."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]  # test_interpreted.py starts it
