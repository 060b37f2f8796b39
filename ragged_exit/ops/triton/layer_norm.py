"""add_layer_norm: residual add and LayerNorm, a program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragged_exit.ops.triton.config import config, on_its_device
from ragged_exit.ops.triton.device import narrow


@triton.jit
def normalise(x, weight_ptr, bias_ptr, cols, eps, UER: tl.constexpr, H: tl.constexpr):
    """LayerNorm of fp32 ``x`` ``[BLOCK_H]``, zero past H, in one of the two kinds."""
    inside = cols < H
    centred = tl.where(inside, x - tl.sum(x, 0) / H, 0.0)
    # the mean's rounding is all that a row of one value has: eps 1e-12 would make tenths of it
    centred = tl.where(inside, centred - tl.sum(centred, 0) / H, 0.0)
    squares = tl.sum(centred * centred, 0)
    # FastBERT's UER: unbiased, and eps outside the root; one column gives 0 / 0 = NaN, as in torch
    deviation = tl.sqrt(squares / (H - 1.0)) + eps if UER else tl.sqrt(squares / H + eps)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    return weight * (centred / deviation) + bias


@triton.jit
def add_layer_norm_kernel(
    x_ptr,
    x_stride,
    residual_ptr,  # or None
    residual_stride,
    weight_ptr,
    bias_ptr,
    out_ptr,  # [T, H]
    eps,
    UER: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    x = tl.load(x_ptr + token * x_stride + cols, mask=cols < H, other=0.0).to(tl.float32)  # [BLOCK_H]
    if residual_ptr is not None:
        x += tl.load(residual_ptr + token * residual_stride + cols, mask=cols < H, other=0.0).to(tl.float32)
    out = normalise(x, weight_ptr, bias_ptr, cols, eps, UER, H)
    tl.store(out_ptr + token * H + cols, narrow(out, out_ptr.dtype.element_ty), mask=cols < H)


@on_its_device
def add_layer_norm(
    x: Tensor,  # [T, H]
    residual: Tensor | None,  # [T, H]
    weight: Tensor,  # [H]
    bias: Tensor,  # [H]
    eps: float,
    kind: str,
    out: Tensor | None = None,  # [T, H]
) -> Tensor:
    tokens, size = x.shape
    out = torch.empty((tokens, size), dtype=x.dtype, device=x.device) if out is None else out
    if tokens == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    add_layer_norm_kernel[(tokens,)](
        x,
        x.stride(0),
        residual,
        0 if residual is None else residual.stride(0),
        weight.contiguous(),
        bias.contiguous(),
        out,
        eps,
        UER=kind == "uer",
        H=size,
        BLOCK_H=triton.next_power_of_2(size),
        **config("layer_norm", x.device, x.dtype, size),
    )
    return out
