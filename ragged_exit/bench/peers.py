"""Other runtimes as contenders: the full-depth model, length-sorted and padded, each with its best settings."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertModel, BertTokenizerFast

from ragged_exit.bench.contenders import ROW_BATCHES, Contender, PaddedForward, padded_by
from ragged_exit.models.deebert import DeeBert

Forward = Callable[[Tensor, Tensor], Tensor]  # input_ids, attention_mask [B, S] -> logits [B, C]
Builder = Callable[[DeeBert, torch.dtype, int, int], Forward]  # model, dtype, threads, streams that share them
INPUTS = ("input_ids", "attention_mask")


def peers(model: DeeBert, dtype: torch.dtype, threads: int) -> tuple[list[Contender], dict[str, str]]:
    """The runtimes that are installed, and why the others are not here: name -> reason.

    model: fp32, a BERT whose heads see [CLS]. dtype: what to compute in, float32 or bfloat16.
    """
    if model.config.model_type != "bert" or model.pooling != "cls":
        raise ValueError(f"model: expected a BERT with [CLS] heads, got {model.config.model_type}, {model.pooling}")
    found, missing = [], {}
    before = torch.get_num_threads()
    for name, (build, streams) in _settings(threads).items():
        try:
            forward = build(model, dtype, threads, streams)
        except ImportError as error:
            missing[name] = f"{error.name} is not installed"
        except NotSupported as error:
            missing[name] = str(error)
        else:
            layers = model.config.num_hidden_layers
            run = padded_by(_without_types(forward), layers, by_length=True, streams=streams)
            found.append(Contender(name, run, ROW_BATCHES, exits=False))
        torch.set_num_threads(before)  # CTranslate2 sets its own number for all who share its OpenMP
    return found, missing


def _settings(threads: int) -> dict[str, tuple[Builder, int]]:
    """Name -> how it is built, and its streams: batches that run at a time and share the threads.

    All threads on one batch; and, for the inference engines, a batch a thread, as their vendors advise for throughput.
    """
    one_batch = {f"{name}_sorted": (build, 1) for name, build in BUILDERS.items()}
    if threads == 1:
        return one_batch
    return one_batch | {f"{name}_streams_sorted": (BUILDERS[name], threads) for name in ENGINES if name in BUILDERS}


def _without_types(forward: Forward) -> PaddedForward:
    """The exported graphs take no token types: a workload that has them is refused, not answered without."""

    def run(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        if token_type_ids is not None:
            raise ValueError("workload: expected no token types; the other runtimes' graphs take none")
        return forward(input_ids, attention_mask)

    return run


class NotSupported(Exception):
    """The runtime is there and cannot do this."""


class _FullDepth(nn.Module):
    """The backbone and its final head as one graph, for rows padded on the right: [CLS] is column 0."""

    def __init__(self, model: DeeBert) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        final = self.model.final
        return final.classifier(torch.tanh(final.pooler(hidden[:, 0])))


def _compiled(model: DeeBert, dtype: torch.dtype, threads: int, streams: int) -> Forward:
    """torch.compile: inductor with frozen weights and dynamic shapes."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    graph = torch.compile(_FullDepth(copy.deepcopy(model).to(dtype)).eval(), dynamic=True)

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.no_grad():  # freezing needs it; inference mode is not enough
            return graph(input_ids, attention_mask)

    return forward


def _onnxruntime(model: DeeBert, dtype: torch.dtype, threads: int, streams: int) -> Forward:
    """ONNX Runtime on its transformer-optimised graph."""
    import onnxruntime
    from onnxruntime.transformers.optimizer import optimize_model

    if dtype != torch.float32:
        raise NotSupported("no bf16 on a CPU")
    config = model.config
    with tempfile.TemporaryDirectory() as folder:
        plain, fast = Path(folder) / "plain.onnx", Path(folder) / "fast.onnx"
        _export(model, plain)
        optimised = optimize_model(
            str(plain),
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            opt_level=1,
        )
        fused, layers = optimised.get_fused_operator_statistics()["Attention"], config.num_hidden_layers
        if fused < layers:  # it says nothing itself, and is slow
            raise RuntimeError(f"onnxruntime: expected fused attention in {layers} layers, got {fused}")
        optimised.save_model_to_file(str(fast))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads // streams, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        session = onnxruntime.InferenceSession(str(fast), options, providers=["CPUExecutionProvider"])

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return torch.from_numpy(session.run(None, inputs)[0])

    return forward


