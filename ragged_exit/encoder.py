"""PackedEncoder: a backbone's embeddings and layers over packed tokens, from a snapshot of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ragged_exit.backbones import Affine, BackboneWeights, LayerWeights
from ragged_exit.batch import SMALLEST_BUCKET, RaggedBatch, check_inputs, token_bucket
from ragged_exit.buffers import Buffers
from ragged_exit.linears import PackedLinear
from ragged_exit.ops import (
    LayerNormWeights,
    PackedLayer,
    add_layer_norm,
    embed_layer_norm,
    packed_layer,
    varlen_attention,
)

PART_BYTES = 12 << 20  # of inner activations in a part on a CPU: larger ones leave the caches before they are read


class PackedEncoder:
    """Runs single layers on a RaggedBatch; who runs which layer on which rows is the executor's business.

    A backbone without token types (DistilBERT) ignores them, as its Hugging Face model does.

    impl: as every op takes it. dtype: float32, bfloat16 or, on a GPU, float16.
    """

    def __init__(self, weights: BackboneWeights, *, impl: str | None, dtype: torch.dtype, device: torch.device) -> None:
        def own(value: Tensor) -> Tensor:
            return value.detach().to(device=device, dtype=dtype, copy=True).contiguous()

        def affine(value: Affine) -> Affine:
            return Affine(own(value.weight), None if value.bias is None else own(value.bias))

        def linear(value: Affine) -> PackedLinear:
            return PackedLinear(own(value.weight), None if value.bias is None else own(value.bias), impl=impl)

        self.impl = impl
        self.dtype = dtype
        self.device = device
        self.hidden_size = weights.hidden_size
        self.num_heads = weights.num_heads
        self.activation = weights.activation
        self.norm_eps = weights.norm_eps
        self.norm_kind = weights.norm_kind
        self.padding_idx = weights.padding_idx
        self.max_positions = weights.max_positions
        self.word_embeddings = own(weights.word_embeddings)
        self.position_embeddings = own(weights.position_embeddings)
        self.token_type_embeddings = (
            None if weights.token_type_embeddings is None else own(weights.token_type_embeddings)
        )
        self.embedding_norm = affine(weights.embedding_norm)
        projection = weights.embedding_projection
        self.embedding_projection = None if projection is None else linear(projection)
        packed = {  # shared layers once
            id(layer): _Layer(layer, weights.activation, affine, linear) for layer in weights.layers
        }
        self.layers = [packed[id(layer)] for layer in weights.layers]
        row_bytes = weights.layers[0].feed_forward_up.weight.shape[0] * self.word_embeddings.element_size()
        self._part_tokens = max(1, PART_BYTES // row_bytes // SMALLEST_BUCKET) * SMALLEST_BUCKET

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def pack(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        also: Sequence[PackedEncoder] = (),
    ) -> RaggedBatch:
        """``RaggedBatch.pack`` with this backbone's positions, after checking ids against its tables and ``also``'s.

        Raises TypeError or ValueError naming the argument, also for ids, positions or token types outside their tables.
        """
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        check_inputs(input_ids, **given)
        beside = {name: None if value is None else value.to(input_ids.device) for name, value in given.items()}
        batch = RaggedBatch.pack(input_ids, **beside, padding_idx=self.padding_idx)
        for encoder in (self, *also):
            encoder.check(batch, "sequence length" if position_ids is None else "position_ids")
        return batch.to(self.device)  # packed and checked where the ids are: on the host nobody waits for a device

    def pack_sequences(
        self,
        sequences: Sequence[Sequence[int]],
        token_type_ids: Sequence[Sequence[int]] | None = None,
        *,
        also: Sequence[PackedEncoder] = (),
    ) -> RaggedBatch:
        """``RaggedBatch.from_sequences`` with this backbone's positions and checks."""
        batch = RaggedBatch.from_sequences(sequences, token_type_ids, padding_idx=self.padding_idx)
        for encoder in (self, *also):
            encoder.check(batch)
        return batch.to(self.device)

    def check_sequence(self, input_ids: Sequence[int], token_type_ids: Sequence[int] | None = None) -> None:
        """Raise ValueError/TypeError unless this one sequence can be packed: ids, length and token types in range."""
        if len(input_ids) == 0:
            raise ValueError("input_ids: expected at least one token, got none")
        if len(input_ids) > self.max_positions:
            raise ValueError(
                f"input_ids: expected at most {self.max_positions} tokens (the position table), got {len(input_ids)}"
            )
        _check_integers("input_ids", input_ids)
        _check_values("input_ids", min(input_ids), max(input_ids), self.word_embeddings.shape[0])
        if token_type_ids is not None:
            _check_integers("token_type_ids", token_type_ids)
            if len(token_type_ids) != len(input_ids):
                raise ValueError(
                    f"token_type_ids: expected {len(input_ids)} values, as input_ids, got {len(token_type_ids)}"
                )
            table = self.token_type_embeddings
            limit = 2**63 if table is None else len(table)  # without a table they are packed all the same
            _check_values("token_type_ids", min(token_type_ids), max(token_type_ids), limit)

    def check(self, batch: RaggedBatch, position_name: str = "sequence length") -> None:
        """Raise ValueError unless all packed ids, positions and token types are within this backbone's tables."""
        _check_range("input_ids", batch.input_ids, self.word_embeddings.shape[0])
        # the table's first rows up to padding_idx belong to padding, so the message counts what a sequence may have
        limit = self.position_embeddings.shape[0]
        if int(batch.position_ids.max()) >= limit:  # type: ignore[union-attr]
            raise ValueError(
                f"{position_name}: expected at most {self.max_positions} positions (the position table), "
                f"got {int(batch.position_ids.max()) + 1 - (limit - self.max_positions)}"  # type: ignore[union-attr]
            )
        _check_range("position_ids", batch.position_ids, limit)
        if batch.token_type_ids is not None and self.token_type_embeddings is not None:
            _check_range("token_type_ids", batch.token_type_ids, len(self.token_type_embeddings))

    def embed(self, batch: RaggedBatch, buffers: Buffers | None = None) -> RaggedBatch:
        """Fill ``hidden`` ``[token_bucket(T), H]`` from the packed ids; ``buffers`` may lend its memory."""
        if batch.input_ids is None or batch.position_ids is None:
            raise ValueError("batch: expected packed input_ids and position_ids, and they are gone")
        norm = self.embedding_norm
        assert norm.bias is not None
        tokens = batch.input_ids.shape[0]
        hidden = (buffers or Buffers(0)).take(tokens, self.word_embeddings)  # [token_bucket(T), E]
        embed_layer_norm(
            batch.input_ids,
            batch.position_ids,
            None if self.token_type_embeddings is None else batch.token_type_ids,
            self.word_embeddings,
            self.position_embeddings,
            self.token_type_embeddings,
            norm.weight,
            norm.bias,
            self.norm_eps,
            self.norm_kind,
            out=hidden[:tokens],
            impl=self.impl,
        )
        if self.embedding_projection is not None:
            hidden = self.embedding_projection(hidden)  # [token_bucket(T), H]
        hidden[tokens:] = 0
        return batch.with_hidden(hidden)

    def layer(self, index: int, batch: RaggedBatch, *, with_means: bool = False) -> Tensor | None:
        """Run layer ``index`` (0-based) on every live token, in place: new memory would cost a CPU its page faults.

        with_means: also say the mean of each row's tokens, float32 ``[Bcap, H]``, where the layer is one call, which
        knows it almost for nothing (else None).
        """
        if batch.hidden is None:
            raise ValueError("batch: expected hidden states; call embed first")
        layer = self.layers[index]
        if layer.whole is not None:
            rows = batch.row_capacity
            means = batch.hidden.new_empty(rows, self.hidden_size, dtype=torch.float32) if with_means else None
            packed_layer(
                batch.hidden,
                batch.cu_seqlens,
                layer.whole,
                self.num_heads,
                self.norm_eps,
                self.norm_kind,
                means=means,
                impl=self.impl,
            )
            return means
        for part in self._parts(batch):
            x = self._attend(layer, part.of(batch.hidden), part)
            self._feed_forward(layer, x, batch.hidden[part.start : part.start + part.tokens])
        return None

    def _parts(self, batch: RaggedBatch) -> list[_Part]:
        """What runs at once: on a CPU whole sequences that fit the caches, in few sizes; on a GPU everything."""
        assert batch.hidden is not None
        capacity = len(batch.hidden)
        if not batch.live_on_host:
            return [_Part(0, capacity, capacity, batch.cu_seqlens, batch.max_seqlen)]
        parts, ends = [], batch.seqlens.cumsum(0)
        first = start = 0
        while first < batch.rows:
            last = max(first + 1, int(torch.searchsorted(ends, start + self._part_tokens, right=True)))
            stop = int(ends[last - 1])
            cu_seqlens, longest = batch.cu_seqlens[first : last + 1] - start, int(batch.seqlens[first:last].max())
            parts.append(_Part(start, stop - start, token_bucket(stop - start), cu_seqlens, longest))
            first, start = last, stop
        return parts

    def _attend(self, layer: _Layer, x: Tensor, part: _Part) -> Tensor:
        head_size = self.hidden_size // self.num_heads
        qkv = layer.qkv(x).view(-1, 3, self.num_heads, head_size)  # [Tcap, 3, N, D]
        context = varlen_attention(
            qkv[:, 0],
            qkv[:, 1],
            qkv[:, 2],
            part.cu_seqlens,
            part.longest,
            1 / math.sqrt(head_size),
            impl=self.impl,
        )
        return self._norm(*layer.attention_output.sum_with(context.view(x.shape), x), layer.attention_norm)

    def _feed_forward(self, layer: _Layer, x: Tensor, out: Tensor) -> None:
        """Of x ``[size, H]``, as many tokens as ``out`` has."""
        inner = layer.feed_forward_up(x, self.activation)  # [size, F]
        total, residual = layer.feed_forward_down.sum_with(inner, x)
        residual = None if residual is None else residual[: len(out)]
        self._norm(total[: len(out)], residual, layer.output_norm, out)

    def _norm(self, x: Tensor, residual: Tensor | None, norm: Affine, out: Tensor | None = None) -> Tensor:
        assert norm.bias is not None
        return add_layer_norm(
            x, residual, norm.weight, norm.bias, self.norm_eps, self.norm_kind, out=out, impl=self.impl
        )


