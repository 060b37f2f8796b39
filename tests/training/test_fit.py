"""Fitting: it learns, what is frozen does not move by a bit, and a killed run goes on as if nothing had happened."""

import shutil

import numpy as np
import pytest
import torch
from recipe_cases import SYSTEMS, batch_of, points_of, task, tiny
from safetensors.torch import load_file
from tiny import one_thread  # noqa: F401  (autouse)

import ragged_exit as rx
from ragged_exit.backbones import backbone_weights
from ragged_exit.encoder import PackedEncoder
from ragged_exit.examples import Examples
from ragged_exit.training import fit as fit_module
from ragged_exit.training.cascade import difficult_rows, fit_cascade
from ragged_exit.training.features import pooled_features
from ragged_exit.training.fit import fit

FAST = {"learning_rate": 3e-3, "batch_size": 16, "show_progress": False}


def moved(model, before) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def clone(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def accuracies(model, examples) -> list[float]:
    batch = batch_of(examples)
    with torch.no_grad():
        points = points_of(model, batch)
    return [float((point.output.logits.argmax(1) == batch["labels"]).float().mean()) for point in points]


def called_again(system: str, seed: int):
    """``tiny(system)`` as a later process has it: the same encoder, other fresh heads."""
    model = tiny(system, seed=seed)
    model.backbone.load_state_dict(tiny(system).backbone.state_dict())
    return model


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_features_are_the_padded_models(pooling):
    model = tiny("deebert", pooling=pooling)
    sequences = task(20, 3).sequences
    encoder = PackedEncoder(
        backbone_weights(model.backbone), impl="reference", dtype=torch.float32, device=torch.device("cpu")
    )
    found = pooled_features(encoder, sequences, pooling=pooling, token_budget=32)
    for row, sequence in enumerate(sequences):
        with torch.no_grad():
            hidden = model.backbone(torch.tensor([sequence]), output_hidden_states=True).hidden_states[1:]
        wanted = torch.stack([(layer[0, 0] if pooling == "cls" else layer[0].mean(0)) for layer in hidden])
        torch.testing.assert_close(found[row], wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("system", SYSTEMS)
def test_learns(system):
    model = tiny(system)
    fit(model, task(256, 1), task(64, 2), epochs=3, **FAST)
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert min(accuracies(model, task(64, 9))) > 0.9  # chance is 0.5


@pytest.mark.parametrize("system", SYSTEMS)
def test_frozen_backbone_does_not_move(system):
    model = tiny(system)
    before = clone(model)
    fit(model, task(64, 1), task(32, 2), freeze_backbone=True, epochs=1, **FAST)
    changed = moved(model, before)
    assert changed and not any(name.startswith("backbone.") for name in changed)


def test_deeberts_stages_move_their_own_parts_only(monkeypatch):
    model = tiny("deebert")
    states = []
    real = fit_module._train

    def spy(*arguments):
        before = clone(model)
        real(*arguments)
        states.append(moved(model, before))

    monkeypatch.setattr(fit_module, "_train", spy)
    fit(model, task(64, 1), task(32, 2), epochs=1, **FAST)
    final, highways = states
    assert {name.split(".")[0] for name in final} == {"backbone", "final"}
    assert {".".join(name.split(".")[:2]) for name in highways} == {"highways.0", "highways.1"}  # the last one never


def test_fastberts_students_leave_the_teacher_alone(monkeypatch):
    model = tiny("fastbert")
    states = []
    real = fit_module._train

    def spy(*arguments):
        before = clone(model)
        real(*arguments)
        states.append(moved(model, before))

    monkeypatch.setattr(fit_module, "_train", spy)
    fit(model, task(64, 1), task(32, 2), epochs=1, **FAST)
    teacher, students = states
    assert {name.split(".")[0] for name in teacher} == {"backbone", "classifiers"}
    assert not any(name.startswith(("classifiers.0", "classifiers.1")) for name in teacher)
    assert {".".join(name.split(".")[:2]) for name in students} == {"classifiers.0", "classifiers.1"}


@pytest.mark.parametrize("freeze_backbone", [False, True])
@pytest.mark.parametrize("system", SYSTEMS)
def test_resumed_is_uninterrupted(system, freeze_backbone, tmp_path, monkeypatch):
    options = {"epochs": 2, "freeze_backbone": freeze_backbone, **FAST}
    parts = task(64, 1), task(32, 2)
    whole = tiny(system)
    fit(whole, *parts, **options)

    killed = tiny(system)
    real = fit_module._CountSteps.on_epoch_begin
    kills = []

    def die_at_the_second_epoch(self, args, state, control, **rest):
        real(self, args, state, control, **rest)
        if state.epoch >= 1:
            kills.append(state.epoch)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit_module._CountSteps, "on_epoch_begin", die_at_the_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            fit(killed, *parts, work_dir=tmp_path, **options)
    assert kills == [1]
    resumed = called_again(system, seed=5)  # the run's own start counts
    fit(resumed, *parts, work_dir=tmp_path, **options)
    assert not moved(resumed, clone(whole))


def test_finished_run_is_read_back(tmp_path):
    first, second = tiny("deebert"), called_again("deebert", seed=1)
    for model in (first, second):
        fit(model, task(64, 1), task(32, 2), epochs=1, work_dir=tmp_path, **FAST)
    assert not moved(second, clone(first))


def test_another_run_in_the_folder_is_refused(tmp_path):
    fit(tiny("pabee"), task(32, 1), task(32, 2), epochs=1, work_dir=tmp_path, **FAST)
    with pytest.raises(ValueError, match="work_dir"):
        fit(tiny("pabee"), task(32, 1), task(32, 2), epochs=2, work_dir=tmp_path, **FAST)


def test_a_model_in_bf16_is_refused():
    with pytest.raises(ValueError, match=r"model: expected float32 weights, got torch.bfloat16; bf16=True autocasts"):
        fit(tiny("pabee").bfloat16(), task(32, 1), task(32, 2), freeze_backbone=True, epochs=1, **FAST)


def test_a_model_of_several_dtypes_is_refused():
    model = tiny("pabee")
    model.backbone.embeddings.bfloat16()
    with pytest.raises(ValueError, match=r"model: expected float32 weights, got torch.bfloat16, torch.float32; bf16"):
        fit(model, task(32, 1), task(32, 2), freeze_backbone=True, epochs=1, **FAST)


def test_a_run_with_another_dropout_is_refused(tmp_path):
    fit(tiny("pabee", dropout=0.1), task(32, 1), task(32, 2), epochs=1, work_dir=tmp_path, **FAST)
    with pytest.raises(ValueError, match="work_dir"):
        fit(tiny("pabee", dropout=0.5), task(32, 1), task(32, 2), epochs=1, work_dir=tmp_path, **FAST)


def test_another_encoders_run_is_refused(tmp_path):
    """One of the same shape: nothing but its weights tells it from the run's own."""
    fit(tiny("pabee"), task(32, 1), task(32, 2), epochs=1, work_dir=tmp_path, **FAST)
    with pytest.raises(ValueError, match="work_dir"):
        fit(tiny("pabee", seed=1), task(32, 1), task(32, 2), epochs=1, work_dir=tmp_path, **FAST)


def test_a_run_killed_while_it_saved_goes_on_from_the_epoch_before(tmp_path):
    parts = task(64, 1), task(32, 2)
    whole, resumed = tiny("pabee"), tiny("pabee")
    fit(whole, *parts, epochs=2, **FAST)
    fit(resumed, *parts, epochs=2, work_dir=tmp_path, **FAST)
    (tmp_path / "0-joint.safetensors").unlink()
    (checkpoint,) = (tmp_path / "0-joint").glob("checkpoint-*")
    cut_short = checkpoint.with_name("checkpoint-99")
    shutil.copytree(checkpoint, cut_short)
    (cut_short / "trainer_state.json").unlink()
    resumed = called_again("pabee", seed=5)
    fit(resumed, *parts, epochs=2, work_dir=tmp_path, **FAST)
    assert not moved(resumed, clone(whole))


def test_an_interrupted_run_leaves_no_hooks_behind(monkeypatch):
    model = tiny("elasticbert")
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "_train", lambda *arguments: [][0])
        with pytest.raises(IndexError):
            fit(model, task(32, 1), task(32, 2), epochs=1, **FAST)
    other = tiny("elasticbert")
    for each in (model, other):
        fit(each, task(32, 1), task(32, 2), epochs=1, **FAST)
    assert not moved(model, clone(other))


@pytest.mark.parametrize("system", SYSTEMS)
def test_validation_rows_teach_nothing(system):
    model, other = tiny(system), tiny(system)
    fit(model, task(64, 1), task(32, 2), epochs=2, **FAST)
    valid = task(16, 3)
    fit(other, task(64, 1), Examples(valid.sequences, [1 - label for label in valid.labels]), epochs=2, **FAST)
    if system == "deebert":  # its highways stop early, where the validation loss says so
        for each in (model, other):
            del each.highways
    assert not moved(model, clone(other))


def test_a_run_that_did_nothing_makes_way(tmp_path, monkeypatch):
    def dies(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "_train", dies)
        with pytest.raises(KeyboardInterrupt):
            fit(tiny("pabee", seed=1), task(32, 1), task(32, 2), epochs=1, work_dir=tmp_path, **FAST)
    resumed, whole = tiny("pabee"), tiny("pabee")
    fit(resumed, task(32, 1), task(32, 2), epochs=2, work_dir=tmp_path, **FAST)
    fit(whole, task(32, 1), task(32, 2), epochs=2, **FAST)
    assert not moved(resumed, clone(whole))  # from its own start, not the other run's


def test_somebody_elses_folder_is_refused(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="work_dir: the folder"):
        fit(tiny("pabee"), task(32, 1), task(32, 2), epochs=1, work_dir=tmp_path, **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_same_seed_same_weights():
    models = [tiny("deebert") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        fit(model, task(64, 1), task(32, 2), freeze_backbone=True, epochs=1, seed=seed, **FAST)
    assert not moved(models[0], clone(models[1])) and moved(models[0], clone(models[2]))


def test_regression_learns():
    parts = [Examples(part.sequences, [float(label) for label in part.labels]) for part in (task(256, 1), task(64, 2))]
    model = tiny("berxit", num_labels=1)
    fit(model, *parts, epochs=4, **FAST)
    batch = batch_of(parts[1], 1)
    with torch.no_grad():
        points = points_of(model, batch)
    for point in points:
        assert float((point.output.logits[:, 0] - batch["labels"]).square().mean()) < 0.1  # the labels' variance is .25


@pytest.mark.parametrize("system", ["berxit", "pabee"])
def test_a_regressions_fresh_heads_start_at_the_labels_mean(system):
    model = tiny(system, num_labels=1)
    heads = [exit_.head.classifier.bias for exit_ in model.layer_exits()]
    torch.nn.init.constant_(heads[0], 7.0)  # one that was trained before
    examples = task(20, 0)
    examples = Examples(examples.sequences, [3.0 + label for label in examples.labels])
    fit(model, examples, examples, epochs=1, learning_rate=0.0, show_progress=False)
    mean = sum(examples.labels) / 20
    assert [bias.item() for bias in heads] == pytest.approx([7.0, *[mean] * (len(heads) - 1)])


@pytest.mark.parametrize(
    ("labels", "num_labels"),
    [([0, 2], 2), ([0.5, 1.5], 2), ([-1, 0], 2), ([0.5, float("nan")], 1), ([0, float("inf")], 1)],
)
def test_labels_that_do_not_fit_are_refused(labels, num_labels):
    with pytest.raises(ValueError, match="labels"):
        Examples([[1], [2]], labels).label_tensor(num_labels)


def test_difficult_rows_are_those_the_other_folds_get_wrong():
    clean = task(200, 1)
    flipped = [1 - label if row < 20 else label for row, label in enumerate(clean.labels)]
    found = difficult_rows(
        tiny("full_depth"), Examples(clean.sequences, flipped), task(32, 2), folds=2, seed=3, epochs=3, **FAST
    )
    assert found[:20].float().mean() > 0.9 and found[20:].float().mean() < 0.1


@pytest.mark.parametrize("freeze_backbone", [False, True])
def test_the_rows_held_out_do_not_choose_their_judge(freeze_backbone, tmp_path):
    rows = task(60, 1)
    held_out = torch.randperm(60, generator=torch.Generator().manual_seed(3)).tolist()[0::2]  # of the first fold
    flipped = [1 - label if row in held_out else label for row, label in enumerate(rows.labels)]
    judges = []
    for labels in (rows.labels, flipped):
        folder = tmp_path / str(len(judges))
        options = {"folds": 2, "seed": 3, "epochs": 3, "freeze_backbone": freeze_backbone, **FAST}
        difficult_rows(tiny("full_depth"), Examples(rows.sequences, labels), task(32, 2), work_dir=folder, **options)
        judges.append(load_file(folder / "fold-1-of-2" / "0-final.safetensors"))
    first, second = judges
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_labels_in_an_array_are_all_told_apart(tmp_path):
    rows = task(1200, 1)
    labels = np.array(rows.labels)
    fit(tiny("pabee"), Examples(rows.sequences, labels), task(32, 2), freeze_backbone=True, work_dir=tmp_path, **FAST)
    labels = labels.copy()
    labels[400:800] = 1 - labels[400:800]
    with pytest.raises(ValueError, match="work_dir"):
        fit(
            tiny("pabee"),
            Examples(rows.sequences, labels),
            task(32, 2),
            freeze_backbone=True,
            work_dir=tmp_path,
            **FAST,
        )


def test_berxit_with_one_exit_learns():
    model = tiny("berxit", exit_layers=[3])
    fit(model, task(256, 1), task(64, 2), epochs=3, **FAST)
    assert min(accuracies(model, task(64, 9))) > 0.9


@pytest.mark.parametrize("folds", [1, 21])
def test_folds_without_rows_are_refused(folds):
    with pytest.raises(ValueError, match=r"folds: expected 2 to 20 \(the training rows\), got"):
        difficult_rows(tiny("full_depth"), task(20, 1), task(8, 2), folds=folds, seed=3, **FAST)


def test_cascade_trains_every_member(tmp_path):
    model = rx.CascadeBert.from_members([tiny("full_depth"), tiny("pabee")])
    before = clone(model)
    fit_cascade(model, task(128, 1), task(64, 2), folds=2, epochs=2, work_dir=tmp_path, **FAST)
    changed = moved(model, before)
    assert {name.split(".")[1] for name in changed} == {"0", "1"}
    assert min(min(accuracies(member, task(64, 9))) for member in model.members) > 0.9
    again = rx.CascadeBert.from_members([called_again("full_depth", seed=1), called_again("pabee", seed=2)])
    fit_cascade(again, task(128, 1), task(64, 2), folds=2, epochs=2, work_dir=tmp_path, **FAST)
    assert not moved(again, clone(model))
