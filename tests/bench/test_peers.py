"""Every runtime that is installed answers as the full-depth model does; the others are named, with a reason."""

from __future__ import annotations

import builtins
import importlib.util
import threading

import pytest
import torch
from tiny import one_thread  # noqa: F401  (autouse)
from transformers import BertConfig

import ragged_exit as rx
from ragged_exit.bench import peers as peers_module
from ragged_exit.bench.contenders import full_depth, padded, padded_by
from ragged_exit.bench.environment import environment
from ragged_exit.bench.peers import BUILDERS, ENGINES, peers
from ragged_exit.bench.synthetic import PROFILES, random_workload
from ragged_exit.bench.workload import Workload


@pytest.fixture(scope="module")
def model() -> rx.DeeBert:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3
    )
    return rx.DeeBert(config, rx.Entropy(0.1)).eval()


def workload() -> Workload:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 14, (20,), generator=generator).tolist()
    return Workload([torch.randint(5, 120, (length,), generator=generator).tolist() for length in lengths])


SLOW = {"compiled": pytest.mark.slow}  # builds C++


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in BUILDERS])
def test_answers_are_the_models(name, threads, model, monkeypatch):
    monkeypatch.setattr(peers_module, "BUILDERS", {name: BUILDERS[name]})
    found, missing = peers(model, torch.float32, threads)
    if missing:
        pytest.skip(missing[f"{name}_sorted"])
    assert len(found) == (2 if threads > 1 and name in ENGINES else 1)
    wanted = padded(model, by_length=False)(workload(), 4)
    for peer in found:
        answers = peer.run(workload(), 4)
        torch.testing.assert_close(answers.logits, wanted.logits, atol=1e-4, rtol=0)
        assert torch.equal(answers.exit_layer, wanted.exit_layer) and not peer.exits


def test_streams_run_a_batch_each_at_a_time(model):
    """And answer in the workload's order, without a graph for gradients, whichever batch is done first."""
    both = threading.Barrier(2)  # neither goes on without the other: one after the other would break it

    def forward(input_ids, attention_mask, token_type_ids):
        both.wait(timeout=60)
        return full_depth(model, input_ids, attention_mask, token_type_ids)

    answers = padded_by(forward, 2, by_length=True, streams=2)(workload(), 5)
    wanted = padded(model, by_length=True)(workload(), 5)
    torch.testing.assert_close(answers.logits, wanted.logits)
    assert answers.logits.is_inference() and torch.equal(answers.exit_layer, wanted.exit_layer)


def test_onnxruntime_fuses_the_attention_of_every_layer(model, monkeypatch):
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer", reason="onnxruntime is not installed")
    real, fused = optimizer.optimize_model, []

    def optimise(*arguments, **options):
        graph = real(*arguments, **options)
        fused.append(graph.get_fused_operator_statistics())
        return graph

    monkeypatch.setattr(optimizer, "optimize_model", optimise)
    build = BUILDERS["onnxruntime"]
    build(model, torch.float32, 1, 1)
    assert fused[0]["Attention"] == 2 and fused[0]["EmbedLayerNormalization"] == 1
    assert model.config._attn_implementation == "sdpa"  # other contenders run it
    monkeypatch.setattr(type(model.backbone), "set_attn_implementation", lambda *_: None)
    with pytest.raises(RuntimeError, match="expected fused attention in 2 layers, got 0"):
        build(model, torch.float32, 1, 1)


def test_openvinos_attention_is_one_operation(model, monkeypatch):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    compiled = []

    class Core(openvino.Core):
        def compile_model(self, *arguments):
            compiled.append(super().compile_model(*arguments))
            return compiled[-1]

    monkeypatch.setattr(openvino, "Core", Core)
    BUILDERS["openvino"](model, torch.float32, 1, 1)
    kinds = {op.get_rt_info()["layerType"].value for op in compiled[0].get_runtime_model().get_ops()}
    assert "Subgraph" in kinds and kinds.isdisjoint({"MatMul", "Softmax"})  # what attention consists of otherwise


def test_a_runtime_that_changes_the_threads_changes_them_for_nobody_else(model, monkeypatch):
    def build(model, dtype, threads, streams):
        torch.set_num_threads(1)
        return lambda ids, mask: torch.zeros(len(ids), 3)

    monkeypatch.setattr(peers_module, "BUILDERS", {"stub": build})
    torch.set_num_threads(2)  # one_thread sets them back
    peers(model, torch.float32, threads=2)
    assert torch.get_num_threads() == 2


def test_token_types_are_refused(model, monkeypatch):
    monkeypatch.setattr(peers_module, "BUILDERS", {"stub": lambda *_: lambda ids, mask: torch.zeros(len(ids), 3)})
    ((peer,), _) = peers(model, torch.float32, threads=1)
    assert len(peer.run(workload(), 8).logits) == 20
    with pytest.raises(ValueError, match="no token types"):
        peer.run(Workload([[5, 6]], token_type_ids=[[0, 1]]), 8)


def test_their_versions_are_in_every_result():
    versions = environment()["versions"]
    assert {"onnxruntime", "openvino", "ctranslate2"} <= set(versions)
    found = {name for name in versions if importlib.util.find_spec(name) is None}
    assert found == {name for name, version in versions.items() if version == "not installed"}


def test_what_is_not_installed_is_named(model, monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.split(".")[0] in ("onnxruntime", "openvino", "ctranslate2"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(peers_module.BUILDERS, "compiled")
    found, missing = peers(model, torch.float32, threads=1)
    assert found == [] and set(missing) == {"onnxruntime_sorted", "openvino_sorted", "ctranslate2_sorted"}
    assert "openvino is not installed" in missing["openvino_sorted"]


@pytest.mark.parametrize(("profile", "mean", "shortest", "longest"), [
    ("sst2", 24, 4, 66), ("mrpc", 53, 16, 103), ("long", 320, 128, 512), ("uniform", 128, 128, 128),
])  # fmt: skip
def test_profiles(profile, mean, shortest, longest):
    assert profile in PROFILES
    lengths = torch.tensor(random_workload(2000, 3, profile).lengths)
    assert float(lengths.double().mean()) == pytest.approx(mean, rel=0.04)
    assert int(lengths.min()) >= shortest and int(lengths.max()) <= longest
