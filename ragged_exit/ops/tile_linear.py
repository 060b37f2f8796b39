"""tile_linear: a linear on the CPU's matrix tiles (AMX), its GELU or residual in the same pass.

oneDNN's linears build a kernel for every new number of tokens, and their GELU and residual cost up to half as much as
the products; these need one layout and hide both behind the products. oneDNN leaves the tiles idle in float32; here a
float32 number is the exact sum of three bfloat16 ones, and of nine products the six that float32's precision needs are
summed (Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
Computations", ARITH 2019).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ragged_exit.ops.dispatch import implementation, native_available, resolve_impl

BLOCK = 32  # inputs and outputs come in whole blocks: kBlock in csrc/tiles.cpp


PARTS = {torch.bfloat16: 1, torch.float32: 3}  # bfloat16 numbers that sum to one number, exactly


class TileWeights(NamedTuple):
    """panels: bfloat16 ``[N / 32, K / 32, parts, 2, 16, 16, 2]``. bias: float32 ``[N]``.

    weight[32 n + 16 h + j, 32 k + 2 i + p] is the sum of the parts at ``[n, k, :, h, i, j, p]``: 1 for bfloat16, 3
    for float32.
    """

    panels: Tensor
    bias: Tensor


def tiles_available() -> bool:
    """Does this processor have the tiles, does the system grant them, and are the native kernels built?"""
    if not native_available():
        return False
    from ragged_exit import _native  # type: ignore[attr-defined]

    return bool(_native.tiles_available)


def fits_tiles(weight: Tensor) -> bool:
    """Can ``pack_tiles`` take this weight ``[N, K]``: bfloat16 or float32 on a CPU, both sizes multiples of 32?"""
    on_cpu = weight.device.type == "cpu" and weight.dtype in PARTS
    return on_cpu and all(size % BLOCK == 0 for size in weight.shape)


def pack_tiles(weight: Tensor, bias: Tensor | None) -> TileWeights:
    """A snapshot of weight ``[N, K]`` and bias ``[N]`` or None in the layout of the tiles.

    Raises ValueError unless weight is bfloat16 or float32 on a CPU with sizes that are multiples of 32.
    """
    if weight.ndim != 2 or not fits_tiles(weight):
        raise ValueError(
            f"weight: expected bfloat16 or float32 [N, K] on a CPU, N and K multiples of {BLOCK}, "
            f"got {weight.dtype} {list(weight.shape)} on {weight.device}"
        )
    outputs, inputs = weight.shape
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias: expected [{outputs}], got {list(bias.shape)}")
    parts, rest = [], weight.detach()
    for _ in range(PARTS[weight.dtype]):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1]
    half = BLOCK // 2
    blocks = torch.stack(parts).reshape(len(parts), outputs // BLOCK, 2, half, inputs // BLOCK, half, 2)
    floats = torch.zeros(outputs, device="cpu") if bias is None else bias.detach().to(torch.float32, copy=True)
    return TileWeights(blocks.permute(1, 4, 0, 2, 5, 3, 6).contiguous(), floats.contiguous())


def tile_linear(
    x: Tensor, weights: TileWeights, *, gelu: bool = False, residual: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """x W^T + b, through GELU or plus ``residual`` -> ``[T, N]`` in the dtype of the packed weight; sums in fp32.

    x: ``[T, K]``, residual: ``[T, N]``, in that dtype; no residual together with ``gelu``. In bfloat16 GELU is exact
    within 5e-5, in float32 to its precision; a float32 infinity in ``x`` becomes NaN where "native" runs. A token's
    bits depend on that token alone. impl: "native" needs ``tiles_available()``; "auto" is the reference without them.

    Raises ValueError/TypeError naming the argument that has another shape, dtype or device; RuntimeError when "native"
    is asked for and there are no tiles.
    """
    groups, steps, _ = weights.panels.shape[:3]
    dtype = packed_dtype(weights)
    if x.ndim != 2 or x.shape[1] != steps * BLOCK:
        raise ValueError(f"x: expected [T, {steps * BLOCK}], got {list(x.shape)}")
    if residual is not None:
        if gelu:
            raise ValueError("residual: expected None together with gelu")
        if residual.shape != (len(x), groups * BLOCK):
            raise ValueError(f"residual: expected {[len(x), groups * BLOCK]}, got {list(residual.shape)}")
    for name, value in (("x", x), ("residual", residual)):
        if value is None:
            continue
        if value.device.type != "cpu":
            raise ValueError(f"{name}: expected a CPU tensor, got one on {value.device}")
        if value.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} as the packed weight, got {value.dtype}")
    return _tile_linear(x, *weights, residual, gelu, resolve_tiles(impl, x.device))


def packed_dtype(weights: TileWeights) -> torch.dtype:
    """The dtype of the weight that was packed."""
    return next(dtype for dtype, count in PARTS.items() if count == weights.panels.shape[2])


def resolve_tiles(impl: str | None, device: torch.device) -> str:
    """ "reference" or "native" for what an op on tiles was asked; "auto" is the reference without tiles.

    Raises as ``resolve_impl``, ValueError for "triton", RuntimeError when "native" is asked for and there are no tiles.
    """
    resolved = resolve_impl(impl, device)
    if resolved == "triton":
        raise ValueError('impl: expected "auto", "reference" or "native", got "triton"')
    if resolved == "native" and not tiles_available():
        if impl == "native":
            raise RuntimeError('impl: "native" was asked for, and this processor has no matrix tiles (AMX)')
        return "reference"
    return resolved


@torch.library.custom_op("ragged_exit::tile_linear", mutates_args=())
def _tile_linear(x: Tensor, panels: Tensor, bias: Tensor, residual: Tensor | None, gelu: bool, impl: str) -> Tensor:
    return implementation(impl).tile_linear(x, panels, bias, residual, gelu)


@_tile_linear.register_fake
def _(x: Tensor, panels: Tensor, bias: Tensor, residual: Tensor | None, gelu: bool, impl: str) -> Tensor:
    return x.new_empty(x.shape[0], bias.shape[0])
