"""packed_layer: a whole layer in one call and in place, where all of its linears are packed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ragged_exit.ops.common import BLOCK, check_cu_seqlens, check_means
from ragged_exit.ops.dispatch import implementation, native_available
from ragged_exit.ops.layer_norm import KINDS
from ragged_exit.ops.packed_linear import PackedWeights, check_packed, packed_dtype, resolve_packed
from ragged_exit.ops.registration import registered


class LayerNormWeights(NamedTuple):
    """weight and bias ``[H]`` of a LayerNorm, in the dtype of the hidden states."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class PackedLayer:
    """A post-LayerNorm layer of a transformer, packed: linears ``[3 H, H]`` (query, key, value), ``[H, H]``, ``[F, H]``
    and ``[H, F]``, GELU between the last two, and a LayerNorm after each residual sum.

    Raises ValueError for linears or norms of other shapes, of several dtypes, or that the kernels cannot read.
    """

    qkv: PackedWeights
    attention_output: PackedWeights
    attention_norm: LayerNormWeights
    feed_forward_up: PackedWeights
    feed_forward_down: PackedWeights
    output_norm: LayerNormWeights

    def __post_init__(self) -> None:  # here and not at every call, which would pay for it after every layer
        width, inner = self.width, len(self.feed_forward_up.bias)
        shapes = {
            "qkv": (3 * width, width),
            "attention_output": (width, width),
            "feed_forward_up": (inner, width),
            "feed_forward_down": (width, inner),
        }
        for name, shape in shapes.items():
            weights: PackedWeights = getattr(self, name)
            check_packed(name, weights)
            found, dtype = tuple(BLOCK * size for size in weights.panels.shape[:2]), packed_dtype(weights)
            if found != shape or dtype != self.dtype:
                raise ValueError(f"{name}: expected {self.dtype} {list(shape)}, got {dtype} {list(found)}")
        for name in ("attention_norm", "output_norm"):
            for value in getattr(self, name):
                if value.shape != (width,) or value.dtype != self.dtype:
                    raise ValueError(f"{name}: expected {self.dtype} [{width}], got {value.dtype} {list(value.shape)}")

    @property
    def width(self) -> int:
        return len(self.output_norm.weight)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the weights that were packed, and of the hidden states."""
        return packed_dtype(self.qkv)

    @property
    def linears(self) -> list[PackedWeights]:
        return [self.qkv, self.attention_output, self.feed_forward_up, self.feed_forward_down]

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return [tensor for item in fields(self) for tensor in getattr(self, item.name)]


def packed_layer(
    hidden: Tensor,
    cu_seqlens: Tensor,
    layer: PackedLayer,
    num_heads: int,
    eps: float,
    kind: str = "standard",
    *,
    means: Tensor | None = None,
    impl: str | None = None,
) -> None:
    """Run the layer on ``hidden`` ``[Tcap, H]``, in place; tokens past ``cu_seqlens[-1]`` are left alone.

    means: float32 ``[Bcap, H]``, where to write the mean of each row's tokens as they leave the layer and are still in
    the caches; zeros for a row without tokens.

    hidden: contiguous, in the dtype of the packed weights. cu_seqlens: int32 ``[Bcap + 1]``. eps, kind: of both norms,
    as ``add_layer_norm`` takes them. impl: as ``packed_linear`` takes it. "native" gives the bits of the single ops,
    and a row's do not depend on its neighbours.

    Raises ValueError/TypeError naming the argument that has another shape, dtype or device; RuntimeError as
    ``packed_linear``; MemoryError, after which some rows of ``hidden`` are this layer's output already.
    """
    width, dtype = layer.width, layer.dtype
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
    if means is not None:
        check_means(means, len(cu_seqlens) - 1, hidden)
    resolved = resolve_packed(impl, hidden.device, layer.linears)
    _packed_layer(hidden, means, cu_seqlens, layer.tensors, num_heads, eps, kind, resolved)


def take_layer_seconds() -> tuple[float, float, float]:
    """What "native" spent in linears, attention and LayerNorms since this was last asked: for a profile."""
    if not native_available():
        return 0.0, 0.0, 0.0
    from ragged_exit import _native  # type: ignore[attr-defined]

    return tuple(_native.take_layer_seconds())  # type: ignore[return-value]


@registered(mutates_args=("hidden", "means"))
def _packed_layer(
    hidden: Tensor,  # [Tcap, H]
    means: Tensor | None,  # f32 [Bcap, H]
    cu_seqlens: Tensor,  # i32 [Bcap + 1]
    layer: list[Tensor],
    num_heads: int,
    eps: float,
    kind: str,
    impl: str,
) -> None:
    implementation(impl).packed_layer(hidden, means, cu_seqlens, layer, num_heads, eps, kind)
