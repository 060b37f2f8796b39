"""The compiled CPU kernels (csrc/): allocation and layout here, everything else in C++.

Signatures and semantics are those of ``ops.reference``; float32 and bfloat16 only. A row's bits depend on that row
alone, not on its neighbours, its place or the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragged_exit import _native  # type: ignore[attr-defined]  # after torch, so that both use torch's OpenMP runtime
from ragged_exit.heads import HeadWeights
from ragged_exit.ops.common import BLOCK, FLOAT_TILES, FLOAT_VECTORS, ExitTensors, new_exit_tensors
from ragged_exit.rules import COMPARISONS, SCORES, ScoreSpec

_POOLER_LAYOUT = FLOAT_TILES if _native.tiles_available else FLOAT_VECTORS  # poolers are packed in float32
_SCORES = {score: index for index, score in enumerate(SCORES)}  # the order of enum Score in csrc/kernels.h
_ACTIVATIONS = ("gelu_tanh", "silu", "tanh")  # as in enum Activation there
_INT32_MAX = 2**31 - 1
_COMPARISONS = {compare: index for index, compare in enumerate(COMPARISONS)}


def varlen_attention(
    q: Tensor,  # [Tcap, N, D]
    k: Tensor,  # [Tcap, N, D]
    v: Tensor,  # [Tcap, N, D]
    cu_seqlens: Tensor,  # [Bcap + 1]
    max_seqlen: int,
    scale: float,
) -> Tensor:
    is_bf16 = _check_dtype(q)
    q, k, v = _rows(q), _rows(k), _rows(v)
    cu_seqlens = cu_seqlens.contiguous()
    out = q.new_empty(q.shape)
    _native.varlen_attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        cu_seqlens.data_ptr(),
        cu_seqlens.shape[0] - 1,
        *q.shape,
        q.stride()[:2],
        k.stride()[:2],
        v.stride()[:2],
        scale,
        is_bf16,
        torch.get_num_threads(),
    )
    return out


def add_layer_norm(
    x: Tensor,  # [T, H]
    residual: Tensor | None,  # [T, H]
    weight: Tensor,  # [H]
    bias: Tensor,  # [H]
    eps: float,
    kind: str,
    out: Tensor | None = None,  # [T, H]
) -> Tensor:
    is_bf16 = _check_dtype(x)
    out = x.new_empty(x.shape) if out is None else out
    x, weight, bias = _rows(x), weight.contiguous(), bias.contiguous()
    residual = None if residual is None else _rows(residual)
    _native.add_layer_norm(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        *x.shape,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        kind == "uer",
        is_bf16,
        torch.get_num_threads(),
    )
    return out


def packed_linear(
    x: Tensor,  # [T, K]
    panels: Tensor,  # [N / 32, K / 32, parts, 2, 32 / of, 16, of]
    bias: Tensor,  # [N]
    residual: Tensor | None,  # [T, N]
    activation: str,
) -> Tensor:
    is_bf16 = _check_dtype(x)
    x = _rows(x)
    residual = None if residual is None else residual.contiguous()
    out = x.new_empty(x.shape[0], bias.shape[0])
    _native.linear(
        x.data_ptr(),
        panels.data_ptr(),
        bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
        *x.shape,
        bias.shape[0],
        x.stride(0),
        activation == "gelu",
        is_bf16,
        torch.get_num_threads(),
    )
    if activation in _ACTIVATIONS:  # PyTorch's give other bits where a thread's share ends
        which = _ACTIVATIONS.index(activation)
        _native.activate(out.data_ptr(), out.numel(), which, is_bf16, torch.get_num_threads())
    return out


def packed_layer(
    hidden: Tensor,  # [Tcap, H]
    means: Tensor | None,  # [Bcap, H], written
    cu_seqlens: Tensor,  # [Bcap + 1]
    layer: list[Tensor],  # of a PackedLayer, in its order
    num_heads: int,
    eps: float,
    kind: str,
) -> None:
    is_bf16 = _check_dtype(hidden)
    cu_seqlens, layer = cu_seqlens.contiguous(), [value.contiguous() for value in layer]
    _native.layer(
        hidden.data_ptr(),
        0 if means is None else means.data_ptr(),
        cu_seqlens.data_ptr(),
        _addresses(layer),
        cu_seqlens.shape[0] - 1,
        *hidden.shape,
        num_heads,
        len(layer[7]),  # the bias of feed_forward_up
        eps,
        kind == "uer",
        is_bf16,
        torch.get_num_threads(),
    )


def embed_layer_norm(
    out: Tensor,  # [T, H]
    input_ids: Tensor,  # [T]
    position_ids: Tensor,  # [T]
    token_type_ids: Tensor | None,  # [T]
    word: Tensor,  # [V, H]
    position: Tensor,  # [S, H]
    token_type: Tensor | None,  # [Y, H]
    weight: Tensor,  # [H]
    bias: Tensor,  # [H]
    eps: float,
    kind: str,
) -> None:
    is_bf16 = _check_dtype(word)
    ids = [None if value is None else value.contiguous() for value in (input_ids, position_ids, token_type_ids)]
    tables = [None if value is None else value.contiguous() for value in (word, position, token_type)]
    weight, bias = weight.contiguous(), bias.contiguous()
    _native.embed_layer_norm(
        _addresses(ids),
        _addresses(tables),
        [0 if table is None else len(table) for table in tables],
        weight.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        *out.shape,
        eps,
        kind == "uer",
        is_bf16,
        torch.get_num_threads(),
    )


def exit_step(
    hidden: Tensor,  # [Tcap, H]
    means: Tensor | None,  # [Bcap, H], where the head is on the mean and they are known
    cu_seqlens: Tensor,  # [Bcap + 1]
    live: Tensor,  # [2]
    head: HeadWeights,
    counter: Tensor | None,  # [Bcap]
    previous: Tensor | None,  # [Bcap]
    threshold: Tensor,  # [1] or [Bcap]
    spec: ScoreSpec,
    final: bool,
) -> ExitTensors:
    is_bf16 = _check_dtype(hidden)
    hidden = _rows(hidden)
    classes, pooled = head.classifier_weight.shape
    _check_pooler(head, pooled, hidden)
    weights = [None if weight is None else weight.contiguous() for weight in head[:-1]]  # in their order
    for weight in weights[:-1]:  # the packed pooler has a layout of its own
        if weight is not None and weight.dtype != hidden.dtype:
            raise TypeError(f"head: expected weights in the dtype of hidden, {hidden.dtype}, got {weight.dtype}")
    inputs, outputs = _exit_tensors(cu_seqlens, live, counter, previous, threshold, classes)
    _native.exit_step(
        hidden.data_ptr(),
        hidden.stride(0),
        hidden.shape[1],
        head.pooling == "mean",
        0 if means is None else means.data_ptr(),
        _addresses(weights),
        pooled,
        0 if head.prototype_weight is None else head.prototype_weight.shape[0],
        _addresses(inputs),
        _addresses(outputs),
        cu_seqlens.shape[0] - 1,
        hidden.shape[0],
        classes,
        *_numbers(spec),
        final,
        len(threshold) > 1,
        is_bf16,
        torch.get_num_threads(),
    )
    return outputs


def exit_decide(
    logits: Tensor,  # [Bcap, C]
    signal: Tensor | None,  # [Bcap] uncertainty, [Bcap, C] distances
    cu_seqlens: Tensor,  # [Bcap + 1]
    live: Tensor,  # [2]
    counter: Tensor | None,  # [Bcap]
    previous: Tensor | None,  # [Bcap]
    threshold: Tensor,  # [1] or [Bcap]
    spec: ScoreSpec,
    final: bool,
) -> ExitTensors:
    is_bf16 = _check_dtype(logits)
    logits = logits.contiguous()
    signal = None if signal is None else signal.float().contiguous()
    inputs, outputs = _exit_tensors(cu_seqlens, live, counter, previous, threshold, logits.shape[1])
    _native.exit_decide(
        logits.data_ptr(),
        0 if signal is None else signal.data_ptr(),
        _addresses(inputs),
        _addresses(outputs),
        cu_seqlens.shape[0] - 1,
        _INT32_MAX,  # there are no tokens to point outside of
        logits.shape[1],
        *_numbers(spec),
        final,
        len(threshold) > 1,
        is_bf16,
        torch.get_num_threads(),
    )
    return outputs


def compact(
    new_tokens: list[Tensor],  # each [new Tcap, ...], written
    new_rows: list[Tensor],  # each [new Bcap, ...], written
    tokens: list[Tensor],  # each [Tcap, ...]
    rows: list[Tensor],  # each [Bcap, ...]
    survivors: Tensor,  # [Bcap]
    cu_seqlens: Tensor,  # [Bcap + 1] of the input
    new_cu_seqlens: Tensor,  # [Bcap + 1]
    live: Tensor,  # [2] of the survivors
) -> None:
    tokens = [value.contiguous() for value in tokens]
    rows = [value.contiguous() for value in rows]
    survivors, cu_seqlens = survivors.contiguous(), cu_seqlens.contiguous()
    new_cu_seqlens, live = new_cu_seqlens.contiguous(), live.contiguous()
    _native.compact(
        [_gather(source, target) for source, target in zip(tokens, new_tokens, strict=True)],
        [_gather(source, target) for source, target in zip(rows, new_rows, strict=True)],
        survivors.data_ptr(),
        cu_seqlens.data_ptr(),
        new_cu_seqlens.data_ptr(),
        live.data_ptr(),
        cu_seqlens.shape[0] - 1,
        min((value.shape[0] for value in tokens), default=_INT32_MAX),
        len(new_tokens[0]) if new_tokens else _INT32_MAX,
        len(new_rows[0]) if new_rows else len(survivors),
        torch.get_num_threads(),
    )


def _check_pooler(head: HeadWeights, pooled: int, hidden: Tensor) -> None:
    packed, width = head.packed_pooler, hidden.shape[1]
    if packed is None:
        return
    step, dtype = _POOLER_LAYOUT
    whole = pooled % BLOCK == 0 and width % BLOCK == 0
    shape = (pooled // BLOCK, width // BLOCK, *step)
    if not (whole and packed.shape == shape and packed.dtype == dtype and _native.linears_available[0]):
        raise ValueError(f"packed_pooler: expected what packed_for makes, got {packed.dtype} {list(packed.shape)}")


def _check_dtype(value: Tensor) -> bool:
    """True for bfloat16, False for float32."""
    if value.dtype == torch.bfloat16:
        return True
    if value.dtype == torch.float32:
        return False
    raise TypeError(f"native: expected float32 or bfloat16, got {value.dtype}")


def _rows(value: Tensor) -> Tensor:
    """``value``, copied unless its last dimension is contiguous."""
    return value if value.stride(-1) == 1 else value.contiguous()


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _gather(source: Tensor, target: Tensor) -> tuple[int, int, int]:
    return source.data_ptr(), target.data_ptr(), source.element_size() * source.shape[1:].numel()


def _exit_tensors(
    cu_seqlens: Tensor,
    live: Tensor,
    counter: Tensor | None,
    previous: Tensor | None,
    threshold: Tensor,
    classes: int,
) -> tuple[tuple[Tensor | None, ...], ExitTensors]:
    """The plan's inputs, contiguous, and its outputs, allocated."""
    inputs = (
        cu_seqlens.contiguous(),
        live.contiguous(),
        None if counter is None else counter.contiguous(),
        None if previous is None else previous.contiguous(),
        threshold.contiguous(),
    )
    return inputs, new_exit_tensors(cu_seqlens, classes, counter is not None)


def _numbers(spec: ScoreSpec) -> tuple[int, int, float, float, float, bool]:
    return (
        _SCORES[spec.score],
        _COMPARISONS[spec.compare],
        spec.tolerance,
        spec.temperature,
        spec.lam,
        spec.dr_order == "distance",
    )
