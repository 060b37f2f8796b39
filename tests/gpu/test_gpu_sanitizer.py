"""compute-sanitizer over every op: no access out of bounds, no race in shared memory, no barrier that threads miss."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
FOUND = 86  # an exit status that nothing else has

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif(not Path(SANITIZER).exists(), reason="compute-sanitizer is not installed"),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_every_op_is_clean(tool):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # an allocation of its own for every tensor: its ends are seen
    program = [sys.executable, str(ROOT / "tests" / "every_op.py")]
    warm = subprocess.run(program, env=environment, capture_output=True, text=True)  # the kernels are compiled here
    assert "every op ran" in warm.stdout, warm.stderr[-4000:]
    command = [SANITIZER, "--tool", tool, "--error-exitcode", str(FOUND), *program]
    said = ""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="", flush=True)  # as it comes: it is slow, and may be cut short
            said += line
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer says that it does not support this device")
    assert run.returncode == 0, f"exit status {run.returncode}"
    assert "every op ran" in said
