"""FastBERT: a small self-attention over all tokens as the head of every layer (Liu et al., ACL 2020), on UER's BERT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from ragged_exit.backbones import Affine, stack
from ragged_exit.batch import RaggedBatch, check_inputs, token_bucket
from ragged_exit.encoder import PackedEncoder
from ragged_exit.heads import HeadOutput
from ragged_exit.linears import PackedLinear
from ragged_exit.models.base import ExitPoint
from ragged_exit.models.highway import pool
from ragged_exit.models.layered import LayeredModel, LayerExit
from ragged_exit.models.published import LAYOUTS, PublishedLayout, count_prefixes
from ragged_exit.models.uer import UerAttention, UerConfig
from ragged_exit.ops import varlen_attention
from ragged_exit.rules import Entropy, ExitRule

BRANCH_SIZE = 128
BRANCH_HEADS = 2


class Branch(nn.Module):
    """Linear H -> 128, tanh, self-attention of 2 heads over the row's tokens, [CLS], Linear, tanh, Linear 128 -> C."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dropout = getattr(config, "hidden_dropout_prob", 0.0)
        self.output_layer_0 = nn.Linear(config.hidden_size, BRANCH_SIZE)
        self.self_atten = UerAttention(BRANCH_SIZE, BRANCH_HEADS, dropout)
        self.output_layer_1 = nn.Linear(BRANCH_SIZE, BRANCH_SIZE)
        self.output_layer_2 = nn.Linear(BRANCH_SIZE, config.num_labels)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> HeadOutput:
        """hidden ``[B, S, H]``, mask ``[B, S]`` -> logits ``[B, C]``."""
        narrow = torch.tanh(self.output_layer_0(hidden))  # [B, S, 128]
        first = pool(self.self_atten(narrow, attention_mask), attention_mask, "cls")  # [B, 128]
        return HeadOutput(self.output_layer_2(torch.tanh(self.output_layer_1(first))))

    def packed(self, encoder: PackedEncoder) -> PackedBranch:
        """A snapshot for the executor."""
        return PackedBranch(self, encoder.impl, encoder.dtype, encoder.device)


class PackedBranch:
    """``Branch`` on the packed tokens of the rows that are left: only the attention needs all of them."""

    def __init__(self, branch: Branch, impl: str | None, dtype: torch.dtype, device: torch.device) -> None:
        def packed(value: Affine) -> PackedLinear:
            assert value.bias is not None
            return PackedLinear(value.weight.to(device, dtype), value.bias.to(device, dtype), impl=impl)

        self.impl = impl
        attention = branch.self_atten
        self.narrow = packed(Affine.of(branch.output_layer_0))
        self.qkv = packed(stack(*attention.linear_layers))
        self.merge = packed(Affine.of(attention.final_linear))
        self.inner = packed(Affine.of(branch.output_layer_1))
        self.classifier = packed(Affine.of(branch.output_layer_2))

    def __call__(self, batch: RaggedBatch) -> HeadOutput:
        assert batch.hidden is not None
        head_size = BRANCH_SIZE // BRANCH_HEADS
        qkv = self.qkv(self.narrow(batch.hidden, "tanh")).view(-1, 3, BRANCH_HEADS, head_size)  # [Tcap, 3, N, D]
        query, key, value = qkv.unbind(1)
        scale = 1 / math.sqrt(head_size)
        context = varlen_attention(query, key, value, batch.cu_seqlens, batch.max_seqlen, scale, impl=self.impl)
        starts = batch.cu_seqlens[:-1].long().clamp_max(len(context) - 1)  # [Bcap]; a dead row takes any token
        first = context.new_zeros(token_bucket(len(starts)), BRANCH_SIZE)  # few sizes, as for tokens
        first[: len(starts)] = context.flatten(1)[starts]
        logits = self.classifier(self.inner(self.merge(first), "tanh"))
        return HeadOutput(logits[: len(starts)])


