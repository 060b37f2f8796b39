"""The contenders of the benchmark: each answers a workload in its own way and says which reference it must match."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from ragged_exit.accelerate import AcceleratedModel
from ragged_exit.batch import RaggedBatch
from ragged_exit.bench.padded_layers import padded_embeddings, padded_layers
from ragged_exit.bench.workload import Workload
from ragged_exit.executor import RaggedExecutor, Stage
from ragged_exit.linears import PackedLinear
from ragged_exit.models.deebert import DeeBert
from ragged_exit.ops.reference.exit import compare
from ragged_exit.ops.reference.scores import of_logits
from ragged_exit.pools import SurvivorPools
from ragged_exit.rules import ExitRule
from ragged_exit.scheduler import token_budget_batches

ROW_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)  # long rows are fastest one at a time: nothing is padded
TOKEN_BUDGETS = (8192, 16384, 32768)
TUNING_ROWS = 256  # fill several padded batches
PADDED_ROWS = 384  # slow, and in arrival order: a sample tells its rate


@dataclass(frozen=True)
class Answers:
    """logits f32 ``[N, C]`` and exit_layer int64 ``[N]`` in the workload's order."""

    logits: Tensor
    exit_layer: Tensor


Run = Callable[[Workload, int], Answers]
# input_ids, attention_mask, token_type_ids or None, all [B, S] -> logits [B, C]
PaddedForward = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to answer a workload.

    run: (workload, batch size) -> answers. sizes: the batch sizes (rows, or tokens for ours) to choose the best from.
    exits: must match the early-exit reference, else the full-depth model. rows: answers only that many rows (a sample).
    tuning_rows: so many choose the size; None: as many as will be timed.
    """

    name: str
    run: Run
    sizes: tuple[int, ...]
    exits: bool
    rows: int | None = None
    tuning_rows: int | None = TUNING_ROWS


def contenders(
    model: DeeBert, fast: AcceleratedModel, *, batch_size: int = 32, batch1_rows: int = 64
) -> list[Contender]:
    """All contenders for ``model``; ``fast`` is its accelerated form and holds the rule. Same weights and dtype."""
    prepacked = with_prepacked_linears(model)
    full = RaggedExecutor([full_depth_stage(fast)], impl=fast.impl)
    rule = fast.rule
    return [
        Contender("padded", padded(model, by_length=False), (batch_size,), exits=False, rows=PADDED_ROWS),
        Contender("padded_sorted", padded(model, by_length=True), ROW_BATCHES, exits=False),
        Contender("padded_sorted_prepacked", padded(prepacked, by_length=True), ROW_BATCHES, exits=False),
        Contender("batch1", padded_exit(model, rule), (1,), exits=True, rows=batch1_rows),
        Contender("padded_exit", padded_exit(model, rule), ROW_BATCHES, exits=True),
        Contender("ragged_full", ragged(fast, full), TOKEN_BUDGETS, exits=False, tuning_rows=None),
        Contender("ragged", ragged(fast, fast.executor), TOKEN_BUDGETS, exits=True, tuning_rows=None),
    ]


def padded(model: DeeBert, *, by_length: bool) -> Run:
    """Hugging Face's forward at full depth and the final head, in padded batches."""

    return padded_by(partial(full_depth, model), model.config.num_hidden_layers, by_length=by_length)


def padded_by(forward: PaddedForward, num_layers: int, *, by_length: bool, streams: int = 1) -> Run:
    """Any full-depth forward, in padded batches, of which ``streams`` run at a time, each in a thread of its own."""

    @torch.inference_mode()
    def run(workload: Workload, batch_size: int) -> Answers:
        def answer(*inputs: Any) -> tuple[Tensor, None]:
            return forward(*inputs), None

        return _in_batches(workload, batch_size, by_length, num_layers, answer, streams)

    return run


