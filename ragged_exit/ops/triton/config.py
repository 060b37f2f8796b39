"""How kernels are launched: on which device, and with which tile sizes.

configs.json is keyed by op, GPU, dtype and size.

A tile never depends on the batch: a row's bits must not change with its neighbours. Hence no autotuning at run time.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch

# Passed at every launch, so that the environment cannot change a result's bits. The interpreter ignores it.
FP_FUSION = True


@functools.cache
def tables() -> dict:
    return json.loads(Path(__file__).with_name("configs.json").read_text())


def gpu_name(device: torch.device) -> str:
    """The name configs.json uses, "default" on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "default"


def config(op: str, device: torch.device, dtype: torch.dtype, size: int) -> dict[str, int]:
    """Tile sizes, warps and stages of ``op``: the entry of the smallest listed size that is not below ``size``.

    Raises TypeError for a dtype that the kernels do not take, ValueError when ``size`` is above all that are listed.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f'impl: "triton" takes float32, float16 and bfloat16, got {dtype}')
    return _lookup(op, gpu_name(device), "float32" if dtype == torch.float32 else "half", size)


@functools.cache
def _lookup(op: str, gpu: str, kind: str, size: int) -> dict[str, int]:
    table = tables()[op]
    sizes = table.get(gpu, table["default"])[kind]
    fits = [int(limit) for limit in sizes if int(limit) >= size]
    if not fits:
        raise ValueError(f'impl: "triton" runs {op} up to size {max(map(int, sizes))}, got {size}')
    return sizes[str(min(fits))] | {"enable_fp_fusion": FP_FUSION}


def on_its_device(launcher: Callable) -> Callable:
    """``launcher`` with its first tensor's GPU as the current one, where Triton launches wherever the data lie."""

    @functools.wraps(launcher)
    def launch(*args: object) -> object:
        device = next(value.device for value in args if isinstance(value, torch.Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(*args)
        with torch.cuda.device(device):
            return launcher(*args)

    return launch
