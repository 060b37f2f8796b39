"""The quality study's models: each system trained on each task once, then read from its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, set_seed

from ragged_exit.bench.quality.tasks import Task
from ragged_exit.claims import write_json
from ragged_exit.embedded import encoder_dir
from ragged_exit.examples import read_tokenizer, tokenise
from ragged_exit.models.base import EarlyExitModel
from ragged_exit.models.cascade import CascadeBert
from ragged_exit.models.full_depth import FullDepth, truncated
from ragged_exit.models.layered import LayeredModel
from ragged_exit.models.loading import load
from ragged_exit.training.cascade import difficult_rows
from ragged_exit.training.fit import fit
from ragged_exit.training.job import new_model

ENCODER = "bge-small"
SMALL_MEMBER = "minilm-l3"  # a whole encoder of 3 layers: the cascade's first member
FOLDS = 4
TRUNCATIONS = (3, 4, 6, 8)
FULL = "bert-12l"
SYSTEMS = ("deebert", "berxit", "de3bert", "pabee", "elasticbert", "fastbert")  # and the cascade
REGRESSION_SYSTEMS = ("berxit", "pabee")


@dataclass(frozen=True)
class Budget:
    """How much training a model gets; the same for every system of a task. rows: the first so many after a shuffle."""

    rows: int | None
    epochs: int
    learning_rate: float
    batch_size: int
    max_length: int = 128


BUDGETS = {
    "sst2": Budget(30_000, 1, 1e-4, 64),
    "mrpc": Budget(None, 3, 1e-4, 32),
    "rte": Budget(None, 4, 1e-4, 32),
    "stsb": Budget(None, 3, 1e-4, 32),
}


class Study:
    """One task: its examples as token ids, and its models, trained when first asked for.

    work_dir: models are kept there, one folder each, and unfinished training goes on from there. pooling: what pooled
    heads see, "cls" as published or "mean".
    """

    def __init__(
        self,
        task: Task,
        budget: Budget,
        work_dir: Path,
        *,
        pooling: str = "cls",
        seed: int = 42,
        bf16: bool = True,
        say: Callable[[str], Any],
    ) -> None:
        self.task, self.budget, self.seed, self.bf16, self.say = task, budget, seed, bf16, say
        self.pooling = pooling
        self.folder = work_dir / f"{task.name}-{pooling}"
        self.source = str(encoder_dir(ENCODER, say=say))
        tokenizer = read_tokenizer(self.source)
        train = task.train
        if budget.rows is not None and budget.rows < len(train):
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
            train = train.select(order[: budget.rows].tolist())
        self.train, self.valid, self.dev = (
            tokenise(tokenizer, part, max_length=budget.max_length) for part in (train, task.valid, task.dev)
        )

    @property
    def num_layers(self) -> int:
        """Of the full encoder, which speed-ups refer to."""
        return AutoConfig.from_pretrained(self.source).num_hidden_layers

    def systems(self) -> list[str]:
        """What can run this task: all systems, or those that know regression."""
        if self.task.num_labels == 1:
            return list(REGRESSION_SYSTEMS)
        return [*SYSTEMS, "cascade"]

    def baselines(self) -> list[str]:
        """The truncated encoders BERT-kL, shallow to deep, and the full one."""
        return [*(f"bert-{layers}l" for layers in TRUNCATIONS), FULL]

    def model(self, name: str) -> EarlyExitModel:
        """A system or baseline of this task, trained."""
        if name == "cascade":
            return CascadeBert.from_members([self._trained(SMALL_MEMBER), self._trained(FULL)])
        return self._trained(name)

    def _trained(self, name: str) -> LayeredModel:
        folder = self.folder / name
        told = folder / "study.json"
        settings = self._options() | {"rows": [len(self.train), len(self.valid)]}
        if (folder / "model.safetensors").is_file():
            if not told.is_file() or json.loads(told.read_text()) != settings:
                raise ValueError(
                    f"work_dir: {folder} was trained with other settings; delete it or give another folder"
                )
        else:
            self.say(f"{self.task.name}: training {name}")
            set_seed(self.seed)
            model = self._fresh(name)
            options = self._options()
            hard = None
            if name == SMALL_MEMBER:
                hard = difficult_rows(model, self.train, self.valid, folds=FOLDS, work_dir=folder, **options)
            fit(model, self.train, self.valid, hard=hard, work_dir=folder / "run", **options)
            write_json(told, settings)
            model.save_pretrained(folder)
            for run in folder.iterdir():
                if run.is_dir():
                    shutil.rmtree(run)
        trained = load(folder)
        assert isinstance(trained, LayeredModel)
        return trained

    def _fresh(self, name: str) -> LayeredModel:
        labels = self.task.num_labels
        if name == SMALL_MEMBER:
            return FullDepth.from_backbone(
                encoder_dir(SMALL_MEMBER, say=self.say), num_labels=labels, pooling=self.pooling
            )
        if name in SYSTEMS:
            return new_model(name, self.source, labels, self.pooling)
        layers = int(name.removeprefix("bert-").removesuffix("l"))
        return truncated(self.source, layers, num_labels=labels, pooling=self.pooling)

    def _options(self) -> dict[str, Any]:
        return {
            "epochs": self.budget.epochs,
            "learning_rate": self.budget.learning_rate,
            "batch_size": self.budget.batch_size,
            "seed": self.seed,
            "bf16": self.bf16,
            "show_progress": False,
        }
