"""DeeBERT: published checkpoints load and answer as the originals did."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import (
    LONGEST,
    bert_config,
    impls,
    one_thread,  # noqa: F401
    padded,
    random_rows,
    roberta_config,
    spread_threshold,
    tiny_deebert,
)
from torch import Tensor
from transformers import (
    BertForSequenceClassification,
)

import ragged_exit as rx

FIXTURES = {"deebert_hf": "hf", "deebert_castorini_c2": "castorini"}
FILES = ("pytorch_model.bin", "model.safetensors")
TOLERANCE = 2e-5  # |logit - original's|: the originals differ from each other by 1.2e-5
# the hf formula is off by up to 4e-6 whatever the entropy; castorini's error shrinks with the entropy, and its fixture
# has thresholds below 1e-4, where 1e-5 would excuse too many rows
MARGINS = {"hf": 1e-5, "castorini": 1e-6}


@pytest.fixture(params=FIXTURES)
def published(request: pytest.FixtureRequest, shared: Path) -> dict[str, Any]:
    """What an original model answered, its weights and the dialect of its entropy."""
    file = shared / "fixtures" / f"{request.param}.pt"
    if not file.is_file():
        pytest.skip(f"{file.name} is not in RAGGED_EXIT_SHARED/fixtures")
    return torch.load(file, weights_only=True) | {"dialect": FIXTURES[request.param]}


def write(directory: Path, state: dict[str, Tensor], config: dict[str, Any], file: str = FILES[1]) -> Path:
    """A published checkpoint directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if file == FILES[0]:
        torch.save(state, directory / file)
    else:
        save_file({name: value.contiguous() for name, value in state.items()}, directory / file)
    return directory


def write_published(directory: Path, published: dict[str, Any], file: str = FILES[1]) -> Path:
    return write(directory, published["state_dict"], published["config_kwargs"] | {"model_type": "bert"}, file)


@pytest.fixture
def original(published: dict[str, Any], tmp_path: Path) -> rx.DeeBert:
    model = rx.load(write_published(tmp_path, published), dialect=published["dialect"])
    assert isinstance(model, rx.DeeBert)
    return model


def with_threshold(model: rx.DeeBert, threshold: float | list[float]) -> rx.DeeBert:
    model.rule = replace(model.rule, threshold=threshold)
    return model


def inside_margin(published: dict[str, Any], run: dict[str, Any]) -> Tensor:
    """bool ``[B]``: rows whose entropy, at some exit that they were asked at, is a tie with the threshold."""
    entropy = published["full"]["highway_entropy"]
    ties = (entropy - torch.as_tensor(run["threshold"])).abs() <= MARGINS[published["dialect"]]  # [B, L]
    asked = torch.arange(1, entropy.shape[1] + 1) <= run["exit_layer"][:, None]
    return (ties & asked).any(1)


class Tally:
    """Compares runs and counts the rows inside the margin, which may differ."""

    def __init__(self, published: dict[str, Any]) -> None:
        self.published, self.rows, self.inside = published, 0, 0

    def compare(self, run: dict[str, Any], exit_layer: Tensor, logits: Tensor, kind: str = "") -> None:
        tie = inside_margin(self.published, run)
        self.rows, self.inside = self.rows + len(tie), self.inside + int(tie.sum())
        assert torch.equal(exit_layer[~tie], run[f"exit_layer{kind}"][~tie]), run["threshold"]
        torch.testing.assert_close(logits[~tie], run[f"logits{kind}"][~tie], rtol=0, atol=TOLERANCE)

    def report(self, record_property: Any) -> None:
        record_property("rows compared", self.rows)
        record_property("rows inside the margin", self.inside)
        print(f"{self.inside} of {self.rows} rows inside the margin")
        assert self.inside <= 0.01 * self.rows