class FastBert(LayeredModel):
    """Entropy exits (``categorical``: normalised to [0, 1]; ``speed`` is the threshold) at a branch per exit layer.

    The last branch is the teacher. ``compare="<="`` as the paper's script, the default, or ``"<"`` as the PyPI package.
    config: a ``UerConfig`` for published weights; branches on a Hugging Face encoder work too. On UER's backbone,
    ``token_type_ids`` may be UER's own segments: 0 padding, 1 first, 2 second sentence; a mask is needed for padding
    on the left alone.
    """

    system: ClassVar[str] = "fastbert"

    def __init__(
        self,
        config: PretrainedConfig,
        rule: ExitRule | None = None,
        *,
        exit_layers: Sequence[int] | None = None,
        backbone: nn.Module | None = None,
    ) -> None:
        if config.num_labels < 2:  # one output has no distribution to distil
            raise ValueError(f"num_labels: expected at least 2 classes, got {config.num_labels}")
        rule = Entropy(0.0, dialect="categorical", compare="<=") if rule is None else rule
        super().__init__(config, rule, exit_layers=exit_layers, backbone=backbone)
        self.classifiers = nn.ModuleList(Branch(config) for _ in self.exit_layers)

    def options(self) -> dict[str, Any]:
        return {name: value for name, value in super().options().items() if name != "pooling"}

    def layer_exits(self) -> list[LayerExit]:
        return [
            LayerExit(branch, layer, index)  # type: ignore[arg-type]
            for index, (branch, layer) in enumerate(zip(self.classifiers, self.exit_layers, strict=True))
        ]

    def prepare(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """UER's segments -> mask and token types. A row's are told by its [CLS], 1 there and 0 in token types."""
        if token_type_ids is None or not isinstance(self.config, UerConfig):
            return input_ids, attention_mask, token_type_ids
        check_inputs(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        first = token_type_ids.gather(1, mask.int().argmax(1, keepdim=True))
        segments = first == 1  # [B, 1]
        if attention_mask is None:
            mask = torch.where(segments, (token_type_ids > 0).long(), 1)
        return input_ids, mask, torch.where(segments, (token_type_ids - 1).clamp_min(0), token_type_ids)

    def prepare_types(self, token_type_ids: Sequence[int]) -> Sequence[int]:
        if not isinstance(self.config, UerConfig) or list(token_type_ids[:1]) != [1]:
            return token_type_ids
        if 0 in token_type_ids:
            raise ValueError("token_type_ids: expected segments 1 and 2, got 0, padding; give sequences without it")
        return [segment - 1 for segment in token_type_ids]

    def training_loss(self, points: list[ExitPoint], labels: Tensor) -> Tensor:
        """The teacher's loss plus ``distillation_loss`` (the original has two stages)."""
        return self.task_loss(points[-1].output.logits, labels) + self.distillation_loss(points)

    def distillation_loss(self, points: list[ExitPoint]) -> Tensor:
        """The sum of the students' KL divergences from the teacher, each the batch's mean; the teacher stays still."""
        *students, teacher = (point.output.logits.float().log_softmax(1) for point in points)
        target = teacher.detach()
        losses = [F.kl_div(student, target, reduction="batchmean", log_target=True) for student in students]
        return sum(losses, start=target.new_zeros(()))


def _build(saved: dict, state: dict[str, Tensor], dialect: str) -> FastBert:
    words, hidden_size = state["backbone.embedding.word_embedding.weight"].shape
    config = UerConfig(
        vocab_size=words,
        hidden_size=hidden_size,
        num_hidden_layers=count_prefixes(state, r"backbone\.encoder\.transformer\.(\d+)\."),
        num_attention_heads=saved["heads_num"] if "heads_num" in saved else saved["num_attention_heads"],
        intermediate_size=state["backbone.encoder.transformer.0.feed_forward.linear_1.weight"].shape[0],
        max_position_embeddings=state["backbone.embedding.position_embedding.weight"].shape[0],
        type_vocab_size=state["backbone.embedding.segment_embedding.weight"].shape[0] - 1,
        hidden_dropout_prob=saved.get("dropout", 0.1),
        num_labels=state["classifiers.0.output_layer_2.weight"].shape[0],
    )
    return FastBert(config)


def _build_package(saved: dict, state: dict[str, Tensor], dialect: str) -> FastBert:
    model = _build(saved, state, dialect)
    model.rule = Entropy(0.0, dialect="categorical", compare="<")
    return model


LAYOUTS.extend(
    PublishedLayout(
        system="fastbert",
        signature=rf"^{prefix}classifiers\.\d+\.output_layer_0\.",
        renames=(
            (rf"{prefix}classifiers\.(.*)", r"classifiers.\1"),
            (rf"{prefix}(embedding|encoder)\.(.*)", r"backbone.\1.\2"),
        ),
        build=build,
    )
    for prefix, build in (("", _build), (r"kernel\.", _build_package))
)
