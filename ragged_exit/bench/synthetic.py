"""Workloads made from a seed: lengths by profile, random weights of a known shape, heads that tell two topics apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig

from ragged_exit.accelerate import accelerate
from ragged_exit.bench.workload import Workload
from ragged_exit.calibration.exit_table import ExitTable, exit_table
from ragged_exit.models.deebert import DeeBert
from ragged_exit.rules import Entropy
from ragged_exit.training.features import pooled_features

SHAPES = {
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12},
    "small": {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 12},
    "tiny": {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "num_hidden_layers": 2},
}
VOCABULARY = 30_522
CLS = 101
FIRST_WORD, TOPIC_WORDS = 1_000, 32
HEAD_ROWS = 1_000  # that heads are fitted on
# that uniform exits are uniform on: many, and long ones not for longer than what is measured
CALIBRATION_ROWS = {"sst2": 2_000, "mrpc": 2_000, "long": 500, "uniform": 1_000}
LOGIT, RIDGE = 2.0, 0.1


def sst2_lengths(count: int, generator: torch.Generator) -> Tensor:
    """Token counts like SST-2's sentences: gamma-distributed, mean 24, standard deviation 12, within 4 ... 66."""
    exponentials = torch.empty(count, 4).exponential_(generator=generator)
    return (6 * exponentials.sum(1)).round().long().clamp(4, 66)  # a sum of 4 exponentials is gamma with shape 4


def mrpc_lengths(count: int, generator: torch.Generator) -> Tensor:
    """Token counts like MRPC's pairs: normal, mean 53, standard deviation 14, within 16 ... 103."""
    return torch.normal(53.0, 14.0, (count,), generator=generator).round().long().clamp(16, 103)


def long_lengths(count: int, generator: torch.Generator) -> Tensor:
    """Uniform over 128 ... 512."""
    return torch.randint(128, 513, (count,), generator=generator)


def equal_lengths(count: int, generator: torch.Generator) -> Tensor:
    """128 for all: nothing to gain from dropping padding."""
    return torch.full((count,), 128)


PROFILES = {"sst2": sst2_lengths, "mrpc": mrpc_lengths, "long": long_lengths, "uniform": equal_lengths}


def random_workload(count: int, seed: int, profile: str = "sst2") -> Workload:
    """``count`` sequences with the lengths of ``profile``, of random tokens and of one of two topics, the label.

    50 to 100 % of a sequence's tokens are words of its topic: some rows are easier than others, none is hopeless, so
    that answers survive bfloat16.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = PROFILES[profile](count, generator)
    labels = torch.randint(2, (count,), generator=generator)
    purity = 0.5 + 0.5 * torch.rand(count, generator=generator)
    total = int(lengths.sum())
    tokens = torch.randint(FIRST_WORD + 2 * TOPIC_WORDS, VOCABULARY, (total,), generator=generator)
    words = FIRST_WORD + torch.randint(TOPIC_WORDS, (total,), generator=generator)
    of_topic = torch.rand(total, generator=generator) < purity.repeat_interleave(lengths)
    tokens = torch.where(of_topic, words + TOPIC_WORDS * labels.repeat_interleave(lengths), tokens)
    tokens[lengths.cumsum(0) - lengths] = CLS
    return Workload([part.tolist() for part in tokens.split(lengths.tolist())], labels)


def random_deebert(shape: str, seed: int) -> DeeBert:
    """A DeeBERT of a known shape with random weights; heads are scaled up so that rows' scores differ clearly."""
    torch.manual_seed(seed)
    model = DeeBert(BertConfig(vocab_size=VOCABULARY, num_labels=2, **SHAPES[shape]), Entropy(0.0)).eval()
    for head in (*model.highways, model.final):
        nn.init.normal_(head.pooler.weight, std=2 / model.config.hidden_size**0.5)
        nn.init.normal_(head.classifier.weight, std=4 / model.config.hidden_size**0.5)
    return model


@torch.inference_mode()
def fit_heads(model: DeeBert, seed: int, profile: str) -> None:
    """Fit the classifiers of a random encoder to the topics: ridge regression on the pooled vectors, logits of +-2."""
    workload = random_workload(HEAD_ROWS, seed, profile)
    assert workload.labels is not None
    features = pooled_features(accelerate(model).encoder, workload.sequences, pooling=model.pooling)  # [N, L, H]
    wanted = LOGIT * torch.stack([1 - 2 * workload.labels, 2 * workload.labels - 1], 1).double()  # [N, 2]
    for head, layer in model.exits():
        pooled = head.pooler(features[:, layer - 1]).tanh().double()  # [N, H]
        mean = pooled.mean(0)
        centred = pooled - mean
        scatter = centred.T @ centred
        scatter.diagonal().add_(RIDGE * scatter.diagonal().mean())
        weight = torch.linalg.solve(scatter, centred.T @ wanted)  # [H, 2]
        head.classifier.weight.copy_(weight.T)
        head.classifier.bias.copy_(wanted.mean(0) - mean @ weight)


def uniform_rule(model: DeeBert, seed: int, profile: str) -> Entropy:
    """``uniform_exits`` on rows of ``profile``: many, since with few the exits are uniform on those alone."""
    rows = random_workload(CALIBRATION_ROWS[profile], seed, profile)
    return uniform_exits(exit_table(accelerate(model), rows.sequences))


def uniform_exits(table: ExitTable) -> Entropy:
    """A rule with one threshold an exit under which every exit lets the same number of the table's rows go."""
    exits, rows = table.scores.shape
    waiting = torch.ones(rows, dtype=torch.bool)
    thresholds = []
    for number in range(exits):
        scores = table.scores[number, waiting].sort().values
        leaves = min(len(scores) - 1, round(len(scores) / (exits - number)))
        threshold = float((scores[leaves - 1] + scores[leaves]) / 2) if leaves else 0.0  # between two rows' scores
        thresholds.append(threshold)
        waiting &= ~(table.scores[number] < threshold)
    return Entropy(thresholds)
