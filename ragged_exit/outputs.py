"""ExitOutput: what a model and its accelerated forward return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput


@dataclass
class ExitOutput(SequenceClassifierOutput):
    """A SequenceClassifierOutput that also says where each row left.

    logits: ``[B, C]`` of the exit that answered. exit_layer, exit_member, executed_layers: int64 ``[B]``.
    score: f32 ``[B]``, the exit score there. exit_logits: in training mode, one ``[B, C]`` per exit, else None.
    """

    exit_layer: Tensor | None = None
    exit_member: Tensor | None = None
    executed_layers: Tensor | None = None
    score: Tensor | None = None
    exit_logits: tuple[Tensor, ...] | None = None
