"""The snapshot that accelerate takes: what it refuses to read, what refresh reads again, whom it belongs to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate_cases import (
    assert_same_answers,
    exiting,
    fast_model,
    inputs,
    reference,
)
from system_cases import batch_of, config_of, randomised
from tiny import (
    VOCAB,
    bert_config,
    impls,
    one_thread,  # noqa: F401
    random_rows,
    randomise,
    tiny_deebert,
)
from torch import nn
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

import ragged_exit as rx


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class DoubledNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class DoubledEmbedding(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(ids)


LAYER = "backbone.encoder.layer.1."
WRAPPED = {
    "query": ("deebert", LAYER + "attention.self.query", Doubled(32, 32)),
    "feed forward": ("deebert", LAYER + "output.dense", Doubled(64, 32)),
    "norm": ("deebert", LAYER + "output.LayerNorm", DoubledNorm(32)),
    "embedding": ("deebert", "backbone.embeddings.word_embeddings", DoubledEmbedding(VOCAB, 32)),
    "pooler": ("deebert", "highways.1.pooler", Doubled(32, 32)),
    "classifier": ("deebert", "highways.1.classifier", Doubled(32, 3)),
    "prototype": ("de3bert", "highways.1.proto", Doubled(32, 32)),
    "uncertainty": ("berxit", "lte", Doubled(32, 1)),
    "electra's head": ("electra", "final.classifier", Doubled(32, 3)),
    "branch": ("fastbert", "classifiers.1.output_layer_1", Doubled(128, 128)),
}


def wrappable(system: str) -> rx.EarlyExitModel:
    if system == "electra":
        return randomise(rx.DeeBert(config_of("electra")))
    factories = {"deebert": rx.DeeBert, "de3bert": rx.De3Bert, "berxit": rx.Berxit, "fastbert": rx.FastBert}
    return randomise(factories[system](bert_config()))


@pytest.mark.parametrize("place", WRAPPED)
def test_a_module_that_does_more_with_its_weight_is_refused(place: str) -> None:
    """As a LoRA's linear, which answers with its base's weight."""
    system, name, module = WRAPPED[place]
    model = wrappable(system)
    fast, ids = rx.accelerate(model, impl="reference"), torch.arange(5, 17).view(3, 4)
    expected = fast(ids)
    model.set_submodule(name, module)
    with pytest.raises(ValueError, match=rf"model: expected plain .* got a .*\.{type(module).__name__}; merge"):
        rx.accelerate(model, impl="reference")
    with pytest.raises(ValueError, match="model: expected plain"):
        fast.refresh()
    assert_same_answers(fast(ids), expected)


CHANGES = {
    "eps": (
        LAYER + "output.LayerNorm",
        lambda: nn.LayerNorm(32, eps=0.1),
        r"LayerNorms of one eps, got \[1e-12, 0\.1\]",
    ),
    "norm without bias": (LAYER + "output.LayerNorm", lambda: nn.LayerNorm(32, bias=False), "with weight and bias"),
    "activation": (LAYER + "intermediate.intermediate_act_fn", nn.ReLU, r"activation 'gelu' .* got ReLU\(\)"),
    "max_norm": (
        "backbone.embeddings.word_embeddings",
        lambda: nn.Embedding(VOCAB, 32, max_norm=0.5),
        r"without max_norm, got 0\.5",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_the_kernels_would_compute_otherwise_is_refused(change: str) -> None:
    name, module, message = CHANGES[change]
    model = tiny_deebert()
    model.set_submodule(name, module())
    with pytest.raises(ValueError, match=f"model: expected .*{message}"):
        rx.accelerate(model, impl="reference")


@pytest.mark.parametrize("name", ["encoder.layer.1", "encoder.layer.1.output.dense"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_would_not_run_is_refused(kind: str, name: str) -> None:
    model, batch = exiting(tiny_deebert()), inputs()
    handle = getattr(model.backbone.get_submodule(name), kind)(lambda *_: None)
    with pytest.raises(ValueError, match="model: expected modules without forward hooks"):
        rx.accelerate(model, impl="reference")
    handle.remove()
    prune.l1_unstructured(model.backbone.get_submodule("encoder.layer.1.output.dense"), "weight", 0.5)
    expected = reference(model, **batch)  # leaves transformers' own hooks, and the pruned weight
    assert_same_answers(rx.accelerate(model, impl="reference")(**batch), expected)


@pytest.mark.parametrize(
    "name", ["backbone.encoder.layer.1", "backbone.encoder.layer.1.output.dense", "final.classifier", "final.pooler"]
)
def test_a_forward_that_would_not_run_is_refused(name: str) -> None:
    """As the accelerate library's add_hook_to_module sets one."""
    model, batch = exiting(tiny_deebert()), inputs()
    expected = reference(model, **batch)
    module = model.get_submodule(name)
    own = module.forward
    module.forward = lambda *args, **named: own(*args, **named)
    with pytest.raises(
        ValueError, match=f"model: expected modules .* got a {type(module).__name__} with one of its own"
    ):
        rx.accelerate(model, impl="reference")
    del module.forward
    assert_same_answers(rx.accelerate(model, impl="reference")(**batch), expected)


