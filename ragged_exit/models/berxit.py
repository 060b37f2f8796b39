"""BERxiT: DeeBERT's highways and one learned uncertainty for them all; regression too (Xin et al., EACL 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from ragged_exit.models.base import IGNORED, ExitPoint, config_from_dict
from ragged_exit.models.deebert import HIGHWAY_RENAMES, DeeBert, HighwayModel
from ragged_exit.models.highway import new_linear, own_activation
from ragged_exit.models.layered import LayerExit
from ragged_exit.models.published import BACKBONES, LAYOUTS, PublishedLayout, read_labels
from ragged_exit.rules import Entropy, ExitRule, LearnedUncertainty


class Berxit(HighwayModel):
    """Exit where u = sigmoid(w . pooled + b) is small; w, b (``lte``) are shared by all exits (LearnedUncertainty).

    pooled is the exit's own tanh vector. At the last layer the final classifier answers, unasked; its score is the u of
    its own pooled vector. The entropy rule works too. The last layer's highway is in the checkpoints and never used.
    On DistilBERT, as in the original: relu instead of tanh, and u sees the [CLS] state before the pooler.
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
        on_distilbert = config.model_type == "distilbert"
        activation = own_activation(config) if on_distilbert else "tanh"
        super().__init__(
            config, rule, exit_layers=exit_layers, pooling=pooling, activation=activation, backbone=backbone
        )
        self.raw_uncertainty = on_distilbert
        self.lte = new_linear(config, 1)

    def layer_exits(self) -> list[LayerExit]:
        heads = [*self.highways[:-1], self.final]
        return [
            LayerExit(head.exit(self.pooling, uncertainty=self.lte, raw_uncertainty=self.raw_uncertainty), layer, index)
            for index, (head, layer) in enumerate(zip(heads, self.exit_layers, strict=True))
        ]

    def training_loss(self, points: list[ExitPoint], labels: Tensor) -> Tensor:
        """The task's loss summed over the exits, plus ``uncertainty_loss`` (the original's "all" with LTE)."""
        return super().training_loss(points, labels) + self.uncertainty_loss(points, labels)

    def uncertainty_loss(self, points: list[ExitPoint], labels: Tensor) -> Tensor:
        """Mean squared error of u against 1 where the exit is wrong, else 0; for regression |tanh(answer - label)|.

        At the last layer u is asked of the final head's pooled vector; the original asks its last highway's, which
        never answers and is not here. A class of -100 does not count.
        """
        losses = []
        for point in points:
            logits, signal = point.output.logits.detach(), point.output.signal
            assert signal is not None
            if logits.shape[1] == 1:
                wrong = (logits[:, 0] - labels.reshape(len(logits))).tanh().abs()  # [B]
            else:
                counted = labels.long() != IGNORED  # [B]
                signal, wrong = signal[counted], (logits.argmax(1) != labels)[counted]
            losses.append(F.mse_loss(signal, wrong.to(signal.dtype)))
        return torch.stack(losses).mean()


def _build(saved: dict, state: dict[str, Tensor], dialect: str) -> Berxit:
    config = config_from_dict(saved)
    read_labels(config, state, "final.classifier.weight")
    return Berxit(config)


def _build_albert(saved: dict, state: dict[str, Tensor], dialect: str) -> DeeBert:
    """The original's ALBERT has no learned uncertainty: entropy at highways, and the last one is not asked."""
    config = config_from_dict(saved)
    read_labels(config, state, "final.classifier.weight")
    return DeeBert(config, Entropy(-1.0, dialect=dialect))


_TWICE = (r"core\..*", "")  # the original saves its backbone twice
LAYOUTS.extend(
    (
        PublishedLayout(
            system="berxit",
            signature=rf"^{BACKBONES}\.encoder\.lte_classifier\.",
            renames=(_TWICE, (rf"{BACKBONES}\.encoder\.lte_classifier\.(.*)", r"lte.\1"), *HIGHWAY_RENAMES),
            build=_build,
        ),
        PublishedLayout(
            system="berxit",
            signature=r"^distilbert\.transformer\.lte_classifier\.",
            renames=(
                _TWICE,
                (r"distilbert\.encoder\..*", ""),  # another name of its transformer
                (r"distilbert\.transformer\.lte_classifier\.(.*)", r"lte.\1"),
                (r"distilbert\.transformer\.highway\.(\d+)\.pre_classifier\.(.*)", r"highways.\1.pooler.\2"),
                (r"distilbert\.transformer\.highway\.(\d+)\.classifier\.(.*)", r"highways.\1.classifier.\2"),
                (r"distilbert\.(.*)", r"backbone.\1"),
                (r"pre_classifier\.(.*)", r"final.pooler.\1"),
                (r"classifier\.(.*)", r"final.classifier.\1"),
            ),
            build=_build,
        ),
        PublishedLayout(
            system="berxit",
            signature=r"^albert\.encoder\.highway\.\d+\.pooler\.",
            renames=(
                _TWICE,
                (r"albert\.encoder\.highway\.(\d+)\.pooler\.dense\.(.*)", r"highways.\1.pooler.\2"),
                (r"albert\.encoder\.highway\.(\d+)\.classifier\.(.*)", r"highways.\1.classifier.\2"),
                (r"albert\.pooler\.(.*)", r"final.pooler.\1"),
                (r"albert\.(.*)", r"backbone.\1"),
                (r"classifier\.(.*)", r"final.classifier.\1"),
            ),
            build=_build_albert,
        ),
    )
)
