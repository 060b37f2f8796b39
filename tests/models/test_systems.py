"""What every system shares: saving, losses and gradients, and rules that cannot work; cascades of some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from system_cases import CASES, Case, batch_of, config_of, randomised
from tiny import random_rows, tiny_deebert
from transformers import BertModel

import ragged_exit as rx
from ragged_exit.models.de3bert import PrototypeHighway
from ragged_exit.models.highway import cosine_distances

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@all_cases
def test_save_and_load_keep_everything(case: Case, tmp_path: Path) -> None:
    kind = case.backbones[-1]
    model = case.build(kind, seed=3, exit_layers=[1, 3, 4])
    model.save_pretrained(tmp_path)
    loaded = rx.load(tmp_path)
    assert type(loaded) is type(model) and loaded.rule == model.rule and loaded.options() == model.options()
    ids, mask = batch_of(random_rows(5), kind)
    with torch.no_grad():
        assert torch.equal(loaded(ids, mask).logits, model(ids, mask).logits)


@pytest.mark.parametrize("cls", [rx.EarlyExitModel, rx.LayeredModel])
def test_a_base_class_reads_any_system(cls: Any, tmp_path: Path) -> None:
    rx.Pabee(config_of("bert")).save_pretrained(tmp_path)
    assert type(cls.from_pretrained(tmp_path)) is rx.Pabee
    BertModel(config_of("bert")).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r'expected a config\.json with early_exit\.system = "\.\.\."'):
        cls.from_pretrained(tmp_path / "plain")


def test_our_own_section_beside_a_pytorch_file_is_read_too(tmp_path: Path) -> None:
    model = randomised(rx.De3Bert(config_of("bert")))
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    for loaded in (rx.load(tmp_path), rx.De3Bert.from_pretrained(tmp_path)):
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        rx.load(tmp_path)


def test_a_model_of_two_dtypes_says_which(tmp_path: Path) -> None:
    model = tiny_deebert()
    model.backbone.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"one dtype, or .* got \['torch\.bfloat16', 'torch\.float32'\]"):
        rx.accelerate(model)
    assert rx.accelerate(model, dtype=torch.float32, impl="reference").dtype == torch.float32


@all_cases
def test_a_model_of_two_dtypes_runs_in_the_one_that_is_asked_for(case: Case) -> None:
    model = case.build(case.backbones[0], seed=3)
    for name, parameter in model.named_parameters():
        if "classifier" in name:
            parameter.data = parameter.data.bfloat16()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16, torch.float32}
    ids, mask = batch_of(random_rows(5), case.backbones[0])
    answers = rx.accelerate(model, dtype=torch.float32, impl="reference")(ids, mask)
    expected = rx.accelerate(model.float(), impl="reference")(ids, mask)
    assert torch.equal(answers.logits, expected.logits)


@pytest.mark.parametrize("layers", [np.array([1, 4]), torch.tensor([1, 4]), [np.int64(1), 4]], ids=repr)
def test_exit_layers_of_arrays_and_tensors_are_plain_numbers(layers: Any, tmp_path: Path) -> None:
    model = rx.Pabee(config_of("bert"), exit_layers=layers)
    model.save_pretrained(tmp_path)
    assert rx.load(tmp_path).exit_layers == model.exit_layers == (1, 4)
    for wrong in ([1.0, 4.0], 4, ["1", "4"]):
        with pytest.raises(TypeError, match="exit_layers: expected a sequence of whole numbers, got"):
            rx.Pabee(config_of("bert"), exit_layers=wrong)  # type: ignore[arg-type]


@all_cases
def test_training_reaches_every_parameter_that_answers(case: Case) -> None:
    model = case.build(case.backbones[0], seed=3).train()
    ids, mask = batch_of(random_rows(6, longest=8), case.backbones[0])
    labels = torch.linspace(-1, 1, 6) if case.labels == 1 else torch.arange(6) % case.labels
    before = {name: value.clone() for name, value in model.named_buffers()}
    output = model(ids, mask, labels=labels)
    output.loss.backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    unused = r"highways.3." if case.name.startswith(("berxit", "deebert_mean")) else "never"  # the last highway
    assert all(name.startswith(unused) for name in silent), silent
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert len(output.exit_logits) == len(model.exit_points(ids, mask, None))
    moved = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.endswith(".prototypes")}


def test_prototypes_move_towards_the_centroid_of_their_class() -> None:
    highway = PrototypeHighway(config_of("bert"))
    features, labels = torch.randn(5, 32), torch.tensor([0, 2, 0, 2, 2])
    highway.move(features, labels, 0.25)
    first = highway.prototypes.clone()
    torch.testing.assert_close(first[0], 0.25 * (features[0] + features[2]) / 2)
    assert not first[1].any()
    highway.move(features, labels, 0.25)
    torch.testing.assert_close(highway.prototypes[2], 0.75 * first[2] + 0.25 * features[[1, 3, 4]].mean(0))


def test_distances_to_a_zero_prototype_are_one_and_have_gradients() -> None:
    vectors = torch.randn(3, 8, requires_grad=True)
    distances = cosine_distances(vectors, torch.stack((torch.zeros(8), torch.ones(8))))
    assert distances[:, 0].tolist() == [1.0] * 3
    distances.sum().backward()
    assert vectors.grad is not None and vectors.grad.isfinite().all()


@pytest.mark.parametrize("callee", ["model", "reference"])
def test_the_last_exit_of_de3bert_is_at_distance_one_of_everything(callee: str) -> None:
    """It has no prototypes, so DR = 1/2, and with lam = 1 its score is E / (E + 1/2)."""
    model = randomised(rx.De3Bert(config_of("bert"), rx.DistanceEntropy(-1.0)))
    ids, mask = batch_of(random_rows(6), "bert")
    with torch.no_grad():
        assert torch.equal(model.exit_points(ids, mask, None)[-1].output.signal, torch.ones(6, 3))
        output = model(ids, mask) if callee == "model" else rx.accelerate(model, impl=callee)(ids, mask)
    spread = torch.special.entr(output.logits.softmax(1)).sum(1) / torch.tensor(3.0).log()
    torch.testing.assert_close(output.score, spread / (spread + 0.5), rtol=0, atol=1e-5)


def test_losses_are_the_papers() -> None:
    ids, mask = batch_of(random_rows(6), "bert")
    labels = torch.arange(6) % 3
    pabee = randomised(rx.Pabee(config_of("bert"), exit_layers=[1, 4]))
    points = pabee.exit_points(ids, mask, None)
    one, four = (F.cross_entropy(point.output.logits, labels) for point in points)
    torch.testing.assert_close(pabee.training_loss(points, labels), (one + 4 * four) / 5)
    berxit = randomised(rx.Berxit(config_of("bert")))
    points = berxit.exit_points(ids, mask, None)
    wrong = torch.stack([(point.output.logits.argmax(1) != labels).float() for point in points])
    guesses = torch.stack([point.output.signal for point in points])
    torch.testing.assert_close(berxit.uncertainty_loss(points, labels), (guesses - wrong).square().mean())
    fastbert = randomised(rx.FastBert(config_of("bert")))
    *students, teacher = (point.output.logits for point in fastbert.exit_points(ids, mask, None))
    divergence = sum(
        (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1).mean() for student in students
    )
    expected = F.cross_entropy(teacher, labels) + divergence
    torch.testing.assert_close(fastbert.training_loss(fastbert.exit_points(ids, mask, None), labels), expected)


def test_targets_are_not_taught() -> None:
    """Students follow the teacher, and u follows what the answers got wrong; neither moves what it follows."""
    ids, mask = batch_of(random_rows(6), "bert")
    fastbert = randomised(rx.FastBert(config_of("bert")))
    fastbert.distillation_loss(fastbert.exit_points(ids, mask, None)).backward()
    assert all(parameter.grad is None for parameter in fastbert.classifiers[-1].parameters())
    assert all(parameter.grad is not None for parameter in fastbert.classifiers[0].parameters())
    berxit = randomised(rx.Berxit(config_of("bert", num_labels=1), rx.LearnedUncertainty(0.1)))
    berxit.uncertainty_loss(berxit.exit_points(ids, mask, None), torch.linspace(-1, 1, 6)).backward()
    heads = [*berxit.highways[:-1], berxit.final]
    assert all(parameter.grad is None for head in heads for parameter in head.classifier.parameters())
    assert all(head.pooler.weight.grad.abs().sum() > 0 for head in heads)  # through u it does reach the poolers
    assert berxit.lte.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("system", [rx.Pabee, rx.Berxit])
def test_regression_labels_in_a_column_are_the_same_labels(system: Any) -> None:
    model = randomised(system(config_of("bert", num_labels=1))).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids, mask = batch_of(random_rows(5), "bert")
    labels = torch.linspace(-1, 1, 5)
    torch.testing.assert_close(model(ids, mask, labels=labels[:, None]).loss, model(ids, mask, labels=labels).loss)


@pytest.mark.parametrize("callee", ["model", "reference"])
def test_a_rule_given_to_a_cascade_and_its_member_is_two_rules(callee: str) -> None:
    """A threshold for the cascade's members must not reach the exits inside one of them."""
    rule = rx.MaxProb(2.0)
    inner = randomised(rx.ElasticBert(config_of("bert"), rule))
    cascade = rx.CascadeBert.from_members([inner, randomised(rx.FullDepth(config_of("bert")))], rule)
    ids, mask = batch_of(random_rows(4), "bert")
    if callee == "model":
        cascade.rule = rx.MaxProb(0.0)
    else:
        cascade = rx.accelerate(cascade, threshold=0.0, impl=callee)
    with torch.no_grad():
        output = cascade(ids, mask)
    assert output.exit_member.tolist() == [1] * 4 and output.exit_layer.tolist() == [4] * 4


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert"])
def test_a_cascades_members_count_positions_alike(kind: str) -> None:
    members = [randomised(rx.FullDepth(config_of(kind))), randomised(rx.FullDepth(config_of("roberta")))]
    cascade = rx.CascadeBert.from_members(members)
    ids, mask = batch_of(random_rows(4), kind)
    for threshold in (0.0, 1.0):
        cascade.rule = rx.MaxProb(threshold)
        with torch.no_grad():
            expected = cascade(ids, mask).logits
        fast = rx.accelerate(cascade, impl="reference")(ids, mask).logits
        torch.testing.assert_close(fast, expected, rtol=0, atol=2e-5)
    bert = rx.FullDepth(config_of("bert", pad_token_id=1, max_position_embeddings=26))
    for mixed in ([bert, members[0]], [members[0], bert]):
        with pytest.raises(ValueError, match="all or none to count positions as RoBERTa does"):
            rx.CascadeBert.from_members(mixed)


