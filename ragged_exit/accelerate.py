"""accelerate: a reference model in, its accelerated drop-in out."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ragged_exit.backbones import backbone_weights
from ragged_exit.batch import RaggedBatch
from ragged_exit.encoder import PackedEncoder
from ragged_exit.executor import RaggedExecutor, Stage
from ragged_exit.heads import MlpHead, TokenHead
from ragged_exit.models.base import EarlyExitModel
from ragged_exit.ops import packed_for, resolve_impl
from ragged_exit.outputs import ExitOutput
from ragged_exit.pools import SurvivorPools
from ragged_exit.rules import ExitRule
from ragged_exit.scheduler import TOKEN_BUDGET
from ragged_exit.stream import RowResult, StreamRow, answer_in_order

_NOT_TAKEN = ("position_ids", "inputs_embeds")  # what a tokenizer gives besides is ignored, but these change answers


def accelerate(
    model: EarlyExitModel,
    *,
    threshold: float | Sequence[float] | None = None,
    patience: int | None = None,
    tolerance: float | None = None,
    rule: ExitRule | None = None,
    impl: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> AcceleratedModel:
    """The accelerated drop-in of ``model``: called the same way, same answers, the batch shrinks as rows leave.

    threshold (a number, or one per exit), patience and tolerance set those fields of the model's own rule; ``rule``
    replaces it. impl: "auto", "reference", "native" or "triton". dtype and device default to the model's. The result
    holds a snapshot of the weights and the rule; ``refresh()`` reads them again. Nothing is patched.

    Raises TypeError when ``model`` is no early-exit model, ``rule`` no rule or ``dtype`` no torch.dtype; ValueError for
    a field that the rule does not have, thresholds of another number than exits, a device that is not here, a dtype
    that it cannot run, a weight that is sharded or quantised, or a module in place of a linear, an embedding or a
    LayerNorm that does more with its weight, as an adapter's; and for what ``backbone_weights`` refuses.
    """
    if not isinstance(model, EarlyExitModel):
        raise TypeError(f"model: expected an early-exit model of ragged_exit, got {type(model).__name__}")
    changes = {
        name: value
        for name, value in (("threshold", threshold), ("patience", patience), ("tolerance", tolerance))
        if value is not None
    }
    if rule is not None and changes:
        raise ValueError(f"rule: give either a rule or {sorted(changes)}, not both")
    try:
        device = model.device if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected a torch.device or its name, got {device!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that torch finds here, got {device} and no CUDA device")
    if device.type == "cuda" and device.index is None:  # which one is told once: later another may be the current one
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = model.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")
    if dtype not in (torch.float32, torch.bfloat16) and (device.type == "cpu" or dtype != torch.float16):
        raise ValueError(f"dtype: expected float32, bfloat16 or, on a GPU, float16, got {dtype}")
    return AcceleratedModel(model, rule, changes, resolve_impl(impl, device), dtype, device)


def with_fields(rule: ExitRule, changes: Mapping[str, Any]) -> ExitRule:
    """``rule`` with some fields replaced. Raises ValueError for a field that it does not have."""
    known = set(rule.to_dict())
    for name in changes:
        if name not in known:
            raise ValueError(
                f"{name}: the rule {type(rule).__name__} has no such field; it has {sorted(known - {'name'})}"
            )
    return replace(rule, **changes)  # type: ignore[type-var]


class AcceleratedModel(nn.Module):
    """What ``accelerate`` returns. It has no parameters of its own: the snapshot is not trainable.

    It stays where and as ``accelerate`` made it: ``to``, ``cuda`` and ``half`` do nothing, and may not raise, since a
    pipeline moves every model that it is given to the first GPU. Inputs may lie on any device.
    """

    main_input_name = "input_ids"  # this and the next two: what transformers.pipeline asks a model
    input_modalities = ("text",)

    def can_generate(self) -> bool:
        return False

    def __init__(
        self,
        model: EarlyExitModel,
        rule: ExitRule | None,
        changes: Mapping[str, Any],
        impl: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """rule, or what to change in the model's own; the others as ``accelerate`` takes them, but none is None."""
        super().__init__()
        self._source = (model,)  # in a tuple, so that its parameters are not ours
        self._given_rule = rule
        self._changes = changes
        self.config = model.config
        self.impl = impl
        self.dtype = dtype
        self.device = device
        self.refresh()
        self.eval()

    @property
    def rule(self) -> ExitRule:
        """Who leaves where. Another one: ``accelerate`` anew, or set the model's own and ``refresh()``."""
        return self._rule

    def refresh(self) -> None:
        """Take a new snapshot of the source model: its weights, options and rule.

        What ``accelerate`` was given stays: a rule as it is, and fields are set in the model's rule again. Raises what
        ``accelerate`` raises for them; the old snapshot stays then.
        """
        source = self._source[0]
        own_rule = source.rule
        chosen = own_rule if self._given_rule is None else self._given_rule
        source.check_rule(chosen)
        if self._changes:
            chosen = with_fields(chosen, self._changes)
            source.check_rule(chosen)
        for name, value in (*source.named_parameters(), *source.named_buffers()):
            if is_traceable_wrapper_subclass(value):  # the kernels read memory, and it has none of its own
                raise ValueError(f"model: expected plain tensors, and {name} is a {type(value).__name__}")

        def encoder(backbone: nn.Module) -> PackedEncoder:
            return PackedEncoder(backbone_weights(backbone), impl=self.impl, dtype=self.dtype, device=self.device)

        def snapshot(stage: Stage) -> Stage:
            rule = chosen if stage.rule is own_rule else stage.rule
            return replace(stage, head=self._snapshot_head(stage.head), rule=rule)

        stages = [snapshot(stage) for stage in source.stages(encoder)]
        self.encoders = [stage.encoder for stage in stages if stage.restart]  # several in a cascade
        self.encoder = self.encoders[0]
        self.executor = RaggedExecutor(stages, impl=self.impl)
        self._rule = chosen

    def _snapshot_head(self, head: MlpHead | TokenHead) -> MlpHead | TokenHead:
        return packed_for(self.impl, head.to(self.dtype, self.device)) if isinstance(head, MlpHead) else head

    @torch.compiler.disable  # the rows decide what runs next, and inductor fails at oneDNN's packed linears
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ExitOutput:
        """Padded ``[B, S]`` in, any 0/1 mask; as the source model called in eval mode."""
        inputs = self._source[0].prepare(input_ids, attention_mask, token_type_ids)
        with torch.inference_mode():
            record = self.executor.run(self.encoder.pack(*inputs, also=self.encoders[1:]))
        # copies, which the caller may write into and compute a loss from
        answers = {name: value.to(input_ids.device, copy=True) for name, value in record._asdict().items()}
        loss = None if labels is None else self._source[0].task_loss(answers["logits"], labels)
        return ExitOutput(loss=loss, **answers)  # the loss first, as Hugging Face models return it

    def stream(
        self, sequences: Iterable[Sequence[int] | Mapping[str, Sequence[int]]], token_budget: int = TOKEN_BUDGET
    ) -> Iterator[RowResult]:
        """Answer any number of sequences in order, in bounded memory.

        A sequence is a list of token ids, or a mapping with ``input_ids`` and perhaps ``token_type_ids`` (lists, as a
        tokenizer returns them without padding; whatever the model itself takes there); other keys are ignored, but
        ``position_ids`` and ``inputs_embeds`` make it a bad one. A window of a few token budgets is read ahead and
        sorted by length. A bad sequence gives a RowResult with ``error``; the others are answered all the same. Where
        ``sequences`` itself raises, what it gave before is answered first, then its error is raised.

        Where the model or a rule fails midway (memory, say), the rows that were read are told, in order, those without
        an answer with that error; then it is raised.

        Raises, with the first answer, TypeError when ``sequences`` is one mapping or text, or cannot be iterated, or
        ``token_budget`` is no integer; ValueError for a budget below 1 or too large.
        """
        if isinstance(sequences, Mapping | str | bytes | bytearray):  # iterated, its keys or characters would be rows
            raise TypeError(f"sequences: expected an iterable of sequences, got one {type(sequences).__name__}")
        try:
            items = enumerate(sequences)
        except TypeError as error:
            raise TypeError(f"sequences: expected an iterable of sequences, got {sequences!r}") from error
        pools, encoders = SurvivorPools(self.executor, token_budget), self.encoders  # refresh() is for the next stream
        yield from answer_in_order(
            (StreamRow(index, *self._read(item, encoders)) for index, item in items),
            functools.partial(self._pack, encoders),
            pools,
        )

    def _read(
        self, item: Sequence[int] | Mapping[str, Sequence[int]], encoders: Sequence[PackedEncoder]
    ) -> tuple[Sequence[int], Sequence[int] | None, str | None]:
        """(input_ids, token_type_ids, what is wrong with them)."""
        try:
            given = item if isinstance(item, Mapping) else {"input_ids": item}
            for name in _NOT_TAKEN:
                if (value := given.get(name)) is not None:
                    raise ValueError(f"{name}: expected None, for the model has its own, got {type(value).__name__}")
            if (ids := _kept("input_ids", given["input_ids"])) is None:
                raise TypeError("input_ids: expected a sequence of integers, got None")
            types = _kept("token_type_ids", given.get("token_type_ids"))
            prepared = None if types is None else self._source[0].prepare_types(types)
            for encoder in encoders:
                encoder.check_sequence(ids, prepared)
            mask = _kept("attention_mask", given.get("attention_mask"))
            if mask is not None and (len(mask) != len(ids) or any(kept != 1 for kept in mask)):
                raise ValueError(
                    f"attention_mask: expected {len(ids)} times 1, got other values; give sequences without padding"
                )
        except Exception as error:  # whatever reading the caller's object raises
            return (), None, f"{type(error).__name__}: {error}"
        return ids, types, None

    def _pack(self, encoders: Sequence[PackedEncoder], rows: list[StreamRow]) -> RaggedBatch:
        types = None
        if any(row.token_type_ids is not None for row in rows):
            types = [[0] * len(row.input_ids) if row.token_type_ids is None else row.token_type_ids for row in rows]
        return self._pack_lists(encoders, [row.input_ids for row in rows], types)

    def pack_sequences(
        self, sequences: Sequence[Sequence[int]], token_type_ids: Sequence[Sequence[int]] | None = None
    ) -> RaggedBatch:
        """What the executor runs, from lists of ids and token types without padding; raises ValueError for bad ones."""
        return self._pack_lists(self.encoders, sequences, token_type_ids)

    def _pack_lists(
        self,
        encoders: Sequence[PackedEncoder],
        sequences: Sequence[Sequence[int]],
        token_type_ids: Sequence[Sequence[int]] | None,
    ) -> RaggedBatch:
        if token_type_ids is not None:
            token_type_ids = [self._source[0].prepare_types(types) for types in token_type_ids]
        return encoders[0].pack_sequences(sequences, token_type_ids, also=encoders[1:])


def _kept(name: str, values: Any) -> Any:
    """A list of its own: rows wait, and the caller may use the memory of his again."""
    if isinstance(values, str | bytes | bytearray | Set | Mapping):  # lists of other things than ids in their order
        raise TypeError(f"{name}: expected a sequence of integers, got {type(values).__name__}")
    if values is None:
        return None
    if hasattr(values, "tolist"):
        values = values.tolist()
    elif isinstance(values, Iterable):
        values = list(values)
    if not isinstance(values, list):
        raise TypeError(f"{name}: expected a sequence of integers, got {type(values).__name__}")
    return values
