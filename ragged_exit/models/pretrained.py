"""Starting points: the encoder, pooler and classifier inside a Hugging Face model, and encoders cut to some depth."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from ragged_exit.arguments import whole_number
from ragged_exit.backbones import check_backbone
from ragged_exit.models.base import EarlyExitModel, new_backbone

_FINE_TUNED = "ForSequenceClassification"  # how the classes end whose head answers as ours do


class Found(NamedTuple):
    """backbone: the encoder without its pooler. pooler, classifier: the two linears of its head, where it has them."""

    backbone: Any
    pooler: nn.Linear | None
    classifier: nn.Linear | None


def read_backbone(source: str | Path | nn.Module) -> Found:
    """Take apart a directory, an id, or a loaded Hugging Face model, which is copied and stays as it is.

    A linear that the checkpoint does not hold, and that transformers therefore drew at random, counts as not there.

    Heads that are known: pooler and classifier (BERT, ALBERT), dense and out_proj (RoBERTa, ELECTRA), pre_classifier
    and classifier (DistilBERT), all of a ``...ForSequenceClassification``; other heads answer something else.

    Raises TypeError for an early-exit or an accelerated model, ValueError for a checkpoint that lacks weights of the
    encoder itself, a module that cannot be copied, and an encoder that ``check_backbone`` refuses.
    """
    drawn: set[str] = set()
    if isinstance(source, EarlyExitModel):
        raise TypeError(f"source: expected an encoder, got a {type(source).__name__}, which has exits already")
    if isinstance(source, nn.Module):
        if next(source.parameters(), None) is None:  # an accelerated model, say
            raise TypeError(f"source: expected an encoder, got {type(source).__name__}, which has no parameters")
        try:
            whole = copy.deepcopy(source).float()
        except RuntimeError as error:  # of a weight that is computed from others: torch's pruning, its old weight_norm
            raise ValueError(f"source: it cannot be copied; make pruned layers plain ones first ({error})") from error
    else:
        architectures = AutoConfig.from_pretrained(source).architectures or [""]
        fine_tuned = architectures[0].endswith(_FINE_TUNED)
        factory = AutoModelForSequenceClassification if fine_tuned else AutoModel
        whole, loaded = factory.from_pretrained(  # whatever dtype the file holds: the heads are fp32
            source, dtype=torch.float32, output_loading_info=True
        )
        drawn = set(loaded["missing_keys"])
        _check_encoder(source, getattr(whole, "base_model", whole), whole, drawn)
    names = {id(module): name for name, module in whole.named_modules()}
    backbone = getattr(whole, "base_model", whole)
    check_backbone(backbone)
    pooler: Any = getattr(backbone, "pooler", None)
    pooler = getattr(pooler, "dense", pooler)  # ALBERT's is the linear itself
    classifier: Any = None
    if any(kind.__name__.endswith(_FINE_TUNED) for kind in type(whole).__mro__):
        pooler, classifier = getattr(whole, "pre_classifier", pooler), whole.classifier
        if not isinstance(classifier, nn.Linear):
            pooler, classifier = classifier.dense, classifier.out_proj
    if hasattr(backbone, "pooler"):
        backbone.pooler = None
    pooler, classifier = (
        None if linear is None or f"{names[id(linear)]}.weight" in drawn else linear for linear in (pooler, classifier)
    )
    return Found(backbone, pooler, classifier)


def _check_encoder(source: str | Path, backbone: nn.Module, whole: nn.Module, drawn: set[str]) -> None:
    """Raise ValueError if weights of the encoder were drawn at random: transformers does no more than print them."""
    encoder = {id(value) for name, value in backbone.named_parameters() if not name.startswith("pooler.")}
    missing = sorted(name for name, value in whole.named_parameters() if id(value) in encoder and name in drawn)
    if missing:
        raise ValueError(
            f"source: {source} lacks {len(missing)} weights of the encoder ({missing[0]}, ...); "
            "an early-exit checkpoint is read by ragged_exit.load"
        )


def set_labels(found: Found, num_labels: int | None) -> None:
    """Set the config's ``num_labels``. Raises TypeError for no integer, ValueError for one that cannot be.

    A fine-tuned classifier has its own number, which cannot be another.
    """
    if num_labels is None:
        return
    num_labels = whole_number("num_labels", num_labels)
    if num_labels < 1:
        raise ValueError(f"num_labels: expected at least 1, got {num_labels}")
    if found.classifier is not None and found.classifier.out_features != num_labels:
        raise ValueError(
            f"num_labels: the checkpoint's classifier has {found.classifier.out_features} classes, got {num_labels}"
        )
    found.backbone.config.num_labels = num_labels


def first_layers(backbone: Any, count: int) -> Any:
    """A copy of ``backbone`` that ends after ``count`` layers.

    Raises ValueError for a count that cannot be, and for linears whose weights are made of others (pruned, say).
    """
    config = copy.deepcopy(backbone.config)
    depth = config.num_hidden_layers
    if not 1 <= count <= depth:
        raise ValueError(f"k: expected 1 to {depth} layers, got {count}")
    config.num_hidden_layers = count
    groups = getattr(config, "num_hidden_groups", 1)  # ALBERT spreads its layers evenly over groups of weights
    if groups > 1:
        if count * groups % depth:
            raise ValueError(f"k: expected whole groups of {depth // groups} layers, got {count}")
        config.num_hidden_groups = count * groups // depth
    shallow = new_backbone(config)
    weights = backbone.state_dict()
    wanted = shallow.state_dict()
    missing = next((name for name in wanted if name not in weights), None)
    if missing is not None:
        raise ValueError(f"source: its encoder has no {missing}; make pruned or parametrized layers plain ones first")
    shallow.load_state_dict({name: weights[name] for name in wanted})
    return shallow.to(next(backbone.parameters()).dtype).eval()
