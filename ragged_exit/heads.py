"""Exit heads: what turns a row's hidden states into logits, as plain tensors that the ops can take."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ragged_exit.batch import RaggedBatch

POOLINGS = ("cls", "mean")


class HeadOutput(NamedTuple):
    """What a head returns that runs outside the fused exit step, and every head of a padded reference model.

    logits: float ``[Bcap, C]``; signal: what a rule asks for besides (uncertainty f32 ``[Bcap]``, or cosine distances
    to all prototypes f32 ``[Bcap, C]``), else None. features: float ``[Bcap, D]``, the vectors that a training loss
    needs, else None. Rows past ``live`` are ignored.
    """

    logits: Tensor
    signal: Tensor | None = None
    features: Tensor | None = None


class TokenHead(Protocol):
    """Any other head: sees the whole packed batch and may read and replace entries of ``batch.state``."""

    def __call__(self, batch: RaggedBatch) -> HeadOutput: ...


class HeadWeights(NamedTuple):
    """An ``MlpHead`` as the ops' implementations take it: its fields, and nothing to check."""

    classifier_weight: Tensor
    classifier_bias: Tensor | None
    pooler_weight: Tensor | None
    pooler_bias: Tensor | None
    uncertainty_weight: Tensor | None
    uncertainty_bias: Tensor | None
    prototype_weight: Tensor | None
    prototype_bias: Tensor | None
    prototypes: Tensor | None
    packed_pooler: Tensor | None
    pooling: str


@dataclass(frozen=True)
class MlpHead:
    """Pool a row (its [CLS] token, or the mean of its tokens), optionally a tanh pooler, then a linear classifier.

    pooler_weight ``[P, H]`` and pooler_bias ``[P]`` are None when the classifier sits on the pooled hidden state
    (then P = H). uncertainty_weight ``[P]``, uncertainty_bias ``[1]``: BERxiT's learned uncertainty on the pooled
    vector. prototype_weight ``[D, H]``, prototype_bias ``[D]``, prototypes ``[C, D]``: DE3-BERT's net on the pooled
    hidden state (before the pooler) and its class prototypes. All weights share one dtype and device.
    """

    classifier_weight: Tensor  # [C, P]
    classifier_bias: Tensor | None = None  # [C]
    pooler_weight: Tensor | None = None  # [P, H]
    pooler_bias: Tensor | None = None  # [P]
    uncertainty_weight: Tensor | None = None  # [P]
    uncertainty_bias: Tensor | None = None  # [1]
    prototype_weight: Tensor | None = None  # [D, H]
    prototype_bias: Tensor | None = None  # [D]
    prototypes: Tensor | None = None  # [C, D]
    packed_pooler: Tensor | None = None  # pooler_weight as the native kernel reads it best (packed_for)
    pooling: str = "cls"

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {POOLINGS}, got {self.pooling!r}")
        width, classes = self.classifier_weight.shape[1], self.num_labels
        if self.pooler_weight is not None and self.pooler_weight.shape[0] != width:
            raise ValueError(
                f"pooler_weight: expected [{width}, H] to feed the classifier, got {list(self.pooler_weight.shape)}"
            )
        if self.prototypes is not None and self.prototypes.shape[0] != classes:
            raise ValueError(f"prototypes: expected {classes} rows (classes), got {self.prototypes.shape[0]}")
        if (self.prototypes is None) != (self.prototype_weight is None):
            raise ValueError("prototypes: expected together with prototype_weight, got one of the two")
        depth = 0 if self.prototypes is None else self.prototypes.shape[1]
        for name, shape in (
            ("classifier_bias", (classes,)),
            ("pooler_bias", (width,)),
            ("uncertainty_weight", (width,)),
            ("uncertainty_bias", (1,)),
            ("prototype_weight", (depth, self.hidden_size)),
            ("prototype_bias", (depth,)),
        ):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)}, got {list(value.shape)}")
        like = self.classifier_weight
        for item in fields(self):  # the kernels read raw memory
            if item.name == "packed_pooler":
                continue  # its dtype is the layout's, which the native kernel checks
            value = getattr(self, item.name)
            if isinstance(value, Tensor) and (value.dtype, value.device) != (like.dtype, like.device):
                raise ValueError(
                    f"{item.name}: expected {like.dtype} on {like.device} as the classifier, "
                    f"got {value.dtype} on {value.device}"
                )

    @cached_property
    def weights(self) -> HeadWeights:
        return HeadWeights(**{item.name: getattr(self, item.name) for item in fields(self)})

    @property
    def num_labels(self) -> int:
        return self.classifier_weight.shape[0]

    @property
    def hidden_size(self) -> int:
        weight = self.classifier_weight if self.pooler_weight is None else self.pooler_weight
        return weight.shape[1]

    @property
    def offers(self) -> set[str]:
        """What it can give a rule besides logits: "uncertainty", "prototypes"."""
        found = set()
        if self.uncertainty_weight is not None:
            found.add("uncertainty")
        if self.prototypes is not None:
            found.add("prototypes")
        return found

    def to(self, dtype: torch.dtype, device: torch.device) -> MlpHead:
        """A detached, contiguous copy on ``device`` in ``dtype``, without the packed pooler."""
        moved: dict[str, Any] = {
            item.name: value.detach().to(device=device, dtype=dtype, copy=True).contiguous()
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **(moved | {"packed_pooler": None}))
