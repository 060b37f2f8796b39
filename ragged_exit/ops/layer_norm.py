"""add_layer_norm: residual add and LayerNorm in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ragged_exit.ops.dispatch import implementation, resolve_impl
from ragged_exit.ops.registration import registered

KINDS = ("standard", "uer")


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    kind: str = "standard",
    *,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """LayerNorm of ``x + residual`` (``residual`` may be None) -> ``[T, H]`` in the dtype of ``x``, computed in fp32.

    x, residual: ``[T, H]``. weight, bias: ``[H]`` in the dtype of ``x``. kind: "standard", or "uer" (FastBERT: unbiased
    standard deviation, ``eps`` added to it). out: where to write, contiguous, with the shape and dtype of ``x``; may be
    ``x`` or ``residual`` itself.

    Raises ValueError/TypeError naming the argument that has another shape, dtype or device.
    """
    if x.ndim != 2:
        raise ValueError(f"x: expected [T, H], got {list(x.shape)}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    for name, value, shape in (
        ("residual", residual, x.shape),
        ("weight", weight, x.shape[1:]),
        ("bias", bias, x.shape[1:]),
        ("out", out, x.shape),
    ):
        if value is None:
            continue
        if value.shape != shape or value.device != x.device:
            raise ValueError(f"{name}: expected {list(shape)} on {x.device}, got {list(value.shape)} on {value.device}")
        if value.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {value.dtype}")
    impl = resolve_impl(impl, x.device)
    if out is None:
        return _add_layer_norm(x, residual, weight, bias, eps, kind, impl)
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {list(out.stride())}")
    _add_layer_norm_into(out, x, residual, weight, bias, eps, kind, impl)
    return out


@registered()
def _add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, kind: str, impl: str
) -> Tensor:
    return implementation(impl).add_layer_norm(x, residual, weight, bias, eps, kind)


@torch.library.register_fake("ragged_exit::add_layer_norm")
def _(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, kind: str, impl: str) -> Tensor:
    return x.new_empty(x.shape)


@registered(mutates_args=("out",))
def _add_layer_norm_into(
    out: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, kind: str, impl: str
) -> None:
    implementation(impl).add_layer_norm(x, residual, weight, bias, eps, kind, out)
