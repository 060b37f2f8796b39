"""Every recipe's loss against the formula written out by hand, in float64, from the exits' logits."""

import math
from dataclasses import replace

import pytest
import torch
from recipe_cases import SYSTEMS, batch_of, points_of, task, tiny

from ragged_exit.models.base import SYSTEMS as ALL_SYSTEMS
from ragged_exit.training.phases import Batch
from ragged_exit.training.recipes import MARGIN, MARGIN_WEIGHT, RECIPES, phases_of

ROWS = 12


def cross_entropy(logits, labels) -> float:
    """Mean of -log softmax at the label."""
    total = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        total += math.log(sum(math.exp(value) for value in row)) - row[label]
    return total / len(labels)


def squared_error(logits, labels) -> float:
    return sum((row[0] - label) ** 2 for row, label in zip(logits.tolist(), labels.tolist(), strict=True)) / len(labels)


def setup(system: str, **options):
    model = tiny(system, **options)
    for parameter in model.parameters():  # logits that differ by more than rounding
        if parameter.ndim == 2 and parameter.shape[0] <= 3:
            parameter.data *= 40
    batch = batch_of(task(ROWS, 3), options.get("num_labels", 2))
    with torch.no_grad():
        points = points_of(model, batch)
    return model, points, batch["labels"]


def loss_of(model, phase: int, *arguments, **options) -> float:
    return phases_of(model)[phase].loss(model, Batch(*arguments, **options)).item()


def test_deebert_final_then_the_others():
    model, points, labels = setup("deebert")
    first, second, last = (cross_entropy(point.output.logits, labels) for point in points)
    assert loss_of(model, 0, points, labels) == pytest.approx(last, rel=1e-5)
    assert loss_of(model, 1, points, labels) == pytest.approx(first + second, rel=1e-5)


def test_deebert_leaves_the_last_highway_out_even_where_it_is_asked():
    model, points, labels = setup("deebert", exit_at_last_highway=True)
    assert len(points) == 4
    wanted = sum(cross_entropy(point.output.logits, labels) for point in points[:2])
    assert loss_of(model, 1, points, labels) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_berxit_alternates(num_labels):
    model, points, labels = setup("berxit", num_labels=num_labels)
    task_loss = squared_error if num_labels == 1 else cross_entropy
    first, second, last = (task_loss(point.output.logits, labels) for point in points)
    uncertainty = 0.0
    for point in points:
        for row, u, label in zip(point.output.logits, point.output.signal, labels, strict=True):
            wrong = math.tanh(abs(float(row[0]) - float(label))) if num_labels == 1 else float(row.argmax() != label)
            uncertainty += (float(u) - wrong) ** 2 / (len(points) * ROWS)
    assert uncertainty > 0.01
    assert loss_of(model, 0, points, labels, step=0) == pytest.approx(uncertainty + last, rel=1e-5)
    assert loss_of(model, 0, points, labels, step=3) == pytest.approx(uncertainty + first + second, rel=1e-5)
    assert loss_of(model, 0, points, labels) == pytest.approx(uncertainty + first + second + last, rel=1e-5)


def test_de3bert_adds_the_distance_to_the_own_prototype_and_moves_it():
    model, _, labels = setup("de3bert", dar_weight=0.3, prototype_rate=0.25)
    batch = batch_of(task(ROWS, 3))
    for highway in model.highways:
        torch.nn.init.normal_(highway.prototypes)
    with torch.no_grad():
        points = points_of(model, batch)
    before = [highway.prototypes.clone() for highway in model.highways]
    wanted = sum(cross_entropy(point.output.logits, labels) for point in points)
    for point, prototypes in zip(points, before, strict=False):
        for vector, label in zip(point.output.features, labels, strict=True):
            own = prototypes[label]
            wanted += 0.3 * (1 - float(vector @ own / (vector.norm() * own.norm()))) / ROWS
    assert loss_of(model, 0, points, labels) == pytest.approx(wanted, rel=1e-5)
    for highway, old in zip(model.highways, before, strict=True):
        assert torch.equal(highway.prototypes, old)  # without gradients nothing is learned
    assert loss_of(model, 0, points_of(model, batch), labels) == pytest.approx(wanted, rel=1e-5)
    for point, highway, old in zip(points, model.highways, before, strict=False):
        for label in (0, 1):
            centroid = point.output.features[labels == label].mean(0)
            torch.testing.assert_close(highway.prototypes[label], 0.75 * old[label] + 0.25 * centroid)


