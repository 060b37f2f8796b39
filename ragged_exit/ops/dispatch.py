"""Which implementation of an op runs: an explicit choice never falls back, ``auto`` takes the best there is."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

from ragged_exit.ops.sources import digest

IMPLEMENTATIONS = ("auto", "reference", "native", "triton")
_ROOT = Path(__file__).parents[2]  # of a checkout, where setup.py and csrc/ lie beside the package


@functools.cache
def default_impl() -> str:
    """``RAGGED_EXIT_IMPL``, read once, else "auto"."""
    impl = os.environ.get("RAGGED_EXIT_IMPL", "auto")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"RAGGED_EXIT_IMPL: expected one of {IMPLEMENTATIONS}, got {impl!r}")
    return impl


@torch.compiler.assume_constant_result  # Dynamo must not trace into the import
def native_available() -> bool:
    """True when the C++ extension is built; says once, when it is not, what runs instead.

    Raises ValueError where RAGGED_EXIT_ISA names no instruction set of this processor; RuntimeError for an extension
    that was built from other sources than the checkout's.
    """
    return _native_available()


@functools.cache
def _native_available() -> bool:
    try:
        native = importlib.import_module("ragged_exit._native")
    except ImportError as error:
        if str(error).startswith("RAGGED_EXIT_ISA"):  # it is built, and another set was asked for
            raise ValueError(str(error)) from error
        warnings.warn(
            f"ragged_exit: the native CPU kernels are not built ({error}); running on the PyTorch reference ops",
            stacklevel=2,
        )
        return False
    checkout = (_ROOT / "setup.py").exists() and (_ROOT / "csrc").is_dir()
    if checkout and getattr(native, "sources", None) != digest(str(_ROOT / "csrc")):
        raise RuntimeError(
            f"ragged_exit: {native.__file__} was built from other sources than those in csrc/: build it again "
            "(pip install -e . or python setup.py build_ext --inplace), or remove it"
        )
    return True


@torch.compiler.assume_constant_result  # nor into this
def _triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def resolve_impl(impl: str | None, device: torch.device) -> str:
    """ "reference", "native" or "triton" for a request and the device that the tensors live on.

    Raises ValueError for an unknown name, or one that cannot run on ``device``; RuntimeError when it is not installed,
    and what ``native_available`` raises.
    """
    impl = default_impl() if impl is None else impl
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "auto":
        if device.type != "cuda":
            return "native" if device.type == "cpu" and native_available() else "reference"
        impl = "triton"
    if impl == "native":
        if device.type != "cpu":
            raise ValueError(f'impl: "native" runs on the CPU, and the tensors are on {device}')
        if not native_available():
            raise RuntimeError('impl: "native" was asked for, and the C++ extension is not built')
    if impl == "triton" and not _triton_available():
        raise RuntimeError('impl: "triton", which a GPU takes by itself, needs the triton package')
    if impl == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError('impl: "triton" on a CPU needs TRITON_INTERPRET=1 in the environment (the interpreter)')
    return impl


@functools.cache
def implementation(impl: str) -> ModuleType:
    """The module with one function per op (but the packed ones of a CPU, in triton) for a resolved name."""
    return importlib.import_module(f"ragged_exit.ops.{impl}")
