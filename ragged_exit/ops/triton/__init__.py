"""The GPU kernels, in Triton. On a CPU they run in Triton's interpreter (``TRITON_INTERPRET=1``), to be tested.

One file an op: its kernels, then the launcher with the reference's signature. Device functions that several kernels
share are in ``device.py`` (arithmetic), ``scores.py`` (exit scores) and ``plan.py`` (ticket and prefix scan).
"""

from ragged_exit.ops.triton.attention import varlen_attention
from ragged_exit.ops.triton.compact import compact
from ragged_exit.ops.triton.embed import embed_layer_norm
from ragged_exit.ops.triton.exit_decide import exit_decide
from ragged_exit.ops.triton.exit_step import exit_step
from ragged_exit.ops.triton.layer_norm import add_layer_norm

__all__ = ["add_layer_norm", "compact", "embed_layer_norm", "exit_decide", "exit_step", "varlen_attention"]
