"""Every instruction set that this processor has, forced by RAGGED_EXIT_ISA in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("ragged_exit._native", reason="the C++ extension is not built")

from ragged_exit.ops import tiles_available

FOLDER = Path(__file__).parent
CAPABILITIES = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}  # torch's names
ISAS = ["baseline", "avx2", "avx512", "amx"]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(FOLDER), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("isa", ISAS)
def test_each_isa_agrees_with_float64(isa: str) -> None:
    best = 3 if tiles_available() else CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), 0)
    if best < ISAS.index(isa):
        pytest.skip(f"this processor has no {isa}")
    code = (
        "import torch, native_cases; from ragged_exit import _native\n"
        f"assert _native.isa == {isa!r}, _native.isa\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    native_cases.check_all_ops(dtype); native_cases.check_without_tokens(dtype)\n"
        "    native_cases.check_rows_of_little_spread(dtype)\n"
        "[native_cases.check_accuracy(function) for function in native_cases.UNITS]"
    )
    result = run(code, RAGGED_EXIT_ISA=isa)
    assert result.returncode == 0, result.stderr


def test_an_unknown_isa_is_refused() -> None:
    result = run("from ragged_exit.ops.dispatch import native_available; native_available()", RAGGED_EXIT_ISA="mmx")
    assert result.returncode != 0
    assert "ValueError: RAGGED_EXIT_ISA: expected baseline, avx2, avx512 or amx, got mmx" in result.stderr


def test_without_the_extension_auto_is_the_reference_and_native_raises() -> None:
    code = (
        "import sys, warnings, torch; sys.modules['ragged_exit._native'] = None\n"
        "from ragged_exit.ops.dispatch import resolve_impl\n"
        "cpu = torch.device('cpu')\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    assert resolve_impl('auto', cpu) == resolve_impl('auto', cpu) == 'reference'\n"
        "assert sum('not built' in str(warning.message) for warning in seen) == 1\n"
        "try:\n"
        "    resolve_impl('native', cpu)\n"
        "except RuntimeError as error:\n"
        "    assert 'not built' in str(error)\n"
        "else:\n"
        "    raise AssertionError('native ran without its extension')"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_one_openmp_runtime() -> None:
    if sys.platform != "linux":
        pytest.skip("/proc/self/maps is Linux's")
    code = (
        "import torch, native_cases\n"
        "native_cases.check_all_ops(torch.float32)\n"
        "paths = {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}\n"
        "assert len(paths) == 1, paths"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