def run_layers(
    encoder: PackedEncoder, layers: Sequence[int], batch: RaggedBatch, *, with_means: bool = False
) -> Tensor | None:
    """``layers`` (0-based) of ``encoder`` on every token of the batch, one after the other, in place.

    with_means: what the last one's ``PackedEncoder.layer`` says.
    """
    means = None
    for layer in layers:
        means = encoder.layer(layer, batch, with_means=with_means and layer == layers[-1])
    return means


class _Part(NamedTuple):
    """Neighbouring sequences that run at once: ``tokens`` from ``start`` on, computed as ``size`` of them.

    cu_seqlens: int32 ``[rows + 1]``, from 0. No token's outcome depends on the ``size - tokens`` that follow.
    """

    start: int
    tokens: int
    size: int
    cu_seqlens: Tensor
    longest: int

    def of(self, hidden: Tensor) -> Tensor:
        """``[size, H]``"""
        found = hidden[self.start : self.start + self.size]
        return F.pad(found, (0, 0, 0, self.size - len(found))) if len(found) < self.size else found


class _Layer:
    """The four linears and two norms of a layer. whole: them all, where they can run in one call."""

    def __init__(
        self,
        weights: LayerWeights,
        activation: str,
        affine: Callable[[Affine], Affine],
        linear: Callable[[Affine], PackedLinear],
    ) -> None:
        self.qkv = linear(weights.qkv)
        self.attention_output = linear(weights.attention_output)
        self.attention_norm = affine(weights.attention_norm)
        self.feed_forward_up = linear(weights.feed_forward_up)
        self.feed_forward_down = linear(weights.feed_forward_down)
        self.output_norm = affine(weights.output_norm)
        linears = (self.qkv, self.attention_output, self.feed_forward_up, self.feed_forward_down)
        packed = [linear.packed for linear in linears if linear.packed is not None]
        self.whole: PackedLayer | None = None
        if activation == "gelu" and len(packed) == len(linears):
            assert self.attention_norm.bias is not None and self.output_norm.bias is not None
            qkv, attention_output, up, down = packed
            attention_norm = LayerNormWeights(self.attention_norm.weight, self.attention_norm.bias)
            output_norm = LayerNormWeights(self.output_norm.weight, self.output_norm.bias)
            self.whole = PackedLayer(qkv, attention_output, attention_norm, up, down, output_norm)


def _check_integers(name: str, values: Sequence[int]) -> None:
    listed = values.tolist() if hasattr(values, "tolist") else values  # a tensor or an array
    for kind in set(map(type, listed)):
        if not issubclass(kind, Integral) or kind is bool:
            raise TypeError(f"{name}: expected integers, got {kind.__name__}")


def _check_range(name: str, ids: Tensor | None, limit: int) -> None:
    assert ids is not None
    _check_values(name, int(ids.min()), int(ids.max()), limit)


def _check_values(name: str, low: int, high: int, limit: int) -> None:
    if low < 0 or high >= limit:
        raise ValueError(f"{name}: expected values in [0, {limit}), got {low} ... {high}")
