"""packed_linear: a linear by this package's own CPU kernels, its GELU or residual in the same pass.

oneDNN's linears build a kernel for every new number of tokens; these need none, and a whole layer of them is one call
(packed_layer). They run on the processor's matrix tiles (AMX), or on its vectors: float32 with AVX2 or AVX-512,
bfloat16 with AVX512-BF16. Tiles multiply bfloat16 only; there a float32 number is the exact sum of three bfloat16
ones, and of nine products the six that float32's precision needs are summed (Henry, Tang and Heinecke, "Leveraging the
bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", ARITH 2019).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ragged_exit.ops.common import BLOCK, FLOAT_TILES, FLOAT_VECTORS, HALF_VECTORS
from ragged_exit.ops.dispatch import implementation, native_available, resolve_impl
from ragged_exit.ops.registration import registered

DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = ("", "gelu", "gelu_tanh", "silu", "tanh")
_LAYOUTS: dict[tuple[int, ...], torch.dtype] = dict((FLOAT_VECTORS, HALF_VECTORS, FLOAT_TILES))


class PackedWeights(NamedTuple):
    """panels: ``[N / 32, K / 32, parts, 2, 32 / of, 16, of]``. bias: float32 ``[N]``.

    weight[32 n + 16 h + j, 32 k + of i + p] is the sum of the parts at ``[n, k, :, h, i, j, p]``. bfloat16 has one part
    and ``of`` 2. float32 has one part, float32 too, and ``of`` 1; for matrix tiles three parts in bfloat16, ``of`` 2.
    """

    panels: Tensor
    bias: Tensor


def tiles_available() -> bool:
    """Does this processor have the tiles, does the system grant them, and are the native kernels built?"""
    if not native_available():
        return False
    from ragged_exit import _native  # type: ignore[attr-defined]

    return bool(_native.tiles_available)


def linears_available(dtype: torch.dtype) -> bool:
    """Are there native kernels for packed weights of this dtype that this processor can run?"""
    if dtype not in DTYPES or not native_available():
        return False
    from ragged_exit import _native  # type: ignore[attr-defined]

    return bool(_native.linears_available[DTYPES.index(dtype)])


def fits_packing(weight: Tensor) -> bool:
    """Can ``pack_linear`` take this weight ``[N, K]``: bfloat16 or float32 on a CPU, positive multiples of 32?"""
    whole = all(size > 0 and size % BLOCK == 0 for size in weight.shape)
    return weight.device.type == "cpu" and weight.dtype in DTYPES and whole


def pack_linear(weight: Tensor, bias: Tensor | None, *, tiles: bool | None = None) -> PackedWeights:
    """A snapshot of weight ``[N, K]`` and bias ``[N]`` or None. tiles: for them, or for vectors; None: as this
    processor has them.

    Raises ValueError unless weight is bfloat16 or float32 on a CPU with sizes that are positive multiples of 32.
    """
    if weight.ndim != 2 or not fits_packing(weight):
        raise ValueError(
            f"weight: expected bfloat16 or float32 [N, K] on a CPU, N and K positive multiples of {BLOCK}, "
            f"got {weight.dtype} {list(weight.shape)} on {weight.device}"
        )
    outputs, inputs = weight.shape
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias: expected [{outputs}], got {list(bias.shape)}")
    rest = weight.detach()
    parts, of = [rest], 2
    if weight.dtype == torch.float32:
        if tiles_available() if tiles is None else tiles:
            parts = []
            for _ in range(3):
                parts.append(rest.bfloat16())
                rest = rest - parts[-1]
        else:
            of = 1
    blocks = torch.stack(parts).reshape(len(parts), outputs // BLOCK, 2, BLOCK // 2, inputs // BLOCK, BLOCK // of, of)
    floats = torch.zeros(outputs, device="cpu") if bias is None else bias.detach().to(torch.float32, copy=True)
    return PackedWeights(blocks.permute(1, 4, 0, 2, 5, 3, 6).contiguous(), floats.contiguous())


def packed_linear(
    x: Tensor,
    weights: PackedWeights,
    *,
    activation: str = "",
    residual: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """x W^T + b, through an activation or plus a residual -> ``[T, N]`` in the dtype of the packed weight; fp32 sums.

    x: ``[T, K]``, residual: ``[T, N]``, in that dtype; no residual beside an activation. activation: "gelu", in
    bfloat16 exact within 5e-5, in float32 to its precision; or of the rounded sum "gelu_tanh" (its tanh form), "silu",
    "tanh". On tiles a float32 infinity in ``x`` becomes NaN. A token's bits depend on that token alone. impl: "native"
    needs ``linears_available``; "auto" is the reference without them.

    Raises ValueError/TypeError naming the argument that has another shape, dtype or device, or float32 weights that are
    packed for another processor; RuntimeError when "native" is asked for and this processor has no kernels for it.
    """
    check_packed("weights", weights)
    groups, steps = weights.panels.shape[:2]
    dtype = packed_dtype(weights)
    if x.ndim != 2 or x.shape[1] != steps * BLOCK:
        raise ValueError(f"x: expected [T, {steps * BLOCK}], got {list(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if residual is not None:
        if activation:
            raise ValueError("residual: expected None beside an activation")
        if residual.shape != (len(x), groups * BLOCK):
            raise ValueError(f"residual: expected {[len(x), groups * BLOCK]}, got {list(residual.shape)}")
    for name, value in (("x", x), ("residual", residual)):
        if value is None:
            continue
        if value.device.type != "cpu":
            raise ValueError(f"{name}: expected a CPU tensor, got one on {value.device}")
        if value.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} as the packed weight, got {value.dtype}")
    return _packed_linear(x, *weights, residual, activation, resolve_packed(impl, x.device, [weights]))


def check_packed(name: str, weights: PackedWeights) -> None:
    """Raise ValueError, naming the argument, unless the kernels can read ``weights`` as they lie in memory."""
    panels, bias = weights
    known = panels.ndim == 7 and panels.numel() > 0 and _LAYOUTS.get(panels.shape[2:]) == panels.dtype
    if not known or not _lies_plainly(panels):
        raise ValueError(f"{name}: expected panels as pack_linear makes them, got {panels.dtype} {list(panels.shape)}")
    if bias.shape != (BLOCK * len(panels),) or bias.dtype != torch.float32 or not _lies_plainly(bias):
        raise ValueError(
            f"{name}: expected a float32 bias [{BLOCK * len(panels)}], got {bias.dtype} {list(bias.shape)}"
        )


def _lies_plainly(value: Tensor) -> bool:
    return value.device.type == "cpu" and value.is_contiguous()


def packed_dtype(weights: PackedWeights) -> torch.dtype:
    """The dtype of the weight that was packed."""
    return torch.float32 if _for_tiles(weights) else weights.panels.dtype


def resolve_packed(impl: str | None, device: torch.device, weights: list[PackedWeights]) -> str:
    """ "reference" or "native" for what an op on ``weights`` of one dtype was asked; "auto" is the reference without
    kernels for it.

    Raises as ``resolve_impl``, ValueError for "triton" and for weights that are packed for another processor,
    RuntimeError when "native" is asked for and there are no kernels.
    """
    resolved = resolve_impl(impl, device)
    if resolved == "triton":
        raise ValueError('impl: expected "auto", "reference" or "native", got "triton"')
    if resolved == "reference":
        return resolved
    dtype = packed_dtype(weights[0])
    if not linears_available(dtype):
        if impl == "native":
            raise RuntimeError(f'impl: "native" was asked for, and this processor has no kernels for {dtype} linears')
        return "reference"
    if dtype == torch.float32 and any(_for_tiles(value) != tiles_available() for value in weights):
        expected = "matrix tiles" if tiles_available() else "vectors"
        raise ValueError(f"weights: expected float32 packed for {expected}, as this processor has them")
    return resolved


def _for_tiles(weights: PackedWeights) -> bool:
    return weights.panels.shape[2] == 3


@registered()
def _packed_linear(
    x: Tensor, panels: Tensor, bias: Tensor, residual: Tensor | None, activation: str, impl: str
) -> Tensor:
    return implementation(impl).packed_linear(x, panels, bias, residual, activation)


@torch.library.register_fake("ragged_exit::packed_linear")
def _(x: Tensor, panels: Tensor, bias: Tensor, residual: Tensor | None, activation: str, impl: str) -> Tensor:
    return x.new_empty(x.shape[0], bias.shape[0])
