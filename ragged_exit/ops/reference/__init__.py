"""The executable specification: every op in plain PyTorch. float64 in, float64 out, so it is also the oracle."""

from ragged_exit.ops.reference.attention import varlen_attention
from ragged_exit.ops.reference.compact import compact
from ragged_exit.ops.reference.embed_layer_norm import embed_layer_norm
from ragged_exit.ops.reference.exit import exit_decide, exit_step
from ragged_exit.ops.reference.layer_norm import add_layer_norm
from ragged_exit.ops.reference.packed_layer import packed_layer
from ragged_exit.ops.reference.packed_linear import packed_linear

__all__ = [
    "add_layer_norm",
    "compact",
    "embed_layer_norm",
    "exit_decide",
    "exit_step",
    "packed_layer",
    "packed_linear",
    "varlen_attention",
]
