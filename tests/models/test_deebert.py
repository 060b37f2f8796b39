"""DeeBERT: our own directories, starts from backbones, pooling, training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    bert_config,
    impls,
    one_thread,  # noqa: F401
    padded,
    random_rows,
    randomise,
    roberta_config,
    spread_threshold,
    tiny_deebert,
)
from transformers import (
    BertForSequenceClassification,
    BertModel,
    RobertaForSequenceClassification,
    RobertaModel,
)

import ragged_exit as rx
from ragged_exit.models.highway import pool


# our own directories ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (rx.Entropy(0.3, dialect="hf", compare="<="), {"pooling": "mean", "exit_at_last_highway": True}),
        (rx.Entropy([0.1, 0.2, 0.3, 0.4]), {"pooling": "cls", "exit_at_last_highway": False}),
        (rx.MaxProb([0.9, 0.8, 0.7, 0.6], temperature=2.0), {"pooling": "mean", "exit_at_last_highway": False}),
        (rx.Patience(2), {"pooling": "cls", "exit_at_last_highway": True}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_save_and_load_keep_weights_rule_and_flags(
    kind: str, rule: rx.ExitRule, options: dict[str, Any], tmp_path: Path
) -> None:
    config = roberta_config() if kind == "roberta" else bert_config()
    config.id2label = {0: "bad", 1: "so-so", 2: "good"}
    model = tiny_deebert(config, rule=rule, **options)
    model.save_pretrained(tmp_path / "new" / "model")
    section = json.loads((tmp_path / "new" / "model" / "config.json").read_text())["early_exit"]
    assert section["system"] == "deebert" and section["rule"]["name"] == type(rule).__name__
    assert {name: section[name] for name in options} == options
    for loaded in (rx.load(tmp_path / "new" / "model"), rx.DeeBert.from_pretrained(tmp_path / "new" / "model")):
        assert isinstance(loaded, rx.DeeBert) and not loaded.training
        assert loaded.rule == rule and loaded.options() == options
        assert loaded.config.id2label == config.id2label and loaded.config.model_type == kind
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and theirs[name].dtype == torch.float32 for name in ours)
        ids, mask = padded(random_rows(6), fill=1)
        with torch.no_grad():
            assert torch.equal(model(ids, mask).logits, loaded(ids, mask).logits)


def test_from_pretrained_refuses_another_system_and_lists_keys(tmp_path: Path) -> None:
    model = tiny_deebert()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["final.pooler.bias"]
    save_file(weights | {"stray": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing keys \['final.pooler.bias'\]; unexpected keys \['stray'\]"):
        rx.load(tmp_path)
    config["early_exit"]["system"] = "nonesuch"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="deebert"):
        rx.DeeBert.from_pretrained(tmp_path)


def test_constructor_errors() -> None:
    with pytest.raises(ValueError, match="pooling"):
        rx.DeeBert(bert_config(), pooling="max")
    with pytest.raises(ValueError, match=r"threshold: expected one number or 4 .* got 3"):
        rx.DeeBert(bert_config(), rx.Entropy([0.1, 0.2, 0.3]))


# from backbones -----------------------------------------------------------------------------------------------------
CLASSIFIERS = {"bert": BertForSequenceClassification, "roberta": RobertaForSequenceClassification}


def config_of(kind: str, **changes: Any) -> Any:
    return roberta_config(**changes) if kind == "roberta" else bert_config(**changes)


@pytest.mark.parametrize("impl", ["model", *impls()])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_fine_tuned_directory_keeps_its_classifier_as_the_final_head(kind: str, impl: str, tmp_path: Path) -> None:
    theirs = randomise(CLASSIFIERS[kind](config_of(kind)), seed=1)
    theirs.save_pretrained(tmp_path)
    ours = rx.DeeBert.from_backbone(str(tmp_path))
    assert ours.config.num_labels == 3 and not ours.exit_at_last_highway
    callee = ours if impl == "model" else rx.accelerate(ours, impl=impl)
    ids, mask = padded(random_rows(12, seed=3), fill=1 if kind == "roberta" else 0)
    with torch.no_grad():
        expected = theirs(ids, mask).logits
        output = callee(ids, mask)
        alone = callee(ids[:1, : int(mask[0].sum())]).logits
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, expected[:1], rtol=0, atol=1e-5)
    assert expected.std(0).min() > 0.05 and set(output.exit_layer.tolist()) == {4}
    pooler = theirs.bert.pooler.dense if kind == "bert" else theirs.classifier.dense
    for head in ours.highways:
        assert torch.equal(head.pooler.weight, pooler.weight) and torch.equal(head.pooler.bias, pooler.bias)
        assert not torch.equal(head.classifier.weight, ours.final.classifier.weight)
    assert len({head.pooler.weight.data_ptr() for head in (*ours.highways, ours.final)}) == 5  # copies, not one tensor


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_plain_encoder_directory_gets_fresh_heads(kind: str, pooling: str, tmp_path: Path) -> None:
    factory = RobertaModel if kind == "roberta" else BertModel
    theirs = randomise(factory(config_of(kind)), seed=1)
    theirs.save_pretrained(tmp_path)
    ours = rx.DeeBert.from_backbone(tmp_path, num_labels=5, pooling=pooling, rule=rx.Entropy([0.1] * 4))
    assert ours.pooling == pooling and ours.rule == rx.Entropy([0.1] * 4) and not ours.training
    ids, mask = padded(random_rows(8), fill=1 if kind == "roberta" else 0)
    ours.train()
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ours.backbone.eval()
    with torch.no_grad():
        logits = ours(ids, mask).exit_logits
        hidden = theirs(ids, mask, output_hidden_states=True).hidden_states
    assert len(logits) == 4 and logits[0].shape == (8, 5)
    pooler = theirs.pooler.dense
    for depth, head in enumerate([*ours.highways[:-1], ours.final], start=1):
        assert torch.equal(head.pooler.weight, pooler.weight)
        rows = []
        for row in range(8):
            kept = hidden[depth][row, mask[row].bool()]
            rows.append(kept[0] if pooling == "cls" else kept.mean(0))
        expected = head.classifier(torch.tanh(pooler(torch.stack(rows))))
        torch.testing.assert_close(logits[depth - 1], expected, rtol=0, atol=1e-5)


def test_from_backbone_takes_loaded_models_without_a_pooler() -> None:
    backbone = randomise(BertModel(bert_config(), add_pooling_layer=False))
    ours = rx.DeeBert.from_backbone(backbone, num_labels=2)
    assert ours.config.num_labels == 2 and ours.final.classifier.out_features == 2
    assert ours.final.pooler.weight.std() < 0.05  # fresh: initializer_range, not the backbone's gain
    pooled = BertModel(bert_config())
    ours = rx.DeeBert.from_backbone(pooled, num_labels=2)
    assert ours(torch.tensor([[5, 6]])).logits.shape == (1, 2)


def test_from_backbone_is_fp32_whatever_the_file_holds(tmp_path: Path) -> None:
    CLASSIFIERS["bert"](bert_config()).to(torch.bfloat16).save_pretrained(tmp_path)
    ours = rx.DeeBert.from_backbone(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    randomise(ours)
    ours.save_pretrained(tmp_path / "again")
    loaded = rx.load(tmp_path / "again")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in ours.state_dict().items())


def test_from_backbone_refuses_another_class_count(tmp_path: Path) -> None:
    CLASSIFIERS["bert"](bert_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"num_labels: .* 3 classes, got 2"):
        rx.DeeBert.from_backbone(tmp_path, num_labels=2)


# pooling ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_pool_sees_only_kept_tokens(dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0]])
    kept = [hidden[row, mask[row].bool()] for row in range(3)]
    assert torch.equal(pool(hidden, mask.to(dtype), "cls"), torch.stack([tokens[0] for tokens in kept]))
    torch.testing.assert_close(pool(hidden, mask.to(dtype), "mean"), torch.stack([tokens.mean(0) for tokens in kept]))


def test_the_mean_of_many_tokens_is_exact_to_the_last_bit_of_bf16() -> None:
    hidden = torch.randn(4, 301, 16).to(torch.bfloat16)
    expected = hidden.double().mean(1).to(torch.bfloat16)
    assert torch.equal(pool(hidden, torch.ones(4, 301), "mean"), expected)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("impl", ["model", *impls()])
def test_any_mask_gives_the_answer_of_the_row_alone(pooling: str, impl: str) -> None:
    """Left padding and holes: the same tokens at the same positions, alone."""
    model = tiny_deebert(pooling=pooling, rule=rx.Entropy(0.0))
    rows = random_rows(6, longest=10)
    ids, mask = padded(rows, side="left")
    mask[ids != 0] = (torch.rand(int(mask.sum()), generator=torch.Generator().manual_seed(0)) < 0.7).long()
    mask[torch.arange(6), -1] = 1  # at least one token a row
    assert (mask.sum(1) < torch.tensor([len(row) for row in rows])).any()
    threshold = spread_threshold(model, ids, mask)
    model.rule = rx.Entropy(threshold)
    callee = model if impl == "model" else rx.accelerate(model, impl=impl)
    with torch.no_grad():
        together = callee(ids, mask)
        for row in range(6):
            hidden = model.backbone(
                input_ids=ids[row, mask[row].bool()][None],
                position_ids=mask[row].nonzero().T,
                output_hidden_states=True,
            ).hidden_states[int(together.exit_layer[row])][0]
            head = model.final if together.exit_layer[row] == 4 else model.highways[int(together.exit_layer[row]) - 1]
            pooled = hidden[0] if pooling == "cls" else hidden.mean(0)
            expected = head.classifier(torch.tanh(head.pooler(pooled)))
            torch.testing.assert_close(together.logits[row], expected, rtol=0, atol=1e-5)
    assert together.exit_layer.unique().numel() > 1


# training -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flag", [True, False])
def test_train_mode_returns_every_exit_and_gradients_reach_every_head(flag: bool) -> None:
    model = tiny_deebert(exit_at_last_highway=flag).train()
    ids, mask = padded(random_rows(8))
    labels = torch.arange(8) % 3
    torch.manual_seed(0)
    output = model(ids, mask, labels=labels)
    exits = 5 if flag else 4
    assert len(output.exit_logits) == exits and output.logits is output.exit_logits[-1]
    assert output.exit_layer is None
    losses = [torch.nn.functional.cross_entropy(logits, labels) for logits in output.exit_logits]
    torch.testing.assert_close(output.loss, torch.stack(losses).sum())
    output.loss.backward()
    trained = [*model.highways[: exits - 1], model.final]
    for head in trained:
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in head.parameters())
    for layer in model.backbone.encoder.layer:
        assert layer.output.dense.weight.grad.abs().sum() > 0
    untrained = model.highways[exits - 1 :]
    assert all(parameter.grad is None for head in untrained for parameter in head.parameters())


def test_training_steps_decrease_the_loss() -> None:
    model = tiny_deebert(bert_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
    ids, mask = padded(random_rows(16))
    labels = torch.arange(16) % 3
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        loss = model(ids, mask, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_dropout_acts_in_training_only() -> None:
    model = tiny_deebert(bert_config(hidden_dropout_prob=0.5))
    ids, mask = padded(random_rows(4))
    with torch.no_grad():
        assert torch.equal(model(ids, mask).logits, model(ids, mask).logits)
        model.train()
        model.backbone.eval()  # leaves the heads' own dropout
        assert not torch.equal(model(ids, mask).logits, model(ids, mask).logits)


def test_eval_loss_is_that_of_the_answers_and_comes_first() -> None:
    model = tiny_deebert()
    ids, mask = padded(random_rows(9))
    model.rule = rx.Entropy(spread_threshold(model, ids, mask))
    labels = torch.arange(9) % 3
    with torch.no_grad():
        output = model(ids, mask, labels=labels)
    torch.testing.assert_close(output["loss"], torch.nn.functional.cross_entropy(output.logits, labels))
    assert output[0] is output.loss and output.exit_logits is None


@pytest.mark.parametrize("labels", [1, 3], ids=["regression", "classes"])
def test_patience_counts_agreement_from_exit_to_exit(labels: int) -> None:
    model = tiny_deebert(bert_config(num_labels=labels, hidden_dropout_prob=0.0), seed=3, rule=rx.Patience(1))
    ids, mask = padded(random_rows(20))
    tolerance = 1.4
    with torch.no_grad():
        model.train()
        model.backbone.eval()
        logits = torch.stack(model(ids, mask).exit_logits)  # [exits, B, C]
        model.eval()
        layers = []
        for patience in (1, 2):
            model.rule = rx.Patience(patience, tolerance=tolerance)
            output = model(ids, mask)
            layers.append(output.exit_layer.tolist())
            for row in range(20):
                counter = depth = 0
                for depth in range(1, 5):
                    now, before = logits[depth - 1, row], logits[depth - 2, row]
                    agrees = now.argmax() == before.argmax() if labels > 1 else (now - before).abs() < tolerance
                    counter = counter + 1 if depth > 1 and agrees else 0
                    if counter >= patience:
                        break
                assert int(output.exit_layer[row]) == depth
                torch.testing.assert_close(output.logits[row], logits[depth - 1, row], rtol=0, atol=1e-6)
    assert len(set(layers[0])) > 1 and layers[0] != layers[1]


def test_one_output_is_a_regression() -> None:
    model = tiny_deebert(bert_config(num_labels=1), rule=rx.Patience(2, tolerance=1.0))
    ids, mask = padded(random_rows(9))
    targets = torch.linspace(-1, 1, 9)
    with torch.no_grad():
        output = model(ids, mask, labels=targets)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - targets).square().mean())
