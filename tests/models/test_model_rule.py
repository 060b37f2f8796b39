"""A model's rule is a plain attribute: one that cannot work is said wherever the model is asked, read or saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from system_cases import config_of
from tiny import tiny_deebert

import ragged_exit as rx

IDS = torch.tensor([[5, 6, 7]])
CALLS: dict[str, Callable[[rx.EarlyExitModel, Path], Any]] = {
    "forward": lambda model, path: model(IDS),
    "save": lambda model, path: model.save_pretrained(path / "saved"),
    "accelerate": lambda model, path: rx.accelerate(model, impl="reference"),
    "accelerate with a field": lambda model, path: rx.accelerate(model, threshold=0.1, impl="reference"),
}
BAD = [
    (rx.Entropy([0.1] * 7), ValueError, "threshold: expected one number or 4 .* got 7"),
    (rx.LearnedUncertainty(0.1), ValueError, "rule: LearnedUncertainty needs heads with uncertainty; deebert has none"),
    (0.3, TypeError, "rule: expected an ExitRule, got float"),
    (rx.Entropy, TypeError, "rule: expected an ExitRule, got type"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("rule", "error", "message"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_a_rule_that_was_set_is_checked(call: str, rule: Any, error: type, message: str, tmp_path: Path) -> None:
    model = tiny_deebert()
    model.rule = rule
    with pytest.raises(error, match=message):
        CALLS[call](model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_refresh_says_so_and_keeps_the_old_snapshot() -> None:
    model = tiny_deebert()
    fast = rx.accelerate(model, impl="reference")
    before = fast.rule
    model.rule = 0.3
    with pytest.raises(TypeError, match="rule: expected an ExitRule, got float"):
        fast.refresh()
    assert fast.rule is before and fast(IDS).logits.shape == (1, 3)


def test_a_rule_that_is_given_is_checked_alike() -> None:
    model = tiny_deebert()
    for take in (
        lambda: rx.accelerate(model, rule=0.3),  # type: ignore[arg-type]
        lambda: rx.DeeBert.from_backbone(model.backbone, num_labels=3, rule=0.3),  # type: ignore[arg-type]
        lambda: rx.CascadeBert.from_members([rx.FullDepth(config_of("bert"))], 0.3),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match="rule: expected an ExitRule, got float"):
            take()


@pytest.mark.parametrize("call", CALLS)
def test_the_rules_of_a_cascades_members_are_checked(call: str, tmp_path: Path) -> None:
    members: list[Any] = [rx.ElasticBert(config_of("bert")), rx.FullDepth(config_of("bert"))]
    cascade = rx.CascadeBert.from_members(members)
    members[0].rule = rx.Entropy([0.1] * 7)
    with pytest.raises(ValueError, match=r"threshold: expected one number or 4 .* got 7"):
        CALLS[call](cascade, tmp_path)
    assert not list(tmp_path.iterdir())