def padded_inputs(published: dict[str, Any]) -> dict[str, Tensor]:
    return {name: published[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def unpadded_rows(published: dict[str, Any]) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": ids[:length].tolist(), "token_type_ids": types[:length].tolist()}
        for ids, types, length in zip(
            published["input_ids"], published["token_type_ids"], published["lengths"].tolist(), strict=True
        )
    ]


# the originals' answers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", FILES)
def test_published_weights_load_strictly_from_either_file(published: dict[str, Any], file: str, tmp_path: Path) -> None:
    model = rx.load(write_published(tmp_path, published, file), dialect=published["dialect"])
    assert isinstance(model, rx.DeeBert) and not model.training
    assert model.exit_at_last_highway and model.pooling == "cls"
    assert model.rule == rx.Entropy(-1.0, dialect=published["dialect"])
    state = published["state_dict"]
    assert sum(value.numel() for value in model.state_dict().values()) == sum(v.numel() for v in state.values())
    for theirs, ours in (
        ("bert.encoder.highway.4.pooler.dense.weight", model.highways[4].pooler.weight),
        ("bert.encoder.highway.5.classifier.bias", model.highways[5].classifier.bias),
        ("bert.pooler.dense.bias", model.final.pooler.bias),
        ("classifier.weight", model.final.classifier.weight),
        ("bert.encoder.layer.3.output.LayerNorm.weight", model.backbone.encoder.layer[3].output.LayerNorm.weight),
        ("bert.embeddings.position_embeddings.weight", model.backbone.embeddings.position_embeddings.weight),
    ):
        assert torch.equal(state[theirs], ours), theirs


def test_the_model_answers_every_run_as_the_original(
    published: dict[str, Any], original: rx.DeeBert, record_property: Any
) -> None:
    tally = Tally(published)
    with torch.no_grad():
        for run in published["runs"]:
            output = with_threshold(original, run["threshold"])(**padded_inputs(published))
            tally.compare(run, output.exit_layer, output.logits)
    tally.report(record_property)


def test_the_model_answers_every_unpadded_run_as_the_original(
    published: dict[str, Any], original: rx.DeeBert, record_property: Any
) -> None:
    tally, lengths = Tally(published), published["lengths"]
    with torch.no_grad():
        for run in published["runs"]:
            model = with_threshold(original, run["threshold"])
            layers, logits = torch.empty_like(run["exit_layer"]), torch.empty_like(run["logits"])
            for length in lengths.unique().tolist():  # rows of one length need neither padding nor mask
                rows = lengths == length
                types = published["token_type_ids"][rows, :length]
                output = model(published["input_ids"][rows, :length], token_type_ids=types)
                layers[rows], logits[rows] = output.exit_layer, output.logits
            tally.compare(run, layers, logits, "_unpadded")
    tally.report(record_property)


@pytest.mark.parametrize("impl", impls())
def test_the_accelerated_model_answers_every_run_as_the_original(
    published: dict[str, Any], original: rx.DeeBert, impl: str, record_property: Any
) -> None:
    tally = Tally(published)
    assert len(published["lengths"]) == 48 and published["lengths"].unique().numel() > 10
    for run in published["runs"]:
        fast = rx.accelerate(original, threshold=run["threshold"], impl=impl)
        output = fast(**padded_inputs(published))  # 48 rows at once
        tally.compare(run, output.exit_layer, output.logits)
        results = list(fast.stream(unpadded_rows(published), token_budget=200))
        layers = torch.tensor([result.exit_layer for result in results])
        tally.compare(run, layers, torch.stack([result.logits for result in results]), "_unpadded")
    tally.report(record_property)


@pytest.mark.parametrize("impl", ["model", *impls()])
def test_the_last_highway_answers_as_in_the_original_only_with_the_flag(
    published: dict[str, Any], original: rx.DeeBert, impl: str
) -> None:
    """Rows that the original let its untrained last highway answer: with the flag they do so here, else the final
    classifier answers them; all other rows are the same with and without."""
    full = published["full"]
    answered_there = 0
    for run in published["runs"]:
        via = run["last_layer_via_highway"] & ~inside_margin(published, run)
        answered_there += int(via.sum())
        outputs = []
        for flag in (True, False):
            original.exit_at_last_highway = flag
            model = with_threshold(original, run["threshold"])
            callee = model if impl == "model" else rx.accelerate(model, impl=impl)
            with torch.no_grad():
                outputs.append(callee(**padded_inputs(published)))
        bug_compatible, paper = outputs
        close = {"rtol": 0, "atol": TOLERANCE}
        torch.testing.assert_close(bug_compatible.logits[via], full["highway_logits"][via, -1], **close)
        torch.testing.assert_close(paper.logits[via], full["final_logits"][via], **close)
        assert torch.equal(bug_compatible.exit_layer, paper.exit_layer)  # both report L
        outside = ~run["last_layer_via_highway"] & ~inside_margin(published, run)
        torch.testing.assert_close(bug_compatible.logits[outside], paper.logits[outside], **close)
    if published["dialect"] == "hf":
        assert answered_there > 30  # the fixture does show it


# layouts ------------------------------------------------------------------------------------------------------------
def to_published(model: rx.DeeBert, prefix: str) -> dict[str, Tensor]:
    """Our names -> the original's."""
    renamed = {}
    for name, value in model.state_dict().items():
        if name.startswith("backbone."):
            name = f"{prefix}.{name.removeprefix('backbone.')}"
        elif name.startswith("highways."):
            name = f"{prefix}.encoder.highway.{name.removeprefix('highways.')}".replace("pooler.", "pooler.dense.")
        elif name.startswith("final.pooler."):
            name = name.replace("final.pooler", f"{prefix}.pooler.dense")
        else:
            name = name.removeprefix("final.")
        renamed[name] = value.clone()
    return renamed


def config_dict(model: rx.DeeBert) -> dict[str, Any]:
    return {name: value for name, value in model.config.to_dict().items() if name != "architectures"}


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("file", FILES)
def test_bert_and_roberta_layouts(kind: str, file: str, tmp_path: Path) -> None:
    source = tiny_deebert(roberta_config() if kind == "roberta" else bert_config(), exit_at_last_highway=True)
    state = to_published(source, kind)
    assert f"{kind}.encoder.highway.3.pooler.dense.weight" in state and f"{kind}.pooler.dense.bias" in state
    loaded = rx.load(write(tmp_path, state, config_dict(source), file))
    ids, mask = padded(random_rows(10), fill=1 if kind == "roberta" else 0)
    threshold = spread_threshold(source, ids, mask)
    source.rule = rx.Entropy(threshold, dialect="hf")
    with torch.no_grad():
        expected, got = source(ids, mask), with_threshold(loaded, threshold)(ids, mask)
    assert torch.equal(expected.logits, got.logits) and torch.equal(expected.exit_layer, got.exit_layer)
    assert expected.exit_layer.unique().numel() > 1
    fast = rx.accelerate(loaded, impl="reference")(ids, mask)
    assert torch.equal(fast.exit_layer, expected.exit_layer)
    torch.testing.assert_close(fast.logits, expected.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"model_type": "bert", "pad_token_id": 0},
        {"model_type": "albert"},
        {"model_type": "roberta", "pad_token_id": 0},  # as old versions wrote it, which counted positions from 1
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_keys_tell_the_architecture(kind: str, wrong: dict[str, Any], tmp_path: Path) -> None:
    """Castorini's config.json is older than model_type; RoBERTa's weights in a BERT would answer, and wrong."""
    source = tiny_deebert(roberta_config() if kind == "roberta" else bert_config())
    config = {name: value for name, value in config_dict(source).items() if name not in ("model_type", "pad_token_id")}
    loaded = rx.load(write(tmp_path, to_published(source, kind), config | wrong))
    ids, mask = padded(random_rows(6), fill=1 if kind == "roberta" else 0)
    with torch.no_grad():
        expected = source(ids, mask).logits
        torch.testing.assert_close(loaded(ids, mask).logits, expected, rtol=0, atol=TOLERANCE)
    loaded.save_pretrained(tmp_path / "again")
    assert rx.load(tmp_path / "again").config.model_type == kind


def test_an_architecture_whose_keys_start_alike_stays(tmp_path: Path) -> None:
    source = tiny_deebert(roberta_config())
    config = config_dict(source) | {"model_type": "xlm-roberta", "pad_token_id": 0}
    loaded = rx.load(write(tmp_path, to_published(source, "roberta"), config))
    assert loaded.config.model_type == "xlm-roberta" and loaded.config.pad_token_id == 0


def test_old_names_are_understood_and_position_ids_ignored(tmp_path: Path) -> None:
    source = tiny_deebert()
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in to_published(source, "bert").items()
    }
    assert sum(name.endswith((".gamma", ".beta")) for name in state) == 2 * (1 + 2 * 4)
    state["bert.embeddings.position_ids"] = torch.arange(LONGEST)[None]
    loaded = rx.load(write(tmp_path, state, config_dict(source)))
    for name, value in source.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_every_missing_unexpected_and_misshapen_key_is_listed(tmp_path: Path) -> None:
    source = tiny_deebert()
    state = to_published(source, "bert")
    del state["bert.encoder.layer.2.output.dense.weight"], state["bert.encoder.highway.1.classifier.bias"]
    state["bert.encoder.layer.9.output.dense.weight"] = torch.zeros(2, 2)
    state["lte.weight"] = torch.zeros(1)
    state["bert.pooler.dense.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as caught:
        rx.load(write(tmp_path, state, config_dict(source)))
    missing, unexpected, shapes = str(caught.value).split(";")
    assert "missing" in missing and "unexpected" in unexpected
    assert "backbone.encoder.layer.2.output.dense.weight" in missing and "highways.1.classifier.bias" in missing
    assert "backbone.encoder.layer.9.output.dense.weight" in unexpected and "lte.weight" in unexpected
    assert "final.pooler.bias: expected [32], got [5]" in shapes


def test_a_checkpoint_without_final_classifier_says_so(tmp_path: Path) -> None:
    source = tiny_deebert()
    state = to_published(source, "bert")
    del state["classifier.weight"], state["classifier.bias"]
    with pytest.raises(ValueError, match=r"classifier\.weight"):
        rx.load(write(tmp_path, state, config_dict(source)))


def test_head_count_other_than_layers_is_an_error(tmp_path: Path) -> None:
    source = tiny_deebert()
    config = config_dict(source) | {"num_hidden_layers": 3}
    with pytest.raises(ValueError, match=r"unexpected keys .*highways\.3\."):
        rx.load(write(tmp_path, to_published(source, "bert"), config))


def test_labels_come_from_the_weights_and_names_from_the_config(tmp_path: Path) -> None:
    source = tiny_deebert()
    bare = {name: value for name, value in config_dict(source).items() if name not in ("id2label", "label2id")}
    assert rx.load(write(tmp_path / "bare", to_published(source, "bert"), bare)).config.num_labels == 3
    named = bare | {"id2label": {"0": "bad", "1": "so-so", "2": "good"}}
    loaded = rx.load(write(tmp_path / "named", to_published(source, "bert"), named))
    assert loaded.config.id2label == {0: "bad", 1: "so-so", 2: "good"}


def test_load_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        rx.load(tmp_path)
    source = tiny_deebert()
    (tmp_path / "config.json").write_text(json.dumps(config_dict(source)))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors or pytorch_model\.bin"):
        rx.load(tmp_path)
    BertForSequenceClassification(bert_config()).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="no published layout"):
        rx.load(tmp_path / "plain")
    write(tmp_path / "other", {"a": torch.zeros(1)}, {"early_exit": {"system": "nonesuch"}})
    with pytest.raises(ValueError, match=r"early_exit\.system: .*'deebert'.*'nonesuch'"):
        rx.load(tmp_path / "other")
    state, config = to_published(source, "bert"), config_dict(source)
    with pytest.raises(ValueError, match="dialect"):
        rx.load(write(tmp_path / "dialect", state, config), dialect="nats")
    source.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"dialect: expected None for .*ours, whose config.json holds its rule"):
        rx.load(tmp_path / "ours", dialect="castorini")


class Trap:
    """Runs code when unpickled without care."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    source, proof = tiny_deebert(), tmp_path / "proof"
    state = to_published(source, "bert") | {"trap": Trap(str(proof))}
    directory = write(tmp_path / "model", state, config_dict(source), FILES[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds more than tensors"):
        rx.load(directory)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_load_keeps_fp32_weights_whatever_the_config_or_torch_says(name: str, tmp_path: Path) -> None:
    source = tiny_deebert()
    directory = write(tmp_path, to_published(source, "bert"), config_dict(source) | {name: "bfloat16"})
    torch.set_default_dtype(torch.float64)
    try:
        loaded = rx.load(directory)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in source.state_dict().items())
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