def full_depth(model: DeeBert, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
    """Logits ``[B, C]`` of the final head, and of no other."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
    hidden = model.backbone(**inputs).last_hidden_state
    return model.final(hidden, attention_mask, model.pooling)


def padded_exit(model: DeeBert, rule: ExitRule) -> Run:
    """The plain way to exit in a batch: after each layer drop the finished rows of the padded batch by a mask."""

    @torch.inference_mode()
    def run(workload: Workload, batch_size: int) -> Answers:
        return _in_batches(workload, batch_size, True, 0, lambda *inputs: _shrink_by_mask(model, rule, *inputs))

    return run


def _shrink_by_mask(
    model: DeeBert, rule: ExitRule, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    layers = padded_layers(model.backbone)
    hidden = padded_embeddings(model.backbone, input_ids, token_type_ids)
    mask = create_bidirectional_mask(model.config, hidden, attention_mask)
    rows = torch.arange(len(input_ids))
    logits = torch.empty(len(rows), model.config.num_labels)
    exit_layer = torch.empty(len(rows), dtype=torch.int64)
    done = 0
    exits = model.exits()
    for number, (head, depth) in enumerate(exits):
        for layer in layers[done:depth]:
            output = layer(hidden, mask)
            hidden = output[0] if isinstance(output, tuple) else output
        done = depth
        answer = head(hidden, attention_mask, model.pooling)
        leaves = _leaves(answer, rule, number) if number < len(exits) - 1 else torch.ones(len(rows), dtype=torch.bool)
        logits[rows[leaves]], exit_layer[rows[leaves]] = answer[leaves].float(), depth
        stays = ~leaves
        rows, hidden, attention_mask = rows[stays], hidden[stays], attention_mask[stays]
        mask = None if mask is None else mask[stays]
        if len(rows) == 0:
            break
    return logits, exit_layer


def _leaves(logits: Tensor, rule: ExitRule, exit_index: int) -> Tensor:
    """The plain formula and a comparison, as the originals do: a whole exit step would make a row alone slow."""
    return compare(exit_score(logits, rule), rule.threshold_at(exit_index), rule.spec.compare)


def exit_score(logits: Tensor, rule: ExitRule) -> Tensor:
    """The rule's score of logits ``[B, C]`` -> ``[B]``; rules without row state or signal only."""
    return of_logits(logits.float(), rule.spec)


def ragged(fast: AcceleratedModel, executor: RaggedExecutor) -> Run:
    """Ours, as ``stream`` runs: packed batches of a token budget, longest first, through survivor pools."""

    @torch.inference_mode()
    def run(workload: Workload, token_budget: int) -> Answers:
        rows = token_budget_batches(workload.lengths, token_budget)
        pools = SurvivorPools(executor, token_budget, max_wait=len(rows))
        finished = []
        for part in (workload.select(part) for part in rows):
            finished += pools.put(fast.pack_sequences(part.sequences, part.token_type_ids))
        records = [item.record for item in sorted(finished + pools.flush(), key=lambda item: item.number)]
        return _in_order(rows, [record.logits for record in records], [record.exit_layer for record in records])

    return run


def full_depth_stage(fast: AcceleratedModel) -> Stage:
    """The last stage of ``fast`` made to run the whole encoder: exits off, no head but the final one."""
    last = fast.executor.stages[-1]
    return replace(last, layers=range(fast.encoder.num_layers), restart=True)


def with_prepacked_linears(model: DeeBert) -> DeeBert:
    """A copy of ``model`` whose every linear runs on our prepacked weights: the same graph, another GEMM library."""
    clone = copy.deepcopy(model)
    for module in list(clone.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, _Prepacked(child))
    return clone


class _Prepacked(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = PackedLinear(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def _in_batches(
    workload: Workload,
    batch_size: int,
    by_length: bool,
    full_depth_layers: int,
    answer: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
    streams: int = 1,
) -> Answers:
    order = list(range(len(workload)))
    if by_length:
        lengths = workload.lengths
        order.sort(key=lambda row: -lengths[row])
    rows = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    @torch.inference_mode()  # which every thread must be told
    def answered(part: list[int]) -> tuple[Tensor, Tensor]:
        logits, exit_layer = answer(*_pad(workload.select(part)))
        return logits.float(), torch.full((len(part),), full_depth_layers) if exit_layer is None else exit_layer

    if streams == 1:
        outcomes = [answered(part) for part in rows]
    else:
        with ThreadPoolExecutor(streams) as threads:
            outcomes = list(threads.map(answered, rows))
    return _in_order(rows, [logits for logits, _ in outcomes], [layers for _, layers in outcomes])


def _pad(workload: Workload) -> tuple[Tensor, Tensor, Tensor | None]:
    """input_ids, attention_mask and token_type_ids, int64 ``[B, S]``, padded on the right with 0."""
    batch = RaggedBatch.from_sequences(workload.sequences, workload.token_type_ids)
    assert batch.input_ids is not None
    types = None if batch.token_type_ids is None else batch.unpack(batch.token_type_ids)[0]
    return *batch.unpack(batch.input_ids), types


def _in_order(rows: list[list[int]], logits: list[Tensor], layers: list[Tensor]) -> Answers:
    place = torch.tensor([row for part in rows for row in part]).argsort()
    return Answers(torch.cat(logits)[place], torch.cat(layers)[place])