@pytest.mark.parametrize("name", ["backbone", "backbone.encoder.layer.1", "highways.0"])
def test_compiled_modules_are_taken(name: str) -> None:
    """torch.compile puts a forward into a wrapper around the module; the whole model's may be anybody's."""
    model, batch = exiting(tiny_deebert()), inputs()
    expected = reference(model, **batch)
    model.set_submodule(name, torch.compile(model.get_submodule(name)))
    model.forward = model.forward  # as transformers' Trainer does for mixed precision
    assert_same_answers(rx.accelerate(model, impl="reference")(**batch), expected)


def test_a_forward_of_the_kernels_library_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It replaces activations on the modules; classes that it may do this to carry a name for it."""
    model, batch = exiting(tiny_deebert()), inputs()
    expected = reference(model, **batch)
    activation = model.backbone.encoder.layer[1].intermediate.intermediate_act_fn
    monkeypatch.setattr(type(activation), "kernel_layer_name", "GeLU", raising=False)
    activation.forward = activation.forward
    assert_same_answers(rx.accelerate(model, impl="reference")(**batch), expected)


PRUNED = {  # linears of the backbone and of every kind of head
    "qkv": ("deebert", LAYER + "attention.self.query"),
    "feed forward": ("deebert", LAYER + "output.dense"),
    "pooler": ("deebert", "final.pooler"),
    "classifier": ("deebert", "final.classifier"),
    "prototype": ("de3bert", "highways.0.proto"),
    "uncertainty": ("berxit", "lte"),
    "electra's head": ("electra", "final.classifier"),
    "branch": ("fastbert", "classifiers.3.output_layer_1"),
}


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("place", PRUNED)
def test_a_pruned_module_is_read_as_a_call_would_set_it(place: str, name: str) -> None:
    """Its weight is an attribute that only a call sets: a loaded state and an optimizer's step leave it as it was."""
    system, path = PRUNED[place]
    model, ids = randomised(wrappable(system)), torch.arange(5, 17).view(3, 4)
    if place == "prototype":
        model.rule = replace(model.rule, threshold=10.0)  # all leave where distances are scored
    module = model.get_submodule(path)
    prune.random_unstructured(module, name, 0.4)
    state = {key: 3 * value if key == f"{path}.{name}_orig" else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    fast = rx.accelerate(model, impl="reference")
    assert_same_answers(fast(ids), reference(model, input_ids=ids))

    original = getattr(module, f"{name}_orig")
    original.grad = torch.ones_like(original)
    torch.optim.SGD([original], lr=0.5).step()
    fast.refresh()
    assert_same_answers(fast(ids), reference(model, input_ids=ids))


def test_a_head_starts_from_what_a_pruned_one_computes() -> None:
    model, source = tiny_deebert(), nn.Linear(32, 3)
    prune.l1_unstructured(source, "weight", 0.5)
    source.load_state_dict({name: 3 * value for name, value in source.state_dict().items()})
    model.start_from(None, source)
    x = torch.ones(1, 32)
    torch.testing.assert_close(model.final.classifier(x), source(x), rtol=0, atol=0)


def test_reading_a_spectral_norm_in_training_leaves_its_vectors_alone() -> None:
    model = tiny_deebert()
    module = nn.utils.spectral_norm(model.backbone.encoder.layer[1].output.dense)
    model.train()
    before = module.weight_u.clone()
    rx.accelerate(model, impl="reference")
    assert torch.equal(module.weight_u, before) and module.training


@pytest.mark.parametrize("kind", ["albert", "bert", "distilbert", "electra", "roberta", "xlm-roberta"])
def test_a_config_that_changed_later_changes_nothing(kind: str) -> None:
    """The modules hold what they were made with, and the padded model goes by them."""
    model = randomised(rx.DeeBert(config_of(kind)))
    ids, mask = batch_of(random_rows(6), kind)
    model.config.layer_norm_eps, model.config.pad_token_id = 0.1, 3
    assert_same_answers(
        rx.accelerate(model, impl="reference")(ids, mask), reference(model, input_ids=ids, attention_mask=mask)
    )


@pytest.mark.parametrize("name", ["backbone.encoder.layer.0.intermediate.dense.weight", "backbone.pooler_buffer"])
def test_a_weight_without_memory_of_its_own_is_refused(name: str) -> None:
    """As FSDP's and quantised ones: the kernels would read where nothing is."""
    model = tiny_deebert()
    value = TwoTensor(torch.ones(64, 32), torch.ones(64, 32))
    owner, _, last = name.rpartition(".")
    if "buffer" in name:
        model.get_submodule(owner).register_buffer(last, value)
    else:
        setattr(model.get_submodule(owner), last, nn.Parameter(value))
    with pytest.raises(ValueError, match=rf"model: expected plain tensors, and {name} is a TwoTensor"):
        rx.accelerate(model)


def test_other_classes_that_compute_the_same_are_taken() -> None:
    class Named(nn.Linear):
        pass

    model, batch = exiting(tiny_deebert()), inputs()
    attention = model.backbone.encoder.layer[1].attention.self
    attention.key = Named(32, 32)
    nn.utils.parametrizations.weight_norm(attention.query)
    assert type(attention.query) is not nn.Linear
    randomise(model)
    assert_same_answers(rx.accelerate(model, impl="reference")(**batch), reference(model, **batch))


# the snapshot -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("impl", impls())
def test_the_snapshot_is_independent_until_refreshed(impl: str) -> None:
    model, batch = exiting(tiny_deebert()), inputs()
    fast = rx.accelerate(model, impl=impl)
    before = fast(**batch)
    randomise(model, seed=9)  # in place, as an optimiser would
    assert_same_answers(fast(**batch), before)
    expected = reference(model, **batch)
    assert not torch.allclose(before.logits, expected.logits, atol=1e-2)
    fast.refresh()
    assert_same_answers(fast(**batch), expected)


@pytest.mark.parametrize("settings", [{"threshold": -1.0}, {"rule": rx.Entropy(-1.0)}], ids=["field", "rule"])
def test_refresh_keeps_the_rule_that_was_asked_for(settings: dict[str, Any]) -> None:
    model, batch = exiting(tiny_deebert()), inputs()
    fast = rx.accelerate(model, **settings, impl="reference")
    model.rule = rx.Entropy(10.0)  # everybody out at once
    fast.refresh()
    assert fast(**batch).exit_layer.tolist() == [4] * 12


def test_refresh_reads_the_models_rule_again() -> None:
    model, batch = tiny_deebert(rule=rx.Entropy(-1.0)), inputs()
    fast = rx.accelerate(model, impl="reference")
    model.rule = rx.Entropy(10.0)
    assert fast(**batch).exit_layer.tolist() == [4] * 12 and fast.rule == rx.Entropy(-1.0)
    fast.refresh()
    assert fast(**batch).exit_layer.tolist() == [1] * 12 and fast.rule == rx.Entropy(10.0)


def test_refresh_sets_the_fields_that_were_given_in_the_models_present_rule() -> None:
    model = tiny_deebert(rule=rx.Entropy(0.5))
    fast = rx.accelerate(model, threshold=0.25, impl="reference")
    model.rule = rx.MaxProb(0.9)
    fast.refresh()
    assert fast.rule == rx.MaxProb(0.25)
    model.rule = rx.Patience(2)
    with pytest.raises(ValueError, match="threshold: the rule Patience has no such field"):
        fast.refresh()
    assert fast.rule == rx.MaxProb(0.25) and fast(**inputs()).exit_layer.tolist() == [1] * 12


def test_a_rule_cannot_be_set_where_it_would_change_nothing() -> None:
    fast = fast_model()
    with pytest.raises(AttributeError, match="rule"):
        fast.rule = rx.Entropy(0.9)  # type: ignore[misc]


def test_refresh_sees_options_that_changed() -> None:
    model, batch = exiting(tiny_deebert(exit_at_last_highway=True)), inputs()
    fast = rx.accelerate(model, impl="reference")
    model.exit_at_last_highway, model.pooling = False, "mean"
    expected = reference(model, **batch)
    fast.refresh()
    assert_same_answers(fast(**batch), expected)


def test_the_models_mode_is_its_own_business() -> None:
    model, batch = exiting(tiny_deebert(bert_config(hidden_dropout_prob=0.5))), inputs()
    expected = reference(model, **batch)
    model.train()
    fast = rx.accelerate(model, impl="reference")
    assert model.training and not fast.training
    assert_same_answers(fast(**batch), expected)


def test_nothing_is_patched_and_nothing_is_owned() -> None:
    model, batch = exiting(tiny_deebert()), inputs()
    watched = [nn.Module, nn.Linear, nn.LayerNorm, F, torch.Tensor, rx.DeeBert]
    watched += [type(module) for module in model.modules()]
    before = [(place, dict(vars(place))) for place in watched]
    own = {id(module): dict(vars(module)) for module in model.modules()}
    settings = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    expected = reference(model, **batch)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fast = rx.accelerate(model, threshold=0.3, impl="auto")
    fast(**batch)
    list(fast.stream([[5, 6]]))
    for place, attributes in before:
        now = dict(vars(place))
        assert now.keys() == attributes.keys(), place
        assert all(now[name] is value for name, value in attributes.items() if callable(value)), place
    assert all(dict(vars(module)) == own[id(module)] for module in model.modules())
    assert settings == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    assert torch.equal(reference(model, **batch).logits, expected.logits)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(fast.parameters()) == [] and list(fast.children()) == [] and fast.state_dict() == {}


def test_two_snapshots_of_one_model_do_not_meet() -> None:
    model, batch = tiny_deebert(), inputs()
    low, high = fast = [rx.accelerate(model, threshold=value, impl="reference") for value in (-1.0, 10.0)]
    for _ in range(2):
        assert [set(one(**batch).exit_layer.tolist()) for one in fast] == [{4}, {1}]
    low.refresh()
    assert set(high(**batch).exit_layer.tolist()) == {1}
