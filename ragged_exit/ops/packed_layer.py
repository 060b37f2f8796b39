"""packed_layer: a whole layer in one call and in place, where all of its linears are packed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ragged_exit.ops.common import check_cu_seqlens
from ragged_exit.ops.dispatch import implementation, native_available
from ragged_exit.ops.layer_norm import KINDS
from ragged_exit.ops.packed_linear import BLOCK, PackedWeights, check_packed, packed_dtype, resolve_packed


class LayerNormWeights(NamedTuple):
    """weight and bias ``[H]`` of a LayerNorm, in the dtype of the hidden states."""

    weight: Tensor
    bias: Tensor


class PackedLayer(NamedTuple):
    """A post-LayerNorm layer of a transformer, packed: linears ``[3 H, H]`` (query, key, value), ``[H, H]``, ``[F, H]``
    and ``[H, F]``, GELU between the last two, and a LayerNorm after each residual sum."""

    qkv: PackedWeights
    attention_output: PackedWeights
    attention_norm: LayerNormWeights
    feed_forward_up: PackedWeights
    feed_forward_down: PackedWeights
    output_norm: LayerNormWeights


def packed_layer(
    hidden: Tensor,
    cu_seqlens: Tensor,
    layer: PackedLayer,
    num_heads: int,
    eps: float,
    kind: str = "standard",
    *,
    impl: str | None = None,
) -> None:
    """Run the layer on ``hidden`` ``[Tcap, H]``, in place; tokens past ``cu_seqlens[-1]`` are left alone.

    hidden: contiguous, in the dtype of the packed weights. cu_seqlens: int32 ``[Bcap + 1]``. eps, kind: of both norms,
    as ``add_layer_norm`` takes them. impl: as ``packed_linear`` takes it. "native" gives the bits of the single ops,
    and a row's do not depend on its neighbours.

    Raises ValueError/TypeError naming the argument that has another shape, dtype or device; RuntimeError as
    ``packed_linear``.
    """
    width, inner = len(layer.output_norm.weight), len(layer.feed_forward_up.bias)
    shapes = {
        "qkv": (3 * width, width),
        "attention_output": (width, width),
        "feed_forward_up": (inner, width),
        "feed_forward_down": (width, inner),
    }
    dtype = packed_dtype(layer.qkv)
    for name, shape in shapes.items():
        weights: PackedWeights = getattr(layer, name)
        check_packed(f"layer.{name}", weights)
        found = tuple(BLOCK * size for size in weights.panels.shape[:2])
        if found != shape or packed_dtype(weights) != dtype:
            raise ValueError(f"layer: expected {name} {dtype} {list(shape)}, got {packed_dtype(weights)} {list(found)}")
    for value in (*layer.attention_norm, *layer.output_norm):
        if value.shape != (width,) or value.dtype != dtype:
            raise ValueError(f"layer: expected norms {dtype} [{width}], got {value.dtype} {list(value.shape)}")
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads: expected a divisor of {width}, got {num_heads}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    if hidden.device.type != "cpu":
        raise ValueError(f"hidden: expected a CPU tensor, got one on {hidden.device}")
    if hidden.ndim != 2 or hidden.shape[1] != width or not hidden.is_contiguous():
        raise ValueError(f"hidden: expected contiguous [T, {width}], got {list(hidden.shape)} {list(hidden.stride())}")
    if hidden.dtype != dtype:
        raise TypeError(f"hidden: expected {dtype} as the packed weights, got {hidden.dtype}")
    check_cu_seqlens(cu_seqlens, hidden.device)
    tensors = [tensor for pair in layer for tensor in pair]
    linears = [layer.qkv, layer.attention_output, layer.feed_forward_up, layer.feed_forward_down]
    _packed_layer(hidden, cu_seqlens, tensors, num_heads, eps, kind, resolve_packed(impl, hidden.device, linears))


def take_layer_seconds() -> tuple[float, float, float]:
    """What "native" spent in linears, attention and LayerNorms since this was last asked: for a profile."""
    if not native_available():
        return 0.0, 0.0, 0.0
    from ragged_exit import _native  # type: ignore[attr-defined]

    return tuple(_native.take_layer_seconds())  # type: ignore[return-value]


@torch.library.custom_op("ragged_exit::packed_layer", mutates_args=("hidden",))
def _packed_layer(
    hidden: Tensor, cu_seqlens: Tensor, layer: list[Tensor], num_heads: int, eps: float, kind: str, impl: str
) -> None:
    implementation(impl).packed_layer(hidden, cu_seqlens, layer, num_heads, eps, kind)
