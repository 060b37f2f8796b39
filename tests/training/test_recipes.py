"""A recipe as it reaches Trainer: the papers' schedules, what a step is, token types, and one replica."""

from dataclasses import replace

import pytest
import torch
from recipe_cases import SYSTEMS, task, tiny
from tiny import one_thread  # noqa: F401  (autouse)
from transformers import AlbertConfig

import ragged_exit as rx
from ragged_exit.examples import Examples
from ragged_exit.training import fit as fit_module
from ragged_exit.training.fit import fit
from ragged_exit.training.phases import HEADS_ONLY, Schedule
from ragged_exit.training.recipes import phases_of

# epochs, learning rate, batch size, warmup, weight decay: the released scripts' for BERT-base
SCHEDULES = {
    "deebert": [(3, 2e-5, 8, 0.0, 0.0), HEADS_ONLY],
    "berxit": [(3, 2e-5, 8, 0.0, 0.0)],
    "de3bert": [(5, 2e-5, 32, 0.0, 0.0)],
    "pabee": [(5, 2e-5, 32, 0.0, 0.0)],
    "elasticbert": [(5, 2e-5, 32, 0.06, 0.1)],
    "fastbert": [(3, 2e-5, 32, 0.1, 0.0), (5, 2e-4, 32, 0.1, 0.0)],
    "full_depth": [(3, 2e-5, 16, 0.0, 0.0)],
}


class Reached(Exception):
    """Trainer was about to be made."""


@pytest.mark.parametrize("system", SYSTEMS)
def test_schedules_are_the_papers(system):
    wanted = [row if isinstance(row, Schedule) else Schedule(*row) for row in SCHEDULES[system]]
    assert [phase.schedule for phase in phases_of(tiny(system))] == wanted


@pytest.mark.parametrize("bf16", [False, True])
def test_the_schedule_reaches_trainer(bf16, monkeypatch):
    made = []

    def trainer(args, **rest):
        made.append(args)
        raise Reached

    monkeypatch.setattr(fit_module, "Trainer", trainer)
    with pytest.raises(Reached):
        fit(tiny("elasticbert"), task(8, 1), task(8, 2), bf16=bf16, seed=7, show_progress=False)
    (args,) = made
    assert (args.num_train_epochs, args.learning_rate, args.train_batch_size) == (5, 2e-5, 32)
    assert (args.warmup_steps, args.weight_decay, args.bf16, args.seed) == (0.06, 0.1, bf16, 7)
    assert args.n_gpu == 1  # more would be replicas, whose counts and prototypes are lost


def test_a_step_counts_within_its_epoch(monkeypatch):
    """BERxiT alternates by it, from the same side in every epoch, also where an epoch has an odd number of steps."""
    model = tiny("berxit")
    (phase,) = phases_of(model)
    steps = []

    def loss(model, batch):
        steps.append(batch.step)
        return phase.loss(model, batch)

    monkeypatch.setattr(fit_module, "phases_of", lambda model: [replace(phase, loss=loss)])
    fit(model, task(40, 1), task(8, 2), epochs=2, batch_size=16, learning_rate=1e-4, show_progress=False)
    assert steps == [0, 1, 2, None, 0, 1, 2, None]


@pytest.mark.parametrize("freeze_backbone", [False, True])
@pytest.mark.parametrize("system", ["deebert", "elasticbert"])
def test_token_types_are_read(system, freeze_backbone):
    """Nothing else tells the classes apart."""

    def rows(number: int, seed: int) -> Examples:
        labels = task(number, seed).labels
        return Examples([[5, 6, 7]] * number, labels, [[label] * 3 for label in labels])

    model = tiny(system)
    options = {"epochs": 8, "learning_rate": 3e-3, "batch_size": 16, "show_progress": False}
    fit(model, rows(128, 1), rows(32, 2), freeze_backbone=freeze_backbone, **options)
    valid = rows(32, 3)
    answers = rx.accelerate(model, threshold=-1.0).stream(
        {"input_ids": ids, "token_type_ids": types}
        for ids, types in zip(valid.sequences, valid.token_type_ids, strict=True)
    )
    assert [int(row.logits.argmax()) for row in answers] == valid.labels


def test_elasticbert_on_a_frozen_albert_has_no_gradients_to_level():
    sizes = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 48}
    config = AlbertConfig(vocab_size=60, num_hidden_layers=3, num_attention_heads=4, **sizes)
    torch.manual_seed(0)
    model = rx.ElasticBert(config)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    options = {"epochs": 1, "learning_rate": 3e-3, "batch_size": 16, "show_progress": False}
    fit(model, task(32, 1), task(16, 2), freeze_backbone=True, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    with pytest.raises(ValueError, match="gradient equilibrium needs layers with weights of their own"):
        fit(model, task(32, 1), task(16, 2), **options)
