"""What a figure was measured with: equal conditions for the contenders of a process, the machine, the versions."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ragged_exit.ops import native_available

_PACKAGES = ("torch", "transformers", "triton", "numpy", "onnxruntime", "openvino", "ctranslate2")


def one_process_for_all(threads: int) -> None:
    """Equal conditions for contenders that share a process. Call before the first linear: oneDNN reads this once."""
    torch.set_num_threads(threads)
    # it keeps 1,024 kernels, one for every shape: padded batches take so many that all contenders built theirs anew
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")


def environment() -> dict[str, object]:
    """CPU (or GPU) by name, threads, versions and date: the ``environment`` of every JSON."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "native_kernels": native_available(),
        "onednn_kernels_kept": int(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", 1024)),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def write_result(path: Path, result: Mapping[str, object]) -> None:
    """As JSON, in one step, so that whoever is cut off midway leaves the last one; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name("." + path.name)
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)


def cpu_name() -> str:
    """The processor's name and, where the system tells, the family and features that explain its matrix rates."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    notable = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(notable)})"
