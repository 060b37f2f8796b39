"""What the original systems answered, answered again from their own weights: one batch, plain and accelerated."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import impls
from torch import Tensor

import ragged_exit as rx
from ragged_exit.models.base import ExitPoint

MARGIN = 1e-5  # |score - threshold| (patience: of what it counts) where a decision may fall either way
TOLERANCE = 3e-5  # |logit - the original's| at every exit where the original itself is within half of it of float64
BUDGET = 2  # x the original's own root mean square error to float64, everywhere
# FastBERT's random weights amplify from its fourth exit on: with every operation in float64 and only the outputs of its
# linears and norms rounded to fp32, logits move by 6e-5, and the original is 1e-4 from float64. So no fp32 path but the
# original's own bits stays within 3e-5 of it there, and the root mean square says whether ours is as good.
ORIGINALS_RMS = 1.5e-5  # the original's error to our float64: larger if it were our formulas that differ


@dataclass(frozen=True)
class Fixture:
    """A file, the class it loads as, its config.json, and the rule of one of its runs."""

    name: str
    system: type[rx.EarlyExitModel]
    rule: Callable[[dict[str, Any]], rx.ExitRule]
    config: Callable[[dict[str, Any]], dict[str, Any]] = lambda file: file["config_kwargs"] | {"model_type": "bert"}


def _berxit(run: dict[str, Any]) -> rx.ExitRule:
    return rx.LearnedUncertainty(run["lte_th"]) if run["rule"] == "lte" else rx.Entropy(run["threshold"], dialect="hf")


def _pabee(run: dict[str, Any]) -> rx.ExitRule:
    return rx.Patience(run["patience"], tolerance=float(run["regression_threshold"]))


FIXTURES = [
    Fixture("berxit_c3", rx.Berxit, _berxit),
    Fixture("cascade_c3", rx.CascadeBert, lambda run: rx.MaxProb(run["threshold"])),
    Fixture(
        "elastic-entropy_c3",
        rx.ElasticBert,
        lambda run: rx.Entropy(run["value"], dialect="hf"),
        lambda file: file["config_kwargs"] | {"model_type": "elasticbert"},
    ),
    Fixture("elastic-patience_c3", rx.ElasticBert, lambda run: rx.Patience(run["value"])),
    Fixture(
        "fastbert_c3",
        rx.FastBert,
        lambda run: rx.Entropy(run["speed"], dialect="categorical", compare="<="),
        lambda file: file["uer_args"],
    ),
    Fixture("pabee_hf_bert_c1", rx.Pabee, _pabee),
    Fixture("pabee_hf_bert_c3", rx.Pabee, _pabee),
]


@pytest.fixture(params=FIXTURES, ids=lambda fixture: fixture.name)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return request.param


@pytest.fixture
def file(fixture: Fixture, shared: Path) -> dict[str, Any]:
    path = shared / "fixtures" / f"{fixture.name}.pt"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in RAGGED_EXIT_SHARED/fixtures")
    return torch.load(path, weights_only=True)


@pytest.fixture
def model(fixture: Fixture, file: dict[str, Any], tmp_path: Path) -> rx.EarlyExitModel:
    (tmp_path / "config.json").write_text(json.dumps(fixture.config(file)))
    torch.save(file["state_dict"], tmp_path / "pytorch_model.bin")
    loaded = rx.load(tmp_path)  # strict
    assert type(loaded) is fixture.system
    return loaded


def inputs(file: dict[str, Any]) -> dict[str, Tensor]:
    return {name: file[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def exact_logits(model: rx.EarlyExitModel, file: dict[str, Any]) -> Tensor:
    """Every exit's logits in float64, ``[B, exits, C]``."""
    with torch.no_grad():
        points = copy.deepcopy(model).double().exit_points(**inputs(file))
    return torch.stack([point.output.logits for point in points], 1)


def rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def near_ties(points: list[ExitPoint], rule: rx.ExitRule) -> Tensor:
    """bool ``[B]``: rows that some exit could decide either way. A tie taints the row, whatever the layer."""
    logits = torch.stack([point.output.logits.double() for point in points], 1)  # [B, exits, C]
    if isinstance(rule, rx.Patience):
        if logits.shape[2] == 1:
            gaps = ((logits.diff(dim=1)[..., 0]).abs() - rule.tolerance).abs()
        else:
            gaps = -logits.topk(2).values.diff()[..., 0]
        return (gaps <= MARGIN).any(1)
    if isinstance(rule, rx.LearnedUncertainty):
        scores = torch.stack([point.output.signal for point in points], 1).double()
    elif isinstance(rule, rx.MaxProb):
        scores = logits.softmax(-1).amax(-1)
    else:
        scores = torch.special.entr(logits.softmax(-1)).sum(-1)
        if rule.dialect == "categorical":
            scores = scores / torch.log(torch.tensor(logits.shape[2]))
    thresholds = torch.tensor([rule.threshold_at(point.exit_index) for point in points])
    return ((scores - thresholds).abs()[:, :-1] <= MARGIN).any(1)


@pytest.mark.parametrize("impl", ["model", *impls()])
def test_every_run_of_the_original_is_answered_the_same(
    fixture: Fixture, file: dict[str, Any], model: rx.EarlyExitModel, impl: str, record_property: Any
) -> None:
    exact = exact_logits(model, file)
    with torch.no_grad():
        points = model.exit_points(**inputs(file))
    ties = rows = 0
    compared = []
    for run in file["runs"]:
        rule = fixture.rule(run)
        tie = near_ties(points, rule)
        if impl == "model":
            model.rule = rule
            with torch.no_grad():
                output = model(**inputs(file))
        else:
            output = rx.accelerate(model, rule=rule, impl=impl)(**inputs(file))
        got = output.exit_member if "paths" in run else output.exit_layer
        expected = run["paths"].argmax(1) + 1 if "paths" in run else run["exit_layer"]
        assert torch.equal(got[~tie], expected[~tie]), rule
        same = got == expected
        logits = torch.stack((output.logits, run["logits"], exact[torch.arange(len(got)), expected - 1]))
        compared.append((expected[same], logits[:, same]))
        ties, rows = ties + int(tie.sum()), rows + len(tie)
    exits = torch.cat([place for place, _ in compared])
    ours, originals, exact = torch.cat([logits for _, logits in compared], 1)  # each [rows of all runs, C]
    worst = float((ours - originals).abs().max())
    record_property("largest logit error", worst)
    print(f"{rows} rows, {ties} inside the margin, largest |logit - original| {worst:.1e}")
    assert ties <= 0.01 * rows
    for place in exits.unique():
        here = exits == place
        if (originals - exact)[here].abs().max() <= TOLERANCE / 2:
            torch.testing.assert_close(ours[here], originals[here], rtol=0, atol=TOLERANCE)
        else:
            assert fixture.name == "fastbert_c3" and place >= 4
    own_error = rms(originals - exact)
    assert own_error <= ORIGINALS_RMS
    assert rms(ours - exact) <= BUDGET * own_error


@pytest.mark.parametrize("impl", ["model", *impls()])
def test_uer_segments_may_stand_for_the_mask(shared: Path, tmp_path: Path, impl: str) -> None:
    """FastBERT's own input, 0 padding, 1 first, 2 second, with or without a mask, is the Hugging Face call."""
    path = shared / "fixtures" / "fastbert_c3.pt"
    if not path.is_file():
        pytest.skip("fastbert_c3.pt is not in RAGGED_EXIT_SHARED/fixtures")
    file = torch.load(path, weights_only=True)
    (tmp_path / "config.json").write_text(json.dumps(file["uer_args"]))
    torch.save(file["state_dict"], tmp_path / "pytorch_model.bin")
    model = rx.load(tmp_path)
    model.rule = rx.Entropy(0.2, dialect="categorical", compare="<=")
    callee = model if impl == "model" else rx.accelerate(model, impl=impl)
    with torch.no_grad():
        expected = callee(**inputs(file))
        for mask in (None, file["attention_mask"]):
            output = callee(file["input_ids"], attention_mask=mask, token_type_ids=file["seg"])
            assert torch.equal(output.logits, expected.logits)
            assert torch.equal(output.exit_layer, expected.exit_layer)
        mixed = file["seg"].clone()
        mixed[0] = torch.where(file["attention_mask"][0] > 0, mixed[0] - 1, 0)  # Hugging Face's types in one row
        output = callee(file["input_ids"], attention_mask=file["attention_mask"], token_type_ids=mixed)
        assert torch.equal(output.logits, expected.logits)
