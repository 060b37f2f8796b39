"""Phases that stop early: the best epoch's weights are what remains, also of a run that was killed before they came."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from recipe_cases import task, tiny
from safetensors.torch import load_file
from tiny import one_thread  # noqa: F401  (autouse)
from transformers import Trainer

from ragged_exit.examples import Examples
from ragged_exit.training import fit as fit_module
from ragged_exit.training.fit import _CountSteps, fit

PHASE = "0-final"
# 13 epochs of 40, the best of them in the middle: nothing but noise is there to learn
STOPS = {"freeze_backbone": True, "learning_rate": 0.3, "batch_size": 16, "epochs": 40, "seed": 4}
ENDS = {"freeze_backbone": True, "learning_rate": 0.03, "batch_size": 8, "epochs": 3, "seed": 0}


def noise(rows: Examples, seed: int) -> Examples:
    labels = torch.randint(0, 2, (len(rows),), generator=torch.Generator().manual_seed(seed))
    return Examples(rows.sequences, labels.tolist())


def run(options: dict, work_dir: Path | str | None = None):
    model = tiny("full_depth")
    parts = noise(task(32, 1), options["seed"]), noise(task(32, 2), options["seed"] + 100)
    fit(model, *parts, work_dir=work_dir, show_progress=False, **options)
    return model.state_dict()


def killed_before_the_best_is_read(options: dict, work_dir: Path | str, monkeypatch) -> None:
    def killed(trainer: Trainer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_load_best_model", killed)
        run(options, work_dir)


def state_of(phase: Path) -> dict:
    last = max(phase.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return json.loads((last / "trainer_state.json").read_text())


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_best_epochs_weights_remain(tmp_path, monkeypatch):
    killed_before_the_best_is_read(STOPS, tmp_path, monkeypatch)
    state = state_of(tmp_path / PHASE)
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert best < state["global_step"] and state["epoch"] < STOPS["epochs"]
    weights = load_file(tmp_path / PHASE / f"checkpoint-{best}" / "model.safetensors")
    run(STOPS, tmp_path / "whole")
    assert_same(load_file(tmp_path / "whole" / f"{PHASE}.safetensors"), weights)


def test_a_run_that_had_stopped_does_not_train_on(tmp_path, monkeypatch):
    killed_before_the_best_is_read(STOPS, tmp_path, monkeypatch)
    stopped = state_of(tmp_path / PHASE)
    assert_same(run(STOPS, tmp_path), run(STOPS))
    assert state_of(tmp_path / PHASE)["global_step"] == stopped["global_step"]


def test_a_run_that_goes_on_knows_how_long_nothing_was_better(tmp_path, monkeypatch):
    killed_before_the_best_is_read(STOPS, tmp_path / "whole", monkeypatch)
    stopped = state_of(tmp_path / "whole" / PHASE)
    real = _CountSteps.on_epoch_begin

    def killed(self, args, state, control, **rest):
        real(self, args, state, control, **rest)
        if state.epoch >= stopped["epoch"] - 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_CountSteps, "on_epoch_begin", killed)
        run(STOPS, tmp_path / "killed")
    killed_before_the_best_is_read(STOPS, tmp_path / "killed", monkeypatch)
    assert state_of(tmp_path / "killed" / PHASE)["global_step"] == stopped["global_step"]


@pytest.mark.parametrize("options", [STOPS, ENDS], ids=["stopped", "ended"])
@pytest.mark.parametrize("how", ["moved", "relative"])
def test_the_best_weights_are_found_under_another_path(how, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    killed_before_the_best_is_read(options, "run", monkeypatch)
    state = state_of(tmp_path / "run" / PHASE)
    assert state["best_global_step"] < state["global_step"]  # the last epoch's weights are others
    work_dir = tmp_path / "run"
    if how == "moved":
        work_dir = Path(shutil.move(work_dir, tmp_path / "moved"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_same(run(options, work_dir), run(options))


def test_a_state_that_was_cut_short_is_no_checkpoint(tmp_path, monkeypatch):
    killed_before_the_best_is_read(ENDS, tmp_path, monkeypatch)
    phase = tmp_path / PHASE
    cut_short = phase / "checkpoint-99"
    shutil.copytree(max(phase.glob("checkpoint-*")), cut_short)
    (cut_short / "trainer_state.json").write_text('{"best_global_step": 4, "best_')
    assert_same(run(ENDS, tmp_path), run(ENDS))


def test_a_run_whose_losses_were_never_numbers_ends_with_its_last_weights(tmp_path, monkeypatch):
    options = STOPS | {"learning_rate": 1e38}
    real = fit_module.save_file

    def killed(tensors: dict, path: Path) -> None:
        if path.name == f"{PHASE}.safetensors":
            raise KeyboardInterrupt
        real(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit_module, "save_file", killed)
        run(options, tmp_path)
    assert state_of(tmp_path / PHASE)["best_global_step"] is None
    resumed, whole = run(options, tmp_path), run(options)
    assert_same(*({name: value.nan_to_num() for name, value in each.items()} for each in (resumed, whole)))
