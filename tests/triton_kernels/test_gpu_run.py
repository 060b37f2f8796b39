"""What tests/gpu/conftest.py makes of a run on a GPU, on a machine without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "gpu" / "conftest.py"
DEVICE = """
import torch

lost = []


def synchronize():
    if lost:
        raise RuntimeError("an illegal memory access was encountered")


torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize
"""
TESTS = """
import device


def test_that_fails():
    raise AssertionError("first")


def test_that_goes_on():
    print("went on")


def test_that_loses_the_device():
    device.lost.append(True)
    raise AssertionError("second")


def test_that_never_runs():
    raise AssertionError("third")
"""


def test_failures_are_told_at_once_and_nothing_runs_on_a_lost_device(tmp_path):
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "device.py").write_text(DEVICE)
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-v", "-s", "-p", "device", "-p", "no:cacheprovider", str(tmp_path)]
    environment = os.environ | {"RAGGED_EXIT_TEST_DEVICE": "cuda", "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr
    assert run.stdout.index("AssertionError: first") < run.stdout.index("went on") < run.stdout.index("second")
    assert "third" not in run.stdout and "2 failed, 1 passed" in run.stdout
