"""Workloads made from a seed: lengths by profile, random weights of a known shape, exits spread as asked."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig

from ragged_exit.bench.workload import Workload
from ragged_exit.calibration.exit_table import ExitTable
from ragged_exit.models.deebert import DeeBert
from ragged_exit.rules import Entropy

SHAPES = {
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12},
    "small": {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 12},
}
VOCABULARY = 30_522


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
    """``count`` sequences of random tokens with the lengths of ``profile``."""
    generator = torch.Generator().manual_seed(seed)
    lengths = PROFILES[profile](count, generator).tolist()
    tokens = torch.randint(1000, VOCABULARY, (sum(lengths),), generator=generator)
    return Workload([part.tolist() for part in tokens.split(lengths)])


def random_deebert(shape: str, seed: int, *, num_labels: int = 2) -> DeeBert:
    """A DeeBERT of a known shape with random weights; heads are scaled up so that rows' scores differ clearly."""
    torch.manual_seed(seed)
    model = DeeBert(BertConfig(vocab_size=VOCABULARY, num_labels=num_labels, **SHAPES[shape]), Entropy(0.0)).eval()
    for head in (*model.highways, model.final):
        nn.init.normal_(head.pooler.weight, std=2 / model.config.hidden_size**0.5)
        nn.init.normal_(head.classifier.weight, std=4 / model.config.hidden_size**0.5)
    return model


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
