"""The operations. Import an op from here; each lives in a file of its own with its checks and its registration."""

from ragged_exit.ops.attention import varlen_attention
from ragged_exit.ops.compact import compact
from ragged_exit.ops.dispatch import native_available, resolve_impl
from ragged_exit.ops.embed_layer_norm import embed_layer_norm
from ragged_exit.ops.exit_decide import exit_decide
from ragged_exit.ops.exit_step import ExitDecision, exit_step, packed_for
from ragged_exit.ops.layer_norm import add_layer_norm
from ragged_exit.ops.packed_layer import LayerNormWeights, PackedLayer, packed_layer, take_layer_seconds
from ragged_exit.ops.packed_linear import (
    PackedWeights,
    fits_packing,
    linears_available,
    pack_linear,
    packed_linear,
    tiles_available,
)

__all__ = [
    "ExitDecision",
    "LayerNormWeights",
    "PackedLayer",
    "PackedWeights",
    "add_layer_norm",
    "compact",
    "embed_layer_norm",
    "exit_decide",
    "exit_step",
    "fits_packing",
    "linears_available",
    "native_available",
    "pack_linear",
    "packed_for",
    "packed_layer",
    "packed_linear",
    "resolve_impl",
    "take_layer_seconds",
    "tiles_available",
    "varlen_attention",
]