def test_a_cascade_checks_every_members_tables_at_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row may reach the second member here, and its smaller tables are named all the same."""
    first = rx.FullDepth(config_of("bert"))
    second = rx.FullDepth(config_of("bert", type_vocab_size=1))
    fast = rx.accelerate(rx.CascadeBert.from_members([first, second]), threshold=0.0, impl="reference")
    ids = torch.tensor([[5, 6]])
    types = torch.tensor([[0, 1]])
    message = r"token_type_ids: expected values in \[0, 1\), got 0 ... 1"
    with pytest.raises(ValueError, match=message):
        fast(ids, token_type_ids=types)
    (result,) = fast.stream([{"input_ids": [5, 6], "token_type_ids": [0, 1]}])
    assert result.error is not None and result.error.startswith("ValueError: token_type_ids: expected values in [0, 1)")
    with pytest.raises(ValueError, match=message):
        fast.pack_sequences([[5, 6]], [[0, 1]])
    assert fast(ids).exit_member.tolist() == [1]
    monkeypatch.setattr(fast.encoders[1], "word_embeddings", fast.encoders[1].word_embeddings[:6])
    with pytest.raises(ValueError, match=r"input_ids: expected values in \[0, 6\), got 5 ... 6"):
        fast(ids)
    monkeypatch.setattr(fast.encoders[1], "position_embeddings", fast.encoders[1].position_embeddings[:2])
    monkeypatch.setattr(fast.encoders[1], "max_positions", 2)
    with pytest.raises(ValueError, match=r"sequence length: expected at most 2 positions"):
        fast(torch.tensor([[5, 5, 5]]))


@pytest.mark.parametrize("first", [rx.FastBert, rx.FullDepth])  # by itself the latter takes token types alone
def test_a_cascade_reads_uers_segments_as_its_members_do(first: Any) -> None:
    """Segments for a second sentence and padding are the types and mask that they stand for, in every member."""
    cascade = randomised(
        rx.CascadeBert.from_members([first(config_of("uer")), rx.FastBert(config_of("uer"))], rx.MaxProb(0.6))
    )
    ids = torch.arange(5, 17).view(2, 6)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2], [1, 1, 2, 0, 0, 0]])
    mask, types = (segments > 0).long(), (segments == 2).long()
    for threshold in (0.0, 1.0):
        cascade.rule = rx.MaxProb(threshold)
        fast = rx.accelerate(cascade, impl="reference")
        with torch.no_grad():
            expected = cascade(ids, mask, types).logits
            for callee in (cascade, fast):
                torch.testing.assert_close(callee(ids, token_type_ids=segments).logits, expected, rtol=0, atol=2e-5)
        rows = [{"input_ids": ids[0].tolist(), "token_type_ids": segments[0].tolist()}]
        rows += [{"input_ids": ids[1, :3].tolist(), "token_type_ids": [1, 1, 2]}]
        for result, logits in zip(fast.stream(rows), expected, strict=True):
            torch.testing.assert_close(result.logits, logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rx.DeeBert(config_of("bert", num_labels=1)), "Entropy needs at least 2 classes"),
        (lambda: rx.De3Bert(config_of("bert", num_labels=1)), "DistanceEntropy needs at least 2 classes"),
        (lambda: rx.ElasticBert(config_of("bert", num_labels=1), rx.MaxProb(0.9)), "MaxProb needs at least 2 classes"),
        (lambda: rx.Pabee(config_of("bert", num_labels=1), rx.ConfidentPatience(2, 0.1)), "ConfidentPatience needs"),
        (lambda: rx.Pabee(config_of("bert"), rx.LearnedUncertainty(0.1)), "uncertainty; pabee has none"),
        (lambda: rx.DeeBert(config_of("bert"), rx.DistanceEntropy(0.1)), "prototypes; deebert has none"),
        (
            lambda: rx.accelerate(rx.Berxit(config_of("bert", num_labels=1)), rule=rx.Entropy(0.1)),
            "Entropy needs at least 2 classes",
        ),
        (lambda: rx.CascadeBert.from_members([]), "at least one single model"),
        (lambda: rx.CascadeBert.from_members([_plain()], rx.Patience(1)), "Patience has nothing to build on"),
        (lambda: rx.CascadeBert.from_members([_plain(), _plain(num_labels=2)]), "one num_labels, got 3 .* and 2"),
        (lambda: rx.CascadeBert.from_members([_plain(), _plain(vocab_size=50)]), "one vocab_size"),
        (lambda: rx.CascadeBert.from_members([_plain(), _plain(max_position_embeddings=8)]), "24 positions, got 8"),
        (lambda: rx.FullDepth(config_of("bert"), activation="sine"), "activation"),
        (lambda: rx.Pabee(config_of("bert", problem_type="multi_label_classification")), "problem_type: expected one"),
    ],
)
def test_what_cannot_work_is_said_at_once(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def _plain(**changes: Any) -> rx.FullDepth:
    return rx.FullDepth(config_of("bert", **changes))


@pytest.mark.parametrize(("mask", "message"), [([1, 2], "expected only 0 and 1"), ([0, 0], "row 1 has no tokens")])
@pytest.mark.parametrize("train", [False, True])
def test_a_mask_that_the_accelerated_model_refuses_is_refused(train: bool, mask: list[int], message: str) -> None:
    model = tiny_deebert().train(train)
    with pytest.raises(ValueError, match=f"attention_mask: {message}"):
        model(torch.tensor([[5, 6], [5, 6]]), torch.tensor([[1, 1], mask]))
