"""How an op is registered with torch, and when torch is asked to call it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

P = ParamSpec("P")
R = TypeVar("R")


def registered(*, mutates_args: Iterable[str] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the function ``_name`` as the custom op ``ragged_exit::name``.

    What comes back calls the op where torch has something to do with it: autograd, a compiler or exporter, a dispatch
    mode (fake tensors), a function transform, a profiler. In plain inference mode it calls the function: torch's way
    there takes as long as all that the wrappers check, .1 to .2 ms after a layer has emptied the caches.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__.removeprefix("_")
        op = torch.library.custom_op(f"ragged_exit::{name}", function, mutates_args=mutates_args)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return op(*args, **kwargs) if _watched() else function(*args, **kwargs)

        return call

    return register


def _watched() -> bool:
    return (
        torch.compiler.is_compiling()  # first: Dynamo cannot ask for the inference mode
        or not torch.is_inference_mode_enabled()
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None  # torch.func: tensors without memory of their own
        or torch.autograd._profiler_enabled()
    )
