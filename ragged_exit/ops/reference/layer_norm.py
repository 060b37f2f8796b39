"""Reference add + LayerNorm, standard and UER."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_layer_norm(
    x: Tensor,  # [T, H]
    residual: Tensor | None,  # [T, H]
    weight: Tensor,  # [H]
    bias: Tensor,  # [H]
    eps: float,
    kind: str,
    out: Tensor | None = None,  # [T, H]
) -> Tensor:
    """standard: g (y - mean) / sqrt(var + eps) + b. uer: g (y - mean) / (unbiased std + eps) + b (FastBERT's UER)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    if kind == "standard":
        normalised = F.layer_norm(total, (total.shape[1],), weight.to(wide), bias.to(wide), eps)
    else:
        centred = total - total.mean(1, keepdim=True)
        normalised = weight.to(wide) * centred / (total.std(1, keepdim=True) + eps) + bias.to(wide)
    return (torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out).copy_(normalised)
