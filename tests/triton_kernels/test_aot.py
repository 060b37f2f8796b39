"""The shipped kernels compile for GPUs that are not here, spill nothing, and match the committed table."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def aot(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_smoke():
    run = aot("benchmarks/aot.py", "--check", "--smoke")
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-4000:]}"


def test_a_change_fails_and_says_how_to_update(tmp_path):
    """One register more than committed, one kernel gone, one with local memory, under the triton that is installed."""
    sound = {"REG": 33, "STACK": 0, "LOCAL": 0, "SHARED": 8}
    found = {"kept": sound, "new": sound | {"LOCAL": 4}}
    program = f"""
import json, pathlib, sys, triton
sys.path.insert(0, "benchmarks")
import aot
aot.measure = lambda cases, targets: {found}
committed = {{"kept": {sound | {"REG": 32}}, "gone": {sound}}}
aot.TABLE = pathlib.Path(sys.argv[1])
aot.TABLE.write_text(json.dumps({{triton.__version__: committed}}))
sys.exit(aot.main(["--check"]))
"""
    run = aot("-c", program, str(tmp_path / "table.json"))
    assert run.returncode == 1, run.stderr
    for message in ("kept: {'REG': 32", "gone: no longer compiled", "new: stack 0, local 4", "make aot AOT=--update"):
        assert message in run.stdout, message


def test_another_triton_than_asked_for_is_an_error():
    run = aot("benchmarks/aot.py", "--check", "--smoke", "--triton", "0.0.0")
    assert run.returncode == 2 and "triton 0.0.0 was asked for" in run.stderr


def test_compact_moves_sixteen_bytes_at_a_time():
    program = """
import re, sys, torch
sys.path.insert(0, "benchmarks")
import aot
for dtype in aot.DTYPES.values():
    with aot.recorded("default") as launches:
        aot.compact_case(dtype)
    ptx = launches[0].compile(90).asm["ptx"]  # rows of 768 and of one id
    print(*(len(re.findall(rf"{way}.global.v4.b32", ptx)) for way in ("ld", "st")))
"""
    run = aot("-c", program)
    assert run.returncode == 0, run.stderr
    assert [line.split() for line in run.stdout.splitlines()] == [["8", "8"], ["8", "8"], ["16", "16"]]


@pytest.mark.slow
def test_every_case():
    run = aot("benchmarks/aot.py", "--check")
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-4000:]}"
