"""Linear layers of the accelerated forward: weights packed once, for this package's kernels or for oneDNN."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ragged_exit.ops import PackedWeights, fits_packing, linears_available, pack_linear, packed_linear, resolve_impl

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
# activations that come with each kind of linear: (its name there, or oneDNN's attr, and the algorithm)
_FUSED: dict[str, dict[str, tuple[str, str]]] = {
    "packed": {
        "gelu": ("gelu", ""),
        "gelu_new": ("gelu_tanh", ""),
        "gelu_pytorch_tanh": ("gelu_tanh", ""),
        "silu": ("silu", ""),
        "swish": ("silu", ""),
        "tanh": ("tanh", ""),
    },
    "onednn": {
        "gelu": ("gelu", "none"),
        "gelu_new": ("gelu", "tanh"),
        "gelu_pytorch_tanh": ("gelu", "tanh"),
        "relu": ("relu", ""),
    },
    "plain": {},
}


def check_activation(name: str) -> None:
    """Raise ValueError for an activation that the encoder does not know."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"hidden_act: expected one of {sorted(_ACTIVATIONS)}, got {name!r}")


@functools.cache
def prepacking_available() -> bool:
    """Probe, once: does this torch ship oneDNN's prepacked linear, and does it run here?"""
    try:
        weight, x = torch.eye(32, device="cpu"), torch.ones(32, 32, device="cpu")
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
        other = torch.ops.mkldnn._linear_pointwise.binary(x, x, packed, None, "add")
        return bool(torch.equal(other, x + x))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def _prepack(weight: Tensor) -> Tensor:
    """Weight ``[N, K]`` as oneDNN reads it best: an opaque tensor, which ``to_dense`` turns back, bit for bit."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


class PackedLinear:
    """y = act(x W^T + b), or the sum of x W^T + b and a residual, with a snapshot of the weights.

    weight: ``[N, K]``, bias: ``[N]`` or None, in the dtype and on the device that the inputs will have. impl: as every
    op takes it. ``kind`` says what runs: "packed", this package's own kernels, where the CPU can run them in the dtype,
    for sizes in multiples of 32 and unless ``impl`` is "reference"; else "onednn", prepacked, on a CPU where this torch
    has it; else "plain".
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, impl: str | None = None) -> None:
        self.packed: PackedWeights | None = None
        native = resolve_impl(impl, weight.device) == "native" and linears_available(weight.dtype)
        if native and fits_packing(weight):
            self.kind = "packed"
            self.packed = pack_linear(weight, bias)
            return
        self.bias = None if bias is None else bias.detach().clone()
        on_cpu = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
        if on_cpu and prepacking_available():
            self.kind = "onednn"
            self.weight = _prepack(weight.detach())
        else:
            self.kind = "plain"
            self.weight = weight.detach().clone().contiguous()

    def __call__(self, x: Tensor, activation: str | None = None) -> Tensor:
        """x ``[T, K]`` -> ``[T, N]``, optionally through an activation (its Hugging Face name)."""
        if activation is not None and activation not in _FUSED[self.kind]:
            return _ACTIVATIONS[activation](self(x))
        if self.packed is not None:
            name = "" if activation is None else _FUSED["packed"][activation][0]
            return packed_linear(x, self.packed, activation=name, impl="native")
        if self.kind == "onednn":
            attr, algorithm = ("none", "") if activation is None else _FUSED["onednn"][activation]
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, attr, [], algorithm)
        return F.linear(x, self.weight, self.bias)

    def __deepcopy__(self, memo: dict) -> PackedLinear:
        return self  # nothing in it ever changes, and oneDNN's packed weights cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        if self.kind != "onednn":
            return vars(self)
        return vars(self) | {"weight": self.weight.to_dense()}  # an opaque tensor cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.kind == "onednn":
            self.weight = _prepack(self.weight)

    def sum_with(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """x ``[T, K]``, residual ``[T, N]`` -> two summands of x W^T + b + residual; the second is None once added.

        On a CPU the residual is added with the products; elsewhere the LayerNorm kernel that follows adds it for free.
        """
        if self.packed is not None:
            return packed_linear(x, self.packed, residual=residual, impl="native"), None
        if self.kind == "onednn":
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add"), None
        return F.linear(x, self.weight, self.bias), residual
