"""A tiny model of every system and a task that it can learn: the label says which five words the tokens come from."""

from __future__ import annotations

import torch
from transformers import BertConfig

import ragged_exit as rx
from ragged_exit.examples import Examples
from ragged_exit.models.full_depth import FullDepth
from ragged_exit.models.layered import LayeredModel
from ragged_exit.training.rows import TokenRows, collate

SYSTEMS = {
    "deebert": rx.DeeBert,
    "berxit": rx.Berxit,
    "de3bert": rx.De3Bert,
    "pabee": rx.Pabee,
    "elasticbert": rx.ElasticBert,
    "fastbert": rx.FastBert,
    "full_depth": FullDepth,
}


def tiny(system: str, *, num_labels: int = 2, dropout: float = 0.1, seed: int = 0, **options) -> LayeredModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=num_labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return SYSTEMS[system](config, **options).eval()


def task(rows: int, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (rows,), generator=generator).tolist()
    sequences = []
    for label in labels:
        length = int(torch.randint(2, 9, (1,), generator=generator))
        sequences.append((torch.randint(1, 6, (length,), generator=generator) + 5 * label).tolist())
    return Examples(sequences, labels)


def batch_of(examples: Examples, num_labels: int = 2) -> dict[str, torch.Tensor]:
    rows = TokenRows(examples, examples.label_tensor(num_labels), {})
    return collate([rows[row] for row in range(len(rows))])


def points_of(model: LayeredModel, batch: dict[str, torch.Tensor]):
    return model.exit_points(batch["input_ids"], batch["attention_mask"], None)
