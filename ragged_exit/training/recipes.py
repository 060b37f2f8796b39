"""How each published system is trained: phases of losses over its exits.

Notation: L_i is the task's loss at the i-th of n exits (cross-entropy, or the squared error of a regression). What a
paper leaves to its code follows the code. Epochs are BERT's (DeeBERT and BERxiT train RoBERTa for 10); a cascade's
members get 3, where CascadeBERT's paper has 10 and its script 5. Frozen parts run without dropout, unlike the
originals': their features can then be computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ragged_exit.models.base import EarlyExitModel, ExitPoint
from ragged_exit.training.phases import HEADS_ONLY, Batch, Phase, Schedule

MARGIN_WEIGHT = 0.5  # CascadeBERT's lambda
MARGIN = 0.5  # CascadeBERT's epsilon on SST-2, MRPC and RTE


def phases_of(model: EarlyExitModel) -> list[Phase]:
    """The recipe of the model's system. ValueError for a system without one (a cascade trains its members)."""
    if model.system not in RECIPES:
        raise ValueError(f"model: expected one of {sorted(RECIPES)}, got {model.system}")
    return RECIPES[model.system]()


# Losses ---------------------------------------------------------------------------------------------------------------
def final_loss(model: EarlyExitModel, batch: Batch) -> Tensor:
    """L_n."""
    return model.task_loss(batch.points[-1].output.logits, batch.labels)


def early_loss(model: Any, batch: Batch) -> Tensor:
    """sum of L_i over i < n."""
    return _sum(model, batch.points[: model.num_exits - 1], batch.labels)


def joint_loss(model: EarlyExitModel, batch: Batch) -> Tensor:
    """The system's own weighted sum over all exits (``training_loss``)."""
    return model.training_loss(batch.points, batch.labels)


def alternating_loss(model: Any, batch: Batch) -> Tensor:
    """Even steps L_n, odd steps the sum of the others; always plus the uncertainty's squared error. Evaluation: both.

    BERxiT (Xin et al., EACL 2021), alternating fine-tuning and learning to exit, as its code has it: the step counts
    from the epoch's start, and with the uncertainty the odd steps leave out L_n.
    """
    loss = model.uncertainty_loss(batch.points, batch.labels)
    if batch.step is None or batch.step % 2 == 0:
        loss = loss + final_loss(model, batch)
    if batch.step is None or batch.step % 2 == 1:
        loss = loss + early_loss(model, batch)
    return loss


def distillation_loss(model: Any, batch: Batch) -> Tensor:
    """sum over the students of KL(teacher || student), batch mean (FastBERT, Liu et al., ACL 2020)."""
    return model.distillation_loss(batch.points)


def margin_loss(model: EarlyExitModel, batch: Batch) -> Tensor:
    """L + lambda DAR, DAR the mean over easy rows of max(0, confidence of a random hard row - own + epsilon).

    CascadeBERT's difficulty-aware regularisation (Li et al., Findings of EMNLP 2021); confidence is the largest
    probability. DAR is 0 in a batch without easy or without hard rows, and in evaluation.
    """
    loss = final_loss(model, batch)
    if batch.step is None or batch.hard is None:
        return loss
    confidence = batch.points[-1].output.logits.float().softmax(1).amax(1)  # [B]
    easy, hard = confidence[~batch.hard], confidence[batch.hard]
    if len(easy) == 0 or len(hard) == 0:
        return loss
    drawn = hard[torch.randint(len(hard), (len(easy),), device=hard.device)]
    return loss + MARGIN_WEIGHT * F.margin_ranking_loss(easy, drawn, torch.ones_like(easy), margin=MARGIN)


def _sum(model: EarlyExitModel, points: list[ExitPoint], labels: Tensor) -> Tensor:
    losses = [model.task_loss(point.output.logits, labels) for point in points]
    return torch.stack(losses).sum() if losses else torch.zeros((), device=labels.device)  # a model of one exit


