"""A linear with packed weights, in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


def packed_linear(
    x: Tensor,  # [T, K]
    panels: Tensor,  # [N / 32, K / 32, parts, 2, 32 / of, 16, of]
    bias: Tensor,  # [N]
    residual: Tensor | None,  # [T, N]
    activation: str,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = panels.float().sum(2).permute(0, 2, 4, 1, 3, 5).reshape(len(bias), x.shape[1])
    y = F.linear(x.to(wide), weight.to(wide), bias.to(wide))
    y = ACTIVATIONS[activation](y) if activation else y
    return (y if residual is None else y + residual).to(x.dtype)
