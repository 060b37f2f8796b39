"""The op suite once more, on the Triton kernels in Triton's interpreter: in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.skipif("RAGGED_EXIT_TEST_IMPL" in os.environ, reason="this run has chosen its implementations already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_op_suite_on_the_interpreter():
    environment = os.environ | {
        "RAGGED_EXIT_TEST_IMPL": "triton",
        "TRITON_INTERPRET": "1",
        "HYPOTHESIS_PROFILE": "interpreted",
    }
    command = [sys.executable, "-m", "pytest", str(FOLDER), "--ignore", __file__, "-k", "triton", "-q", "-x"]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider"], env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True
    )
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout[-8000:]}\n{run.stderr[-4000:]}"
    assert " passed" in run.stdout and "skipped" not in run.stdout.splitlines()[-1], run.stdout[-2000:]
