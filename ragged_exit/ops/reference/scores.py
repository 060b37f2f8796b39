"""Exit scores from logits, formula by formula (docstrings name the system that uses each)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ragged_exit.rules import ScoreSpec


def _exact_nats(logits: Tensor) -> Tensor:
    """ln S - sum(e d) / S with d = z - max z, e = exp d, S = sum e; 0 ln 0 = 0; never negative."""
    shifted = logits - logits.amax(1, keepdim=True)  # [B, C]
    weight = shifted.exp()
    total = weight.sum(1)
    mean = torch.where(weight > 0, weight * shifted, 0.0).sum(1) / total
    return (total.log() - mean).clamp_min(0)


def _hf(logits: Tensor) -> Tensor:
    """ln(sum e^z) - sum(z e^z) / sum(e^z), no max subtraction: Hugging Face's DeeBERT, BERxiT, ElasticBERT."""
    weight = logits.exp()
    total = weight.sum(1)
    return total.log() - (logits * weight).sum(1) / total


def _castorini(logits: Tensor) -> Tensor:
    """-sum p ln p with p = softmax z and no guard, so NaN once a p underflows: castorini's DeeBERT master."""
    probs = logits.softmax(1)
    return -(probs * probs.log()).sum(1)


def _categorical(logits: Tensor) -> Tensor:
    """torch.distributions.Categorical(softmax z).entropy() / ln C without its argument check: FastBERT, PCEE-BERT."""
    probs = logits.softmax(1)
    probs = probs / probs.sum(1, keepdim=True)
    eps = torch.finfo(probs.dtype).eps if probs.dtype == torch.float32 else 2.0**-23  # the originals ran in fp32
    return -(probs * probs.clamp(eps, 1 - eps).log()).sum(1) / _log_classes(logits)


def _normalised(logits: Tensor) -> Tensor:
    """The exact entropy / ln C, in [0, 1]: COSEE, DE3-BERT."""
    return _exact_nats(logits) / _log_classes(logits)


def _log_classes(logits: Tensor) -> Tensor:
    return logits.new_tensor(math.log(logits.shape[1]))  # a tensor: one class gives 0 / 0 = NaN, not an error


_ENTROPIES = {
    "exact": _exact_nats,
    "hf": _hf,
    "castorini": _castorini,
    "categorical": _categorical,
    "normalised": _normalised,
}


def entropy(logits: Tensor, dialect: str) -> Tensor:
    """Entropy of softmax(logits) ``[B, C]`` -> ``[B]`` in one of the dialects of ``rules.Entropy``."""
    return _ENTROPIES[dialect](logits)


def of_logits(logits: Tensor, spec: ScoreSpec) -> Tensor:
    """The score ``[B]`` of a rule that needs the logits alone."""
    if spec.score == "max_prob":
        return max_prob(logits, spec.temperature)
    if spec.score == "energy":
        return energy(logits, spec.temperature)
    return entropy(logits, spec.score.removeprefix("entropy_"))


def max_prob(logits: Tensor, temperature: float) -> Tensor:
    """max softmax(z / T): CascadeBERT, CeeBERT."""
    return (logits / temperature).softmax(1).amax(1)


def energy(logits: Tensor, temperature: float) -> Tensor:
    """1 / (1 + (sum e^(z / T))^T): COSEE. An overflowing sum gives 0."""
    return 1 / (1 + (logits / temperature).exp().sum(1) ** temperature)


def cosine_distances(vectors: Tensor, prototypes: Tensor) -> Tensor:
    """1 - cos of vectors ``[B, D]`` and prototypes ``[C, D]`` -> ``[B, C]``, >= 0; a zero vector is at distance 1."""
    norms = vectors.norm(dim=1)[:, None] * prototypes.norm(dim=1)
    dots = vectors @ prototypes.T
    return torch.where(norms == 0, 1.0, (1 - dots / norms).clamp_min(0))


def distance_ratio(logits: Tensor, distances: Tensor, dr_order: str) -> Tensor:
    """DR(r1, r2) = (1 + (r1 - r2) / max(r1, r2)) / 2, 1/2 where both are 0 (DE3-BERT).

    r1, r2: distances to the two likeliest classes ("prob"; ties to the lower index) or the two smallest ("distance").
    """
    if dr_order == "prob":
        first = logits.argmax(1, keepdim=True)
        second = logits.scatter(1, first, -math.inf).argmax(1, keepdim=True)
        nearest = distances.gather(1, torch.cat((first, second), 1))
    else:
        nearest = distances.topk(2, dim=1, largest=False).values
    near, far = nearest.unbind(1)
    largest = torch.maximum(near, far)
    return torch.where(largest == 0, 0.5, (1 + (near - far) / largest) / 2)


def distance_entropy(logits: Tensor, distances: Tensor, lam: float, dr_order: str) -> Tensor:
    """EDR = (lam + 1) DR E / (lam E + DR), 0 where both are 0 (DE3-BERT)."""
    spread, ratio = _normalised(logits), distance_ratio(logits, distances, dr_order)
    weight = lam * spread + ratio
    edr = (lam + 1) * ratio * spread / weight
    # a NaN logit must stay NaN even where argmax found a class; a zero weight is 0/0 by definition 0
    return torch.where(weight == 0, 0.0, edr)
