"""Linear layers of the accelerated forward: weights prepacked once for oneDNN where torch has it, plain otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
# post-ops that oneDNN fuses: (attr, algorithm)
_FUSED = {
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
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


class PackedLinear:
    """y = act(x W^T + b), or the sum of x W^T + b and a residual, with a snapshot of the weights.

    weight: ``[N, K]``, bias: ``[N]`` or None, in the dtype and on the device that the inputs will have.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = None if bias is None else bias.detach().clone()
        self.weight = weight.detach().clone().contiguous()
        on_cpu = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
        self.packed = on_cpu and prepacking_available()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def __call__(self, x: Tensor, activation: str | None = None) -> Tensor:
        """x ``[T, K]`` -> ``[T, N]``, optionally through an activation (its Hugging Face name)."""
        if not self.packed:
            y = F.linear(x, self.weight, self.bias)
            return y if activation is None else _ACTIVATIONS[activation](y)
        if activation is not None and activation not in _FUSED:
            return _ACTIVATIONS[activation](self(x))
        attr, algorithm = ("none", "") if activation is None else _FUSED[activation]
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, attr, [], algorithm)

    def sum_with(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """x ``[T, K]``, residual ``[T, N]`` -> two summands of x W^T + b + residual; the second is None once added.

        oneDNN adds the residual in the GEMM; elsewhere the LayerNorm kernel that follows adds it for free.
        """
        if not self.packed:
            return F.linear(x, self.weight, self.bias), residual
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add"), None
