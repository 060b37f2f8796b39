"""BERxiT: DeeBERT's highways and one learned uncertainty for them all; regression too (Xin et al., EACL 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from ragged_exit.models.base import ExitPoint, config_from_dict
from ragged_exit.models.deebert import HIGHWAY_RENAMES, HighwayModel
from ragged_exit.models.highway import new_linear
from ragged_exit.models.layered import LayerExit
from ragged_exit.models.published import BACKBONES, LAYOUTS, PublishedLayout
from ragged_exit.rules import ExitRule, LearnedUncertainty


class Berxit(HighwayModel):
    """Exit where u = sigmoid(w . pooled + b) is small; w, b (``lte``) are shared by all exits (LearnedUncertainty).

    pooled is the exit's own tanh vector. At the last layer the final classifier answers, unasked; its score is the u of
    its own pooled vector. The entropy rule works too. The last layer's highway is in the checkpoints and never used.
    """

    system: ClassVar[str] = "berxit"
    offers: ClassVar[frozenset[str]] = frozenset({"uncertainty"})

    def __init__(
        self,
        config: PretrainedConfig,
        rule: ExitRule | None = None,
        *,
        exit_layers: Sequence[int] | None = None,
        pooling: str = "cls",
        backbone: nn.Module | None = None,
    ) -> None:
        rule = LearnedUncertainty(0.005) if rule is None else rule  # the original's default
        super().__init__(config, rule, exit_layers=exit_layers, pooling=pooling, backbone=backbone)
        self.lte = new_linear(config, 1)

    def layer_exits(self) -> list[LayerExit]:
        heads = [*self.highways[:-1], self.final]
        return [
            LayerExit(head.exit(self.pooling, uncertainty=self.lte), layer, index)
            for index, (head, layer) in enumerate(zip(heads, self.exit_layers, strict=True))
        ]

    def training_loss(self, points: list[ExitPoint], labels: Tensor) -> Tensor:
        """The task's loss summed over the exits, plus ``uncertainty_loss`` (the original's "all" with LTE)."""
        return super().training_loss(points, labels) + self.uncertainty_loss(points, labels)

    def uncertainty_loss(self, points: list[ExitPoint], labels: Tensor) -> Tensor:
        """Mean squared error of u against 1 where the exit is wrong, else 0; for regression |tanh(answer - label)|."""
        losses = []
        for point in points:
            logits, signal = point.output.logits.detach(), point.output.signal
            assert signal is not None
            wrong = (logits[:, 0] - labels).tanh().abs() if logits.shape[1] == 1 else logits.argmax(1) != labels
            losses.append(F.mse_loss(signal, wrong.to(signal.dtype)))
        return torch.stack(losses).mean()


def _build(saved: dict, state: dict[str, Tensor], dialect: str) -> Berxit:
    config = config_from_dict(saved)
    config.num_labels = state["final.classifier.weight"].shape[0]
    return Berxit(config)


LAYOUTS.append(
    PublishedLayout(
        system="berxit",
        signature=r"encoder\.lte_classifier\.",
        renames=(
            (r"core\..*", ""),  # the original saves its backbone twice
            (rf"{BACKBONES}\.encoder\.lte_classifier\.(.*)", r"lte.\1"),
            *HIGHWAY_RENAMES,
        ),
        build=_build,
    )
)
