"""The calibrate command's work: a checkpoint and a file of text in; a threshold with what it promises out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from ragged_exit.accelerate import accelerate
from ragged_exit.calibration.exit_table import exit_table
from ragged_exit.calibration.guarantee import guaranteed_threshold
from ragged_exit.calibration.threshold import threshold_for_layers
from ragged_exit.data import read_text_data
from ragged_exit.examples import read_tokenizer, token_limit, tokenise
from ragged_exit.models.loading import class_names, load, read_config
from ragged_exit.rules import ExitRule


class Calibrated(NamedTuple):
    """What ``calibrate`` chose: the rule as it was saved, and one line on what it promises or reaches."""

    rule: ExitRule
    verdict: str


def run_calibrate(
    directory: Path, data: Path, *, max_loss: float, confidence: float, speedup: float | None, max_length: int | None
) -> Calibrated:
    """Choose the threshold (or patience) of a checkpoint's rule on the texts of ``data``, and save it in config.json.

    By default the loosest with a guarantee (``guaranteed_threshold``); with ``speedup`` the one that runs 1 / speedup
    of the layers: of a cascade's, those of its last member, which alone is its full depth. Labels are used where the
    file has them. Raises ValueError where no threshold will do, for a guarantee on a regression, for string labels
    that are not among the names of the checkpoint's classes, and for a published checkpoint, whose config.json has no
    section of ours to hold a rule.
    """
    if read_config(directory).get("early_exit") is None:
        raise ValueError(f"model: {directory} is a published checkpoint; load and save_pretrained it first")
    if speedup is not None and not speedup >= 1:
        raise ValueError(f"speedup: expected at least 1, got {speedup}")
    model = load(directory)
    if speedup is None and model.config.num_labels == 1:
        raise ValueError("max_loss: a regression has no right answers to lose; calibrate it for a speed-up")
    text = read_text_data(data, require_labels=False, label_names=class_names(directory))
    fast, tokenizer = accelerate(model), read_tokenizer(directory)
    examples = tokenise(tokenizer, text, max_length=token_limit(tokenizer, max_length, fast.encoders))
    table = exit_table(fast, examples.sequences, examples.token_type_ids)
    layers = table.exits[-1].exit_layer
    if speedup is not None:
        threshold = threshold_for_layers(table, layers / speedup)
        if threshold is None:
            raise ValueError(f"speedup: even the loosest threshold runs more than 1 / {speedup:g} of the layers")
        replay = table.at(threshold)
        verdict = (
            f"{float(replay.executed_layers.double().mean()):.2f} of {layers} layers run on {len(examples):,} rows"
        )
    else:
        labels = None if examples.labels is None else examples.label_tensor(model.config.num_labels)
        found = guaranteed_threshold(table, labels, max_loss=max_loss, confidence=confidence)
        if found.threshold is None:
            raise ValueError(
                f"max_loss: {len(examples):,} rows are too few, or early answers too poor, to promise {max_loss}"
            )
        threshold = found.threshold
        spoilt = "right answers lost" if labels is not None else "answers changed"
        verdict = (
            f"with {100 * confidence:g} % confidence at most {100 * max_loss:g} % of {spoilt} "
            f"({100 * found.lost:.2f} % here); {found.mean_executed_layers:.2f} of {layers} layers run"
        )
    rule = model.rule.with_threshold(threshold)
    _save_rule(directory, rule)
    return Calibrated(rule, verdict)


def _save_rule(directory: Path, rule: ExitRule) -> None:
    path, config = directory / "config.json", read_config(directory)
    config["early_exit"]["rule"] = rule.to_dict()
    scratch = path.with_name(".config.json")
    scratch.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    scratch.replace(path)
