"""The ops as torch sees them: opcheck, torch.compile, torch.export; and which implementation a request gets."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ragged_exit.batch import RaggedBatch
from ragged_exit.ops import add_layer_norm, compact, dispatch, exit_decide, exit_step, resolve_impl, varlen_attention
from ragged_exit.ops.compact import _compact
from ragged_exit.ops.exit_decide import _exit_decide
from ragged_exit.ops.exit_step import _exit_step
from ragged_exit.ops.reference.exit import pool_rows
from ragged_exit.rules import DistanceEntropy, Entropy, ExitRule, LearnedUncertainty, Patience
from ragged_exit.testing import assert_same_values, qkv_views, random_batch, random_head, random_state, seeded

OPS = torch.ops.ragged_exit
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_autograd_registration")


def opcheck(op, arguments: tuple) -> None:
    results = torch.library.opcheck(op, arguments, test_utils=CHECKS)
    assert results == dict.fromkeys(CHECKS, "SUCCESS")


def step_arguments(
    rule: ExitRule, dtype: torch.dtype, impl: str, device: str, *, means: bool = False, **head_kwargs
) -> tuple:
    generator = seeded(1)
    batch = random_batch([2, 3, 1], 10, generator, dtype=dtype, device=device, spare_rows=1, spare_tokens=2)
    kwargs = {"uncertainty": rule.needs == "uncertainty", "prototype_size": 5 if rule.needs == "prototypes" else None}
    head = random_head(10, 3, generator, dtype=dtype, device=device, **kwargs, **head_kwargs)
    state = random_state(rule, batch.row_capacity, 3, generator, device=device)
    return (
        batch.hidden,
        pool_rows(batch.hidden, batch.cu_seqlens, "mean").float() if means else None,
        batch.cu_seqlens,
        batch.live,
        head.weights[:-1],
        head.pooling,
        state.get("counter"),
        state.get("previous"),
        torch.tensor([0.5], device=device),
        *rule.spec,
        False,
        impl,
    )


@pytest.mark.parametrize(
    ("rule", "head"),
    [
        (Entropy(0.5), {}),
        (Entropy(0.5, dialect="hf"), {"pooled_size": 8, "pooling": "mean"}),
        (LearnedUncertainty(0.5), {"pooled_size": 8}),
        (Patience(2), {"bias": False}),
        (DistanceEntropy(0.5), {"pooling": "mean"}),
        (Entropy(0.5), {"pooling": "mean", "means": True}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ExitRule) else "",
)
def test_opcheck_exit_step(impl, dtype, device, rule, head):
    opcheck(OPS.exit_step, step_arguments(rule, dtype, impl, device, **head))


@pytest.mark.parametrize("rule", [Entropy(0.5), LearnedUncertainty(0.5), Patience(2)], ids=lambda rule: rule.spec.score)
def test_opcheck_exit_decide(impl, dtype, device, rule):
    _, _, cu_seqlens, live, *_ = step_arguments(rule, dtype, impl, device)
    generator = seeded(2)
    state = random_state(rule, 4, 3, generator, device=device)
    signal = torch.rand(4, generator=generator).to(device) if rule.needs else None
    logits = torch.randn(4, 3, generator=generator).to(dtype).to(device)
    row_state = (state.get("counter"), state.get("previous"))
    threshold = torch.rand(4, generator=generator).to(device)
    opcheck(OPS.exit_decide, (logits, signal, cu_seqlens, live, *row_state, threshold, *rule.spec, False, impl))


def test_opcheck_compact(impl, dtype, device):
    batch = random_batch([2, 3, 1], 10, seeded(3), dtype=dtype, device=device, token_ids=True)
    survivors = torch.tensor([0, 2, -1], dtype=torch.int32, device=device)
    bounds = torch.tensor([0, 2, 3, 3], dtype=torch.int32, device=device)
    live = torch.tensor([2, 3], dtype=torch.int32, device=device)
    tokens, rows = (
        [batch.hidden, batch.input_ids],
        [batch.sample_ids, torch.ones(3, 2, dtype=torch.bool, device=device)],
    )
    new_tokens, new_rows = [value[:5].clone() for value in tokens], [value[:2].clone() for value in rows]
    opcheck(OPS.compact, (new_tokens, new_rows, tokens, rows, survivors, batch.cu_seqlens, bounds, live, impl))


def test_opcheck_varlen_attention(impl, dtype, device):
    q, k, v = qkv_views(6, 2, 16, seeded(4), dtype=dtype, device=device)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    opcheck(OPS.varlen_attention, (q, k, v, cu_seqlens, 3, 0.25, impl))


def test_opcheck_add_layer_norm(impl, dtype, device):
    x, residual = torch.randn(2, 6, 16, generator=seeded(5)).to(dtype).to(device)
    weight, bias = torch.randn(2, 16, generator=seeded(6)).to(dtype).to(device)
    for kind in ("standard", "uer"):
        opcheck(OPS.add_layer_norm, (x, residual, weight, bias, 1e-6, kind, impl))
        opcheck(OPS.add_layer_norm, (torch.cat((x, x), 1)[:, 3:19], None, weight, bias, 1e-6, kind, impl))  # strided
        opcheck(OPS.add_layer_norm_into, (torch.empty_like(x), x, residual, weight, bias, 1e-6, kind, impl))


class Layer(nn.Module):
    """A toy layer with an exit, made of the ops; for tracing, which sees tensors and no host counts."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.impl = impl
        generator = seeded(7)
        self.register_buffer("qkv", torch.randn(48, 16, generator=generator) / 4)
        self.register_buffer("weight", torch.ones(16))
        self.register_buffer("bias", torch.zeros(16))
        self.register_buffer("classifier", torch.randn(3, 16, generator=generator) / 2)
        self.register_buffer("threshold", torch.tensor([0.9]))

    def forward(self, hidden: Tensor, cu_seqlens: Tensor, live: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (part.view(-1, 2, 8) for part in (hidden @ self.qkv.T).split(16, dim=1))
        attended = varlen_attention(q, k, v, cu_seqlens, 4, 0.35, impl=self.impl).flatten(1)
        hidden = add_layer_norm(attended, hidden, self.weight, self.bias, 1e-6, impl=self.impl)
        hidden = add_layer_norm(hidden * 2, None, self.weight, self.bias, 1e-6, out=hidden, impl=self.impl)
        spec = Entropy(1.0).spec
        head = (self.classifier, *(None,) * 9)
        first = _exit_step(
            hidden, None, cu_seqlens, live, head, "cls", None, None, self.threshold, *spec, False, self.impl
        )
        logits, _, _, survivors, bounds, left = first[:6]
        second = _exit_decide(logits * 2, None, cu_seqlens, live, None, None, self.threshold, *spec, True, self.impl)
        new_hidden, new_logits = torch.empty_like(hidden), torch.empty_like(logits)
        _compact([new_hidden], [new_logits], [hidden], [logits], survivors, cu_seqlens, bounds, left, self.impl)
        return (*first[:6], second[1], new_hidden, new_logits)


def layer_inputs(device: str) -> tuple[Tensor, ...]:
    batch = random_batch([2, 4, 1], 16, seeded(8), device=device, spare_tokens=1)
    return batch.hidden, batch.cu_seqlens, batch.live


def test_the_layer_is_what_its_ops_are(device):
    """The toy layer below decides something: some stay, some leave, and what stays is gathered."""
    out = Layer("reference").to(device)(*layer_inputs(device))
    assert 0 < int(out[5][0]) < 3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_in_one_graph(impl, device, backend):
    layer, inputs = Layer(impl).to(device), layer_inputs(device)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for actual, expected in zip(compiled(*inputs), layer(*inputs), strict=True):
        assert_same_values(actual, expected)
    torch.compiler.reset()


def test_exports(impl, device):
    layer, inputs = Layer(impl).to(device), layer_inputs(device)
    exported = torch.export.export(layer, inputs)
    called = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert {getattr(OPS, name).default for name in ("exit_step", "exit_decide", "compact")} <= called
    assert {OPS.varlen_attention.default, OPS.add_layer_norm.default} <= called
    for actual, expected in zip(exported.module()(*inputs), layer(*inputs), strict=True):
        assert_same_values(actual, expected)


class Seen(TorchDispatchMode):
    """Writes down what torch is asked to call."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_the_ops(monkeypatch):
    """In inference mode the kernels are called without torch, unless something would see the op; it answers alike."""
    layer, inputs, name = Layer("reference"), layer_inputs("cpu"), "ragged_exit::exit_step"
    asked = []
    monkeypatch.setattr(
        torch.library.CustomOpDef, "__call__", lambda op, *args: asked.append(op) or op._opoverload(*args)
    )
    outside = layer(*inputs)
    assert len(asked) == 6
    with torch.inference_mode():
        asked.clear()
        inside = layer(*inputs)
        assert asked == []
        with Seen() as seen:
            layer(*inputs)
        assert name in seen.names and len(asked) == 6
        with torch.profiler.profile() as profile:
            layer(*inputs)
        assert name in {event.name for event in profile.events()}
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(layer(*inputs)[0], FakeTensor)
    for found, expected in zip(inside, outside, strict=True):
        assert_same_values(found, expected)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        layer(inputs[0].requires_grad_(), *inputs[1:])[0].sum().backward()


# which implementation ---------------------------------------------------------------------------------------------


def every_op(impl: str | None, device: str) -> list:
    """Calls of all wrappers with this request."""
    batch = random_batch([2, 1], 8, seeded(9), device=device)
    head = random_head(8, 2, seeded(10), device=device)
    decision = exit_decide(batch, torch.zeros(2, 2, device=device), Entropy(-1.0), impl="reference")
    q, k, v = qkv_views(3, 1, 8, seeded(11), device=device)
    weight = torch.ones(8, device=device)
    return [
        lambda: exit_step(batch, head, Entropy(0.5), impl=impl),
        lambda: exit_decide(batch, torch.zeros(2, 2, device=device), Entropy(0.5), impl=impl),
        lambda: compact(batch, decision, 3, impl=impl),
        lambda: varlen_attention(q, k, v, batch.cu_seqlens, 2, 1.0, impl=impl),
        lambda: add_layer_norm(batch.hidden, None, weight, weight, 1e-6, impl=impl),
    ]


def test_function_transforms_see_the_ops(impl, device):
    """Inside them tensors have no memory that a kernel could read."""
    weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device)
    x = torch.randn(3, 8, generator=seeded(1)).to(device)
    with torch.inference_mode():
        normed = add_layer_norm(x, None, weight, bias, 1e-5, impl=impl)

    def loss(scale: Tensor) -> Tensor:
        with torch.inference_mode():
            found = add_layer_norm(x, None, weight, bias, 1e-5, impl=impl)
        return (found.clone() * scale).sum()

    torch.testing.assert_close(torch.func.grad(loss)(torch.ones((), device=device)), normed.sum())
    with torch.inference_mode():
        found = torch.func.functionalize(lambda value: add_layer_norm(value, None, weight, bias, 1e-5, impl=impl))(x)
    assert_same_values(found, normed)


def test_an_explicit_choice_never_falls_back(monkeypatch):
    monkeypatch.setattr(dispatch, "native_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call in every_op("native", "cpu"):
        with pytest.raises(RuntimeError, match='impl: "native" was asked for'):
            call()
    for call in every_op("triton", "cpu"):
        with pytest.raises(ValueError, match="needs TRITON_INTERPRET=1"):
            call()
    for call in every_op("fast", "cpu"):
        with pytest.raises(ValueError, match=r"impl: expected one of .* got 'fast'"):
            call()
    with pytest.raises(ValueError, match='"native" runs on the CPU'):
        resolve_impl("native", torch.device("cuda"))


def test_a_gpu_without_triton_says_so_at_once(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for impl in (None, "auto", "triton"):
        with pytest.raises(RuntimeError, match='impl: "triton", which a GPU takes by itself, needs the triton package'):
            resolve_impl(impl, torch.device("cuda"))
    assert resolve_impl("reference", torch.device("cuda")) == "reference"


def test_the_choice_reaches_the_implementation(monkeypatch):
    """Each wrapper runs the op of the implementation that was asked for, and of no other."""
    names = ("exit_step", "exit_decide", "compact", "varlen_attention", "add_layer_norm")
    asked = []

    class Stub:
        def __getattr__(self, name: str):
            asked.append(name)
            raise NotImplementedError(name)

    calls = every_op("reference", "cpu")
    monkeypatch.setattr(dispatch, "implementation", lambda impl: Stub())
    for module in ("exit_step", "exit_decide", "compact", "attention", "layer_norm"):
        monkeypatch.setattr(sys.modules[f"ragged_exit.ops.{module}"], "implementation", lambda impl: Stub())
    for call, name in zip(calls, names, strict=True):
        with pytest.raises(NotImplementedError, match=name):
            call()
    assert asked == list(names)


def test_auto(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for available, expected in ((True, "native"), (False, "reference")):
        monkeypatch.setattr(dispatch, "native_available", lambda available=available: available)
        assert resolve_impl("auto", cpu) == expected
        assert resolve_impl("auto", cuda) == "triton"
    for impl in ("reference", "triton"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert resolve_impl(impl, cpu) == impl


def test_the_environment_is_read_once(monkeypatch):
    dispatch.default_impl.cache_clear()
    try:
        monkeypatch.setenv("RAGGED_EXIT_IMPL", "reference")
        assert resolve_impl(None, torch.device("cuda")) == "reference"
        monkeypatch.setenv("RAGGED_EXIT_IMPL", "triton")
        assert resolve_impl(None, torch.device("cuda")) == "reference"
        assert resolve_impl("triton", torch.device("cuda")) == "triton"  # a request goes before the environment
        dispatch.default_impl.cache_clear()
        monkeypatch.setenv("RAGGED_EXIT_IMPL", "fast")
        with pytest.raises(ValueError, match=r"RAGGED_EXIT_IMPL: expected one of .* got 'fast'"):
            resolve_impl(None, torch.device("cpu"))
        dispatch.default_impl.cache_clear()
        monkeypatch.delenv("RAGGED_EXIT_IMPL")
        assert dispatch.default_impl() == "auto"
    finally:
        dispatch.default_impl.cache_clear()


def test_a_missing_extension_is_said_once():
    """Without the compiled extension the package runs on the reference ops, and warns a single time."""
    script = """
import sys, warnings
sys.modules["ragged_exit._native"] = None  # importing it raises ImportError
import torch
from ragged_exit.ops import resolve_impl
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert resolve_impl("auto", torch.device("cpu")) == "reference"
    assert resolve_impl("auto", torch.device("cpu")) == "reference"
assert len(seen) == 1 and "not built" in str(seen[0].message), seen
try:
    resolve_impl("native", torch.device("cpu"))
except RuntimeError as error:
    print("refused:", error)
"""
    environment = {key: value for key, value in os.environ.items() if key != "RAGGED_EXIT_IMPL"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 'refused: impl: "native" was asked for' in run.stdout


def test_nothing_to_run_on_is_no_batch():
    """A batch without rows never reaches an op: the batch itself refuses to be."""
    with pytest.raises(ValueError, match="expected at least one"):
        RaggedBatch.from_sequences([])
