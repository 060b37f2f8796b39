"""The operations. Import an op from here; each lives in a file of its own with its checks and its registration."""

from ragged_exit.ops.attention import varlen_attention
from ragged_exit.ops.compact import compact
from ragged_exit.ops.dispatch import resolve_impl
from ragged_exit.ops.embed_layer_norm import embed_layer_norm
from ragged_exit.ops.exit_decide import exit_decide
from ragged_exit.ops.exit_step import ExitDecision, exit_step
from ragged_exit.ops.layer_norm import add_layer_norm
from ragged_exit.ops.tile_layer import TileLayer, TileNorm, take_layer_seconds, tile_layer
from ragged_exit.ops.tile_linear import TileWeights, fits_tiles, pack_tiles, tile_linear, tiles_available

__all__ = [
    "ExitDecision",
    "TileLayer",
    "TileNorm",
    "TileWeights",
    "add_layer_norm",
    "compact",
    "embed_layer_norm",
    "exit_decide",
    "exit_step",
    "fits_tiles",
    "pack_tiles",
    "resolve_impl",
    "take_layer_seconds",
    "tile_layer",
    "tile_linear",
    "tiles_available",
    "varlen_attention",
]