def _openvino(model: DeeBert, dtype: torch.dtype, threads: int, streams: int) -> Forward:
    """OpenVINO with dynamic shapes."""
    import openvino

    graph = openvino.convert_model(  # not of ONNX, in which it does not recognise the attention
        _FullDepth(copy.deepcopy(model)).eval(),
        example_input=_example(),
        input=[(name, openvino.PartialShape([-1, -1]), openvino.Type.i64) for name in INPUTS],
    )
    settings = {
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
    }
    compiled = openvino.Core().compile_model(graph, "CPU", settings)
    requests: SimpleQueue[Any] = SimpleQueue()  # a request runs one batch at a time
    for _ in range(streams):
        requests.put(compiled.create_infer_request())

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        request = requests.get()
        logits = np.array(request.infer([input_ids.numpy(), attention_mask.numpy()])[0])
        requests.put(request)
        return torch.from_numpy(logits)

    return forward


def _ctranslate2(model: DeeBert, dtype: torch.dtype, threads: int, streams: int) -> Forward:
    """CTranslate2's encoder, which drops padding itself; the head stays in PyTorch."""
    import ctranslate2

    kind = "float32" if dtype == torch.float32 else "bfloat16"
    if kind not in ctranslate2.get_supported_compute_types("cpu"):
        raise NotSupported(f"no {kind} on this CPU")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "hf", Path(folder) / "ct2"
        config = copy.deepcopy(model.config)
        config.position_embedding_type = "absolute"  # its converter asks for this, and for a pooler
        whole = BertModel(config, add_pooling_layer=True)
        whole.load_state_dict(model.backbone.state_dict(), strict=False)
        whole.save_pretrained(source)
        (source / "vocab.txt").write_text("".join(f"{word}\n" for word in _words(model.config.vocab_size)))
        BertTokenizerFast(str(source / "vocab.txt")).save_pretrained(source)
        ctranslate2.converters.TransformersConverter(str(source)).convert(str(target))
        workers = {"inter_threads": streams, "intra_threads": threads // streams}
        encoder = ctranslate2.Encoder(str(target), compute_type=kind, **workers)
    head = model.final

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        output: Any = encoder.forward_batch(rows).last_hidden_state.to(ctranslate2.DataType.float32)
        return head(torch.from_numpy(np.array(output)), attention_mask, model.pooling)

    return forward


def _words(count: int) -> list[str]:
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(5, count))]


def _example() -> tuple[Tensor, Tensor]:
    """What exports trace with, in the order of ``INPUTS``."""
    ids = torch.ones(4, 16, dtype=torch.int64)
    return ids, torch.ones_like(ids)


def _export(model: DeeBert, path: Path) -> None:
    """As ONNX with eager attention: its optimiser knows that graph, not scaled_dot_product_attention's."""
    model = copy.deepcopy(model)
    backbone: Any = model.backbone
    backbone.set_attn_implementation("eager")
    axes = {name: {0: "rows", 1: "tokens"} for name in INPUTS}
    torch.onnx.export(
        _FullDepth(model).eval(),
        _example(),
        str(path),
        input_names=list(INPUTS),
        output_names=["logits"],
        dynamic_axes={**axes, "logits": {0: "rows"}},
        opset_version=17,
        dynamo=False,
    )


BUILDERS: dict[str, Builder] = {
    "compiled": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "ctranslate2": _ctranslate2,
}
ENGINES = ("onnxruntime", "openvino", "ctranslate2")
