"""Figures of merit: quality, calibration, and every paper's own notion of speed-up."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose argmax is the label. logits ``[N, C]``, labels int64 ``[N]``."""
    return float((logits.argmax(1) == labels).double().mean())


def f1(logits: Tensor, labels: Tensor) -> float:
    """2 TP / (2 TP + FP + FN) of class 1, as GLUE reports MRPC; 0 when nothing is positive."""
    found, wanted = logits.argmax(1) == 1, labels == 1
    true = int((found & wanted).sum())
    total = int(found.sum()) + int(wanted.sum())  # 2 TP + FP + FN
    return 2 * true / total if total else 0.0


def pearson(values: Tensor, targets: Tensor) -> float:
    """Pearson's correlation of ``[N]`` and ``[N]``; NaN where one of them is constant, as a single row is."""
    from scipy import stats  # here: only regressions need it

    if len(values) < 2:
        return float("nan")
    return float(stats.pearsonr(values.double().numpy(), targets.double().numpy()).statistic)


def spearman(values: Tensor, targets: Tensor) -> float:
    """Spearman's rank correlation of ``[N]`` and ``[N]``; NaN where one of them is constant, as a single row is."""
    from scipy import stats  # here, as above

    if len(values) < 2:
        return float("nan")
    return float(stats.spearmanr(values.double().numpy(), targets.double().numpy()).statistic)


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 10) -> float:
    """ECE = sum over bins of |B| / N |accuracy(B) - mean confidence(B)| (Guo et al. 2017; CascadeBERT: 10 bins).

    Confidence is the largest probability; the bins (0, 1/10], ... (9/10, 1] are equally wide.
    """
    confidence, answer = logits.double().softmax(1).max(1)
    right = (answer == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - confidence)
    return float(gaps.abs().sum() / len(labels))


def difficulty_inversion(confidence: Tensor, hard: Tensor) -> float:
    """DIS = 1 - inverted pairs / (N_easy N_hard), inverted where the hard row is the more confident (CascadeBERT).

    confidence ``[N]``, hard bool ``[N]``. 1 is the best; NaN without easy or without hard rows.
    """
    easy, difficult = confidence[~hard].double(), confidence[hard].double().sort().values
    if not len(easy) or not len(difficult):
        return float("nan")
    above = len(difficult) - torch.searchsorted(difficult, easy, right=True)  # hard rows surer than each easy one
    return 1 - float(above.sum()) / (len(easy) * len(difficult))


def layer_speedup(executed_layers: Tensor, num_layers: int) -> float:
    """L / mean executed layers: PABEE, ElasticBERT, COSEE, and CascadeBERT with its restarts counted."""
    return num_layers / float(executed_layers.double().mean())


def remaining_cost(executed_layers: Tensor, num_layers: int) -> float:
    """Mean executed layers / L: BERxiT's ERS, and what DeeBERT's code prints as "expected saving"."""
    return float(executed_layers.double().mean()) / num_layers


def layers_saved(executed_layers: Tensor, num_layers: int) -> float:
    """1 - mean executed layers / L: the saving of DeeBERT's and F-PABEE's tables."""
    return 1 - remaining_cost(executed_layers, num_layers)
