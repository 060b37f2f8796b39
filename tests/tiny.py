"""Tiny random models that several test modules share: fast, and with activations wide enough that rows differ."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

import ragged_exit as rx
from ragged_exit.backbones import backbone_weights
from ragged_exit.encoder import PackedEncoder
from ragged_exit.models.base import EarlyExitModel
from ragged_exit.ops.dispatch import native_available
from ragged_exit.testing.compare import quiet_threshold

VOCAB = 97
LONGEST = 24


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For models this small a second thread costs more than it brings, and far more on busy cores. Import it.

    Seeds torch as well.
    """
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def native_built() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return native_available()


def impls() -> list:
    """The CPU implementations as pytest parameters; the native one is skipped until it is built."""
    missing = pytest.mark.skipif(not native_built(), reason="the C++ extension is not built")
    return ["reference", pytest.param("native", marks=missing)]


def bert_config(**changes: object) -> BertConfig:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": LONGEST,
        "num_labels": 3,
    }
    return BertConfig(**(values | changes))


def roberta_config(**changes: object) -> RobertaConfig:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": LONGEST + 2,  # positions count from padding_idx + 1 = 2
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "num_labels": 3,
    }
    return RobertaConfig(**(values | changes))


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0, classifier_gain: float = 3.0) -> nn.Module:
    """Fill every parameter: matrices of gain 1 (classifiers of ``classifier_gain``), norms near 1, biases of 0.2."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "embeddings" in name and parameter.ndim == 2:
            parameter.copy_(noise)
        elif parameter.ndim == 2:
            gain = classifier_gain if parameter.shape[0] < 8 else 1.0
            parameter.copy_(noise * gain / parameter.shape[1] ** 0.5)
        elif "LayerNorm.weight" in name:
            parameter.copy_(1 + 0.1 * noise)
        else:
            parameter.copy_(0.2 * noise)
    return module.eval()


def tiny_backbone(config: BertConfig | RobertaConfig, seed: int = 0) -> nn.Module:
    factory = RobertaModel if config.model_type == "roberta" else BertModel
    return randomise(factory(config, add_pooling_layer=False), seed)


def tiny_deebert(config: BertConfig | RobertaConfig | None = None, seed: int = 0, **options: object) -> rx.DeeBert:
    config = bert_config() if config is None else config
    return randomise(rx.DeeBert(config, **options), seed)  # type: ignore[arg-type]


def packed_encoder(backbone: nn.Module, impl: str = "reference", dtype: torch.dtype = torch.float32) -> PackedEncoder:
    return PackedEncoder(backbone_weights(backbone), impl=impl, dtype=dtype, device=torch.device("cpu"))


def random_rows(count: int, seed: int = 0, longest: int = LONGEST, first: int = 4) -> list[list[int]]:
    """``count`` lists of 1 ... ``longest`` token ids, none of them special (below ``first``)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(first, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def padded(rows: list[list[int]], side: str = "right", fill: int = 0) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) int64 ``[B, S]``."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), fill), torch.zeros(len(rows), width, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        place = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    return ids, mask


def spread_threshold(model: EarlyExitModel, input_ids: Tensor, attention_mask: Tensor, share: float = 0.5) -> float:
    """An entropy threshold far from every row's score, with about ``share`` of the scores below it."""
    with torch.no_grad():
        points = model.exit_points(input_ids, attention_mask, None)
    entropies = [torch.special.entr(point.output.logits.double().softmax(1)).sum(1) for point in points]
    return quiet_threshold(torch.cat(entropies), share)
