"""Fitting heads: they learn, the backbone does not move, and a seed gives the same weights."""

import pytest
import torch
from transformers import BertConfig

import ragged_exit as rx
from ragged_exit.backbones import backbone_weights
from ragged_exit.encoder import PackedEncoder
from ragged_exit.training.features import pooled_features
from ragged_exit.training.heads import fit_heads


def tiny(pooling: str = "mean") -> rx.DeeBert:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=2,
        hidden_dropout_prob=0.0,
    )
    return rx.DeeBert(config, pooling=pooling).eval()


def task(rows: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """The label says which five words the tokens come from."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (rows,), generator=generator).tolist()
    sequences = []
    for label in labels:
        length = int(torch.randint(2, 9, (1,), generator=generator))
        sequences.append((torch.randint(1, 6, (length,), generator=generator) + 5 * label).tolist())
    return sequences, labels


def fit(model: rx.DeeBert, *, epochs: int = 8, **options) -> dict[str, float]:
    parts = task(256, 1), task(64, 2)
    return fit_heads(model, *parts, epochs=epochs, batch_size=16, learning_rate=3e-3, show_progress=False, **options)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_features_are_the_padded_models(pooling):
    model = tiny(pooling)
    sequences, _ = task(20, 3)
    encoder = PackedEncoder(
        backbone_weights(model.backbone), impl="reference", dtype=torch.float32, device=torch.device("cpu")
    )
    found = pooled_features(encoder, sequences, pooling=pooling, token_budget=32)
    for row, sequence in enumerate(sequences):
        with torch.no_grad():
            hidden = model.backbone(torch.tensor([sequence]), output_hidden_states=True).hidden_states[1:]
        wanted = torch.stack([(layer[0, 0] if pooling == "cls" else layer[0].mean(0)) for layer in hidden])
        torch.testing.assert_close(found[row], wanted, atol=2e-5, rtol=0)


def test_heads_learn_and_the_backbone_stays():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics = fit(model, fit_final=True)
    assert min(metrics.values()) > 0.9  # chance is 0.5
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    heads = ("highways.0", "highways.1", "final")  # the last highway is not asked, so not trained
    parts = [f"{head}.{part}" for head in heads for part in ("pooler", "classifier")]
    assert moved == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    sequences, labels = task(64, 9)
    answers = rx.accelerate(model, threshold=0.3)
    found = [int(row.logits.argmax()) == label for row, label in zip(answers.stream(sequences), labels, strict=True)]
    assert sum(found) / len(found) > 0.9


def test_final_head_of_a_fine_tuned_model_stays():
    model = tiny()
    before = model.final.classifier.weight.clone()
    fit(model, epochs=1, fit_final=False)
    assert torch.equal(before, model.final.classifier.weight)


def test_same_seed_same_weights():
    first, second, third = tiny(), tiny(), tiny()
    for model, seed in ((first, 1), (second, 1), (third, 2)):
        fit(model, epochs=1, fit_final=True, seed=seed)
    weights = [model.highways[0].classifier.weight for model in (first, second, third)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
