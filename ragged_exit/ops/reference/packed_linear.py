"""A linear with packed weights, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_linear(
    x: Tensor,  # [T, K]
    panels: Tensor,  # [N / 32, K / 32, parts, 2, 32 / of, 16, of]
    bias: Tensor,  # [N]
    residual: Tensor | None,  # [T, N]
    gelu: bool,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = panels.float().sum(2).permute(0, 2, 4, 1, 3, 5).reshape(len(bias), x.shape[1])
    y = F.linear(x.to(wide), weight.to(wide), bias.to(wide))
    y = F.gelu(y) if gelu else y
    return (y if residual is None else y + residual).to(x.dtype)
