"""Published key layouts of every system: recognised by their keys, loaded strictly, and mistakes listed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from system_cases import config_of, randomised
from torch import Tensor

import ragged_exit as rx
from ragged_exit.models.published import LAYOUTS, detect_layout

Pairs = tuple[tuple[str, str], ...]  # our names -> the published ones

HIGHWAYS: Pairs = (
    (r"backbone\.(.*)", r"bert.\1"),
    (r"highways\.(\d+)\.pooler\.(.*)", r"bert.encoder.highway.\1.pooler.dense.\2"),
    (r"highways\.(\d+)\.classifier\.(.*)", r"bert.encoder.highway.\1.classifier.\2"),
    (r"final\.pooler\.(.*)", r"bert.pooler.dense.\1"),
    (r"final\.classifier\.(.*)", r"classifier.\1"),
)
DISTILBERT: Pairs = (
    (r"backbone\.(.*)", r"distilbert.\1"),
    (r"lte\.(.*)", r"distilbert.transformer.lte_classifier.\1"),
    (r"highways\.(\d+)\.pooler\.(.*)", r"distilbert.transformer.highway.\1.pre_classifier.\2"),
    (r"highways\.(\d+)\.classifier\.(.*)", r"distilbert.transformer.highway.\1.classifier.\2"),
    (r"final\.pooler\.(.*)", r"pre_classifier.\1"),
    (r"final\.classifier\.(.*)", r"classifier.\1"),
)
PABEE: Pairs = ((r"backbone\.(.*)", r"bert.\1"), (r"pooler\.(.*)", r"bert.pooler.dense.\1"))
ALBERT: Pairs = ((r"backbone\.(.*)", r"albert.\1"), (r"pooler\.(.*)", r"albert.pooler.\1"))
FASTBERT: Pairs = ((r"backbone\.(.*)", r"\1"),)
ELASTIC: Pairs = (
    (r"backbone\.(.*)", r"elasticbert.\1"),
    (r"highways\.(\d+)\.pooler\.(.*)", r"elasticbert.encoder.pooler.\1.dense.\2"),
    (r"highways\.(\d+)\.classifier\.(.*)", r"classifiers.\1.\2"),
)
CASCADE: Pairs = (
    (r"members\.(\d+)\.backbone\.(.*)", r"cascade_models.\1.\2"),
    (r"members\.(\d+)\.final\.pooler\.(.*)", r"cascade_models.\1.pooler.dense.\2"),
    (r"members\.(\d+)\.final\.classifier\.(.*)", r"cascade_classifiers.\1.\2"),
)


def published(model: rx.EarlyExitModel, pairs: Pairs, prefix: str = "") -> dict[str, Tensor]:
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in pairs:
            if re.fullmatch(ours, name):
                name = re.sub(ours, theirs, name)
                break
        state[prefix + name] = value.clone()
    return state


def _cascade() -> rx.CascadeBert:
    small = config_of("bert", hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24)
    return rx.CascadeBert.from_members([rx.FullDepth(small), rx.FullDepth(config_of("bert"))])


def _berxit_state(model: rx.EarlyExitModel) -> dict[str, Tensor]:
    state = published(model, ((r"lte\.(.*)", r"bert.encoder.lte_classifier.\1"), *HIGHWAYS))
    return state | {f"core.{name[5:]}": value for name, value in state.items() if name.startswith("bert.")}


def _berxit_distilbert_state(model: rx.EarlyExitModel) -> dict[str, Tensor]:
    """With the three names of its transformer: distilbert.transformer, distilbert.encoder, core."""
    state = published(model, DISTILBERT)
    inside = {name.removeprefix("distilbert."): value for name, value in state.items() if "distilbert." in name}
    aliases = {name.replace("transformer.", "encoder."): value for name, value in inside.items()}
    return state | {f"{prefix}.{name}": value for prefix in ("core", "distilbert") for name, value in aliases.items()}


def _berxit_albert_state(model: rx.EarlyExitModel) -> dict[str, Tensor]:
    state = published(model, HIGHWAYS)
    state = {re.sub(r"^bert\.", "albert.", name).replace("albert.pooler.dense", "albert.pooler"): value
             for name, value in state.items()}  # fmt: skip
    return state | {f"core.{name[7:]}": value for name, value in state.items() if name.startswith("albert.")}


def _cosee_state(model: rx.EarlyExitModel) -> dict[str, Tensor]:
    last = ((r"classifiers\.3\.(.*)", r"classifier.\1"), (r"(classifiers)\.(.*)", r"bert.encoder.highway.\2"))
    state = published(model, (*last, *PABEE))
    return {re.sub(r"(highway\.\d+)\.", r"\1.classifier.", name): value for name, value in state.items()}


LAYOUT_CASES: list[tuple[str, Callable[[], rx.EarlyExitModel], Callable[..., dict[str, Tensor]]]] = [
    ("deebert", lambda: rx.DeeBert(config_of("bert")), lambda model: published(model, HIGHWAYS)),
    ("berxit", lambda: rx.Berxit(config_of("bert")), _berxit_state),
    ("berxit", lambda: rx.Berxit(config_of("distilbert")), _berxit_distilbert_state),
    ("berxit", lambda: rx.DeeBert(config_of("albert")), _berxit_albert_state),
    ("pabee", lambda: rx.Pabee(config_of("bert")), lambda model: published(model, PABEE)),
    ("pabee", lambda: rx.Pabee(config_of("albert")), lambda model: published(model, ALBERT)),
    ("cosee", lambda: rx.Pabee(config_of("bert")), _cosee_state),
    ("elasticbert", lambda: rx.ElasticBert(config_of("bert")), lambda model: published(model, ELASTIC)),
    ("cascade", _cascade, lambda model: published(model, CASCADE)),
    ("fastbert", lambda: rx.FastBert(config_of("uer")), lambda model: published(model, FASTBERT)),
    ("fastbert", lambda: rx.FastBert(config_of("uer")), lambda model: published(model, FASTBERT, "kernel.")),
]
case = pytest.mark.parametrize(("system", "make", "rename"), LAYOUT_CASES, ids=lambda value: str(value)[:12])


def write(directory: Path, state: dict[str, Tensor], config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    torch.save(state, directory / "pytorch_model.bin")
    return directory


def config_of_model(model: rx.EarlyExitModel) -> dict[str, Any]:
    return {name: value for name, value in model.config.to_dict().items() if name != "architectures"}


@case
def test_recognised_by_the_keys_alone_and_loaded_strictly(system, make, rename, tmp_path: Path) -> None:
    model = randomised(make())
    state = rename(model)
    assert detect_layout(state).system == system
    assert sum(layout.fits(state) for layout in LAYOUTS) == 1
    loaded = rx.load(write(tmp_path, state, config_of_model(model)))
    assert type(loaded) is type(model) and not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    old = {name: value for name, value in config_of_model(model).items() if name != "model_type"}
    assert rx.load(write(tmp_path / "old", state, old)).config.model_type == model.config.model_type
    if system == "fastbert":
        assert loaded.rule.compare == ("<" if next(iter(state)).startswith("kernel.") else "<=")


@case
def test_missing_and_unexpected_keys_are_listed(system, make, rename, tmp_path: Path) -> None:
    state = rename(make())
    norm = next(name for name in state if not name.startswith("core.") and re.search("[nN]orm.*weight", name))
    gone = next(name for name in state if name.endswith("classifiers.1.bias")) if system == "pabee" else norm
    del state[gone]
    state["stray.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as caught:
        rx.load(write(tmp_path, state, config_of_model(make())))
    missing, unexpected, _ = str(caught.value).split(";")
    tail = ".".join(gone.split(".")[-2:])
    assert tail in missing and "stray.weight" in unexpected


def test_berxit_on_distilbert_has_relu_heads_and_an_uncertainty_of_the_raw_cls_state(tmp_path: Path) -> None:
    """By the original's formulas, from its keys; its ALBERT never asks the last highway."""
    state = _berxit_distilbert_state(randomised(rx.Berxit(config_of("distilbert"))))
    model = rx.load(write(tmp_path, state, config_of("distilbert").to_dict() | {"model_type": None}))
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        points = model.exit_points(ids, torch.ones_like(ids), None)
        hidden = model.backbone(ids, output_hidden_states=True).hidden_states
    names = [f"distilbert.transformer.highway.{index}." for index in range(3)] + [""]
    for name, states, point in zip(names, hidden[1:], points, strict=True):
        pooled = F.relu(F.linear(states[:, 0], *_affine(state, f"{name}pre_classifier")))
        torch.testing.assert_close(point.output.logits, F.linear(pooled, *_affine(state, f"{name}classifier")))
        doubt = F.linear(states[:, 0], *_affine(state, "distilbert.transformer.lte_classifier"))
        torch.testing.assert_close(point.output.signal, doubt[:, 0].sigmoid())
    albert = rx.load(write(tmp_path / "albert", _berxit_albert_state(rx.DeeBert(config_of("albert"))),
                           config_of("albert").to_dict()))  # fmt: skip
    assert not albert.exit_at_last_highway and albert.rule == rx.Entropy(-1.0, dialect="hf")