@pytest.mark.parametrize("system", sorted(set(SYSTEMS) - {"fastbert"}))  # its students learn without labels
def test_rows_of_class_minus_100_teach_nothing(system):
    model, other = (tiny(system, dropout=0.0) for _ in range(2))
    batch = batch_of(task(ROWS, 3))
    batch["labels"][::3] = -100
    counted = batch["labels"] != -100
    for twin, part in ((model, batch), (other, {name: value[counted] for name, value in batch.items()})):
        loss = twin.training_loss(points_of(twin, part), part["labels"])
        loss.backward()
        part["loss"] = loss.detach()
    torch.testing.assert_close(batch["loss"], part["loss"])
    wanted = dict(other.named_parameters()) | dict(other.named_buffers())
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        torch.testing.assert_close(value.grad, wanted[name].grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(value, wanted[name])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_labels_of_other_integers_are_the_same_labels(system, dtype):
    losses = []
    for kind in (torch.int64, dtype):
        model, batch = tiny(system, dropout=0.0), batch_of(task(ROWS, 3))
        losses.append(model.training_loss(points_of(model, batch), batch["labels"].to(kind)))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_pabee_weighs_by_layer(num_labels):
    model, points, labels = setup("pabee", num_labels=num_labels)
    task_loss = squared_error if num_labels == 1 else cross_entropy
    losses = [task_loss(point.output.logits, labels) for point in points]
    wanted = (losses[0] + 2 * losses[1] + 3 * losses[2]) / 6
    assert loss_of(model, 0, points, labels) == pytest.approx(wanted, rel=1e-5)


def test_elasticbert_sums():
    model, points, labels = setup("elasticbert")
    wanted = sum(cross_entropy(point.output.logits, labels) for point in points)
    assert loss_of(model, 0, points, labels) == pytest.approx(wanted, rel=1e-5)


def test_fastbert_teacher_then_divergence_from_it():
    model, points, labels = setup("fastbert")
    assert loss_of(model, 0, points, labels) == pytest.approx(cross_entropy(points[-1].output.logits, labels), rel=1e-5)
    teacher = points[-1].output.logits.double().softmax(1)
    wanted = 0.0
    for point in points[:-1]:
        student = point.output.logits.double().softmax(1)
        wanted += float((teacher * (teacher.log() - student.log())).sum()) / ROWS
    assert wanted > 1e-4
    assert loss_of(model, 1, points, labels) == pytest.approx(wanted, rel=1e-4)


def test_margin_between_easy_rows_and_a_hard_one():
    model, points, labels = setup("full_depth")
    hard = torch.zeros(ROWS, dtype=torch.bool)
    hard[4] = True  # one: every draw is this row
    confidence = points[-1].output.logits.double().softmax(1).amax(1)
    gaps = [max(0.0, float(confidence[4] - own) + MARGIN) for row, own in enumerate(confidence) if row != 4]
    plain = cross_entropy(points[-1].output.logits, labels)
    wanted = plain + MARGIN_WEIGHT * sum(gaps) / len(gaps)
    assert loss_of(model, 0, points, labels, step=0, hard=hard) == pytest.approx(wanted, rel=1e-5)
    assert loss_of(model, 0, points, labels, step=0, hard=hard & False) == pytest.approx(plain, rel=1e-5)
    assert loss_of(model, 0, points, labels, step=0) == pytest.approx(plain, rel=1e-5)
    assert loss_of(model, 0, points, labels, hard=hard) == pytest.approx(plain, rel=1e-5)  # evaluation


def test_the_hard_row_of_a_margin_is_drawn():
    """Of two, either, and not their mean."""
    model, points, labels = setup("full_depth")
    last = points[-1]
    logits, labels = last.output.logits[3:6], labels[3:6]
    points = [replace(last, output=last.output._replace(logits=logits))]
    own, *difficult = logits.double().softmax(1).amax(1).tolist()
    gaps = sorted(max(0.0, each - own + MARGIN) for each in difficult)
    assert gaps[1] - gaps[0] > 1e-3
    plain, hard = cross_entropy(logits, labels), torch.tensor([False, True, True])
    found = {round(loss_of(model, 0, points, labels, step=0, hard=hard) - plain, 5) for _ in range(40)}
    assert sorted(found) == pytest.approx([MARGIN_WEIGHT * gap for gap in gaps], abs=2e-5)


class _Scale(torch.autograd.Function):
    """The identity, whose gradient is scaled: how ElasticBERT's code has its equilibrium."""

    @staticmethod
    def forward(ctx, hidden, factor):
        ctx.factor = factor
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


@pytest.mark.parametrize("exit_layers", [(1, 2, 3), (2, 3)])
def test_gradient_equilibrium_is_the_layerwise_rescaling(exit_layers):
    batch = batch_of(task(ROWS, 3))
    model, twin = (tiny("elasticbert", exit_layers=exit_layers, dropout=0.0) for _ in range(2))
    (phase,) = phases_of(model)
    hooks = phase.hooks(model)
    phase.loss(model, Batch(points_of(model, batch), batch["labels"])).backward()
    for hook in hooks:
        hook.remove()

    count = len(exit_layers)
    hidden = twin.backbone.embeddings(batch["input_ids"])
    mask = torch.zeros(batch["attention_mask"].shape).masked_fill(batch["attention_mask"] == 0, -1e9)[:, None, None]
    loss, done = 0.0, 0
    for layer in range(1, 4):
        hidden = twin.backbone.encoder.layer[layer - 1](hidden, mask)
        if layer in exit_layers:
            hidden = _Scale.apply(hidden, 1 / (count - done))
            head = twin.layer_exits()[done].head
            loss = loss + twin.task_loss(head(hidden, batch["attention_mask"]).logits, batch["labels"])
            done += 1
            hidden = _Scale.apply(hidden, count - done)
    loss.backward()
    wanted = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, wanted[name].grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_every_system_has_a_recipe():
    ours = {name for name, system in ALL_SYSTEMS.items() if system.__module__.startswith("ragged_exit.")}
    assert ours == {*RECIPES, "cascade"}  # whose members have one each
    assert all(phases_of(tiny(system)) for system in SYSTEMS)