# Gradient equilibrium -------------------------------------------------------------------------------------------------
def gradient_equilibrium(model: Any) -> list[RemovableHandle]:
    """Give each backbone layer the mean, not the sum, of the gradients from the exits at and above it.

    ElasticBERT scales the gradient by 1/(n - i) where it enters exit i's hidden state and by n - i - 1 on its way from
    layer i + 1 (Liu et al., NAACL 2022, after Li et al., ICCV 2019). The factors telescope: at layer i every later
    exit's gradient weighs 1/(n - i), and that is what scaling the parameters' gradients does.
    """
    if not any(parameter.requires_grad for parameter in model.backbone.parameters()):
        return []  # frozen
    layers = _layers(model.backbone)
    if len(layers) != model.config.num_hidden_layers:
        raise ValueError("model: gradient equilibrium needs layers with weights of their own")
    counts = [sum(exit_layer > index for exit_layer in model.exit_layers) for index in range(len(layers))]
    scales = {id(p): 1 / count for layer, count in zip(layers, counts, strict=True) for p in layer.parameters()}
    below = 1 / counts[0]  # the embeddings
    return [
        parameter.register_hook(partial(torch.mul, torch.tensor(scales.get(id(parameter), below))))
        for parameter in model.backbone.parameters()
        if parameter.requires_grad
    ]


def _layers(backbone: nn.Module) -> list[nn.Module]:
    """The encoder's layers, the longest list of modules there."""
    lists = [list(module) for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


# Recipes --------------------------------------------------------------------------------------------------------------
def _whole(model: Any) -> list[nn.Module]:
    return list(model.children())


def _deebert() -> list[Phase]:
    """Two stages (Xin et al., ACL 2020, section 3.1): L_n with the backbone, then the sum of the others without it.

    The last highway is never trained, as in the original.
    """
    return [
        Phase("final", final_loss, lambda m: [m.backbone, m.final], Schedule(3, 2e-5, 8)),
        Phase("highways", early_loss, lambda m: list(m.highways)[:-1], HEADS_ONLY),
    ]


def _berxit() -> list[Phase]:
    """Alternating, with the uncertainty (``alternating_loss``)."""
    return [
        Phase(
            "alternating",
            alternating_loss,
            lambda m: [m.backbone, *list(m.highways)[:-1], m.final, m.lte],
            Schedule(3, 2e-5, 8),
        )
    ]


def _de3bert() -> list[Phase]:
    """Jointly: sum of L_i + alpha DAR_i, prototypes by moving average (arXiv 2402.05948; ``De3Bert.training_loss``)."""
    return [Phase("joint", joint_loss, _whole, Schedule(5, 2e-5, 32))]


def _pabee() -> list[Phase]:
    """Jointly: sum of i L_i / sum of i (Zhou et al., NeurIPS 2020; ``Pabee.training_loss``)."""
    return [Phase("joint", joint_loss, _whole, Schedule(5, 2e-5, 32))]


def _elasticbert() -> list[Phase]:
    """Jointly: sum of L_i, with gradient equilibrium."""
    schedule = Schedule(5, 2e-5, 32, warmup=0.06, weight_decay=0.1)
    return [Phase("joint", joint_loss, _whole, schedule, hooks=gradient_equilibrium)]


def _fastbert() -> list[Phase]:
    """The teacher with the backbone; then, without it, the students distilled from it, ten times as fast."""
    return [
        Phase("teacher", final_loss, lambda m: [m.backbone, m.classifiers[-1]], Schedule(3, 2e-5, 32, warmup=0.1)),
        Phase("students", distillation_loss, lambda m: list(m.classifiers)[:-1], Schedule(5, 2e-4, 32, warmup=0.1)),
    ]


def _full_depth() -> list[Phase]:
    """L_n; with difficulty labels ``margin_loss``, as the first member of a cascade."""
    return [Phase("final", margin_loss, lambda m: [m.backbone, m.final], Schedule(3, 2e-5, 16))]


RECIPES: dict[str, Callable[[], list[Phase]]] = {
    "deebert": _deebert,
    "berxit": _berxit,
    "de3bert": _de3bert,
    "pabee": _pabee,
    "elasticbert": _elasticbert,
    "fastbert": _fastbert,
    "full_depth": _full_depth,
}