def _affine(state: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return state[f"{name}.weight"], state[f"{name}.bias"]


@pytest.mark.parametrize(("system", "make", "rename"), LAYOUT_CASES[:8])
def test_a_checkpoint_without_its_classifier_lists_every_missing_key(system, make, rename, tmp_path: Path) -> None:
    """A size that is read from a key must not hide the others that are gone."""
    model = make()
    drop = r"(^classifier|^classifiers\.0|highway\.0\.classifier)\.weight$|(pooler.*|pre_classifier)\.bias$"
    state = rename(model)
    kept = {name: value for name, value in state.items() if not re.search(drop, name)}
    gone = [name for name in state.keys() - kept.keys() if not re.match(r"core\.|distilbert\.encoder\.", name)]
    assert len(gone) > 1
    config = config_of_model(model) | {"num_labels": model.config.num_labels}
    with pytest.raises(ValueError) as caught:
        rx.load(write(tmp_path, kept, config))
    missing, unexpected, _ = str(caught.value).split(";")
    assert missing.count("'") == 2 * len(gone), missing
    assert "[]" in unexpected


def test_elasticbert_with_heads_on_the_last_layers(tmp_path: Path) -> None:
    """Poolers keep the layers' numbers, classifiers count from 0."""
    model = randomised(rx.ElasticBert(config_of("bert"), exit_layers=[3, 4]))
    state = {re.sub(r"pooler\.([01])\.", lambda match: f"pooler.{int(match[1]) + 2}.", name): value
             for name, value in published(model, ELASTIC).items()}  # fmt: skip
    assert "elasticbert.encoder.pooler.3.dense.bias" in state and "classifiers.1.bias" in state
    loaded = rx.load(write(tmp_path, state, config_of_model(model) | {"model_type": "elasticbert"}))
    assert loaded.exit_layers == (3, 4)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_cascade_layer_counts_come_from_the_keys(tmp_path: Path) -> None:
    model = randomised(_cascade())
    loaded = rx.load(write(tmp_path, published(model, CASCADE), config_of_model(model)))
    assert [member.config.num_hidden_layers for member in loaded.members] == [2, 4]
    assert [member.config.num_attention_heads for member in loaded.members] == [2, 4]


@pytest.mark.parametrize(
    ("key", "system"), [("bert.pred_layer.weight", "GPFEE"), ("bert.Policy_network.0.layer1.weight", "ConsistentEE")]
)
def test_systems_that_are_known_but_not_here_are_named(key: str, system: str, tmp_path: Path) -> None:
    state = published(rx.Pabee(config_of("bert")), PABEE) | {key: torch.zeros(1)}
    with pytest.raises(ValueError, match=system):
        rx.load(write(tmp_path, state, {"model_type": "bert"}))
