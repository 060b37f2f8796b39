"""A device on the CPU whose values the host cannot see, except through a transfer that has ended.

Its tensors say that they are on "meta", so that the package takes the path of a GPU; ops compute on the CPU tensors
inside. While ``watched``, whatever would make the host wait for a real device raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from ragged_exit import transfer

DEVICE = torch.device("meta")
CPU = torch.device("cpu")
_DATA_DEPENDENT = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class HostWaits(AssertionError):
    """The host would wait for the device."""


class OnDevice(Tensor):
    """A tensor on the fake device; ``inner`` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise AssertionError(f"{func} on a device tensor after the fake device was put away")


class FakeDevice(TorchDispatchMode):
    """The device, while the context is open. ``log``: of every transfer, ("queued", n) and later ("read", n)."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []
        self._watching = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def in_flight(self) -> list[int]:
        """How many transfers were queued and not read yet, at each read."""
        found, count = [], 0
        for what, _ in self.log:
            if what == "read":
                found.append(count)
            count += 1 if what == "queued" else -1
        return found

    def send(self, packed: Tensor) -> tuple[Tensor, Any]:
        """Stands in for ``transfer._send``: nothing but noise has landed until the event was waited for."""
        assert isinstance(packed, OnDevice)
        landing = torch.full(packed.shape, 0xAB, dtype=torch.uint8)
        event = _Event(lambda: self._land(landing, packed.inner), len(self.log_of("queued")))
        self.log.append(("queued", event.number))
        return landing, event

    def log_of(self, what: str) -> list[int]:
        return [number for said, number in self.log if said == what]

    def _land(self, landing: Tensor, values: Tensor) -> None:
        self.log.append(("read", len(self.log_of("read"))))
        landing.copy_(values)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        ours = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, OnDevice)]
        to_us = kwargs.get("device") == DEVICE
        if not ours and not to_us:
            return func(*args, **kwargs)
        with self:  # in inference mode ops come before they are taken apart
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        to_host = bool(ours) and kwargs.get("device") == CPU
        if self._watching:
            _check(func, args, kwargs, ours, to_host)
        if to_us:
            kwargs["device"] = CPU
        out = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        if to_host:
            return out
        return tree_map(lambda value: OnDevice(value) if isinstance(value, Tensor) else value, out)


class _Event:
    def __init__(self, land: Callable[[], None], number: int) -> None:
        self._land, self.number = land, number

    def synchronize(self) -> None:
        self._land()


def _inside(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _check(func: Any, args: tuple, kwargs: dict, ours: list[OnDevice], to_host: bool) -> None:
    """Raise HostWaits for an op that on a real device would stop the host."""
    if func.namespace == "ragged_exit":
        return  # what a kernel does is its own business
    values = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    from_host = [value for value in values if not isinstance(value, OnDevice)]
    if to_host:
        raise HostWaits(f"{func}: a copy to the host outside of a transfer")
    if from_host and not (func is torch.ops.aten._to_copy.default and kwargs.get("non_blocking")):
        raise HostWaits(f"{func}: a blocking copy of host values {[list(value.shape) for value in from_host]}")
    if func is torch.ops.aten.index.Tensor:  # its shape depends on values only where a mask picks
        if any(value is not None and value.dtype == torch.bool for value in args[1]):
            raise HostWaits(f"{func}: a boolean mask")
    elif _DATA_DEPENDENT & set(func.tags):
        raise HostWaits(f"{func}: the result's shape, or a number, depends on device values")


@contextmanager
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    device = FakeDevice()
    with monkeypatch.context() as patch, device:
        patch.setattr(transfer, "_send", device.send)
        yield device
