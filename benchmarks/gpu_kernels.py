"""Each op on a CUDA device against the same maths in eager PyTorch and under torch.compile.

    python benchmarks/gpu_kernels.py [--dtype bf16|fp16|fp32] [--repeats 15] [--json FILE]

Two times a contender: "replay", a CUDA graph of the op, and "call", launched from Python. Rounds are interleaved, the
median counts. Before any timing the results are compared in float64: exits must be equal outside the margin, values
within twice PyTorch's own error; where they are not, no speed-up is printed. GB/s and TFLOP/s count the bytes and
operations that the op cannot avoid, and stand beside this device's measured copy bandwidth and matrix rate.

The JSON is written anew after every case. A case that raises, or what it is compared with, is recorded as an error, and
the others go on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ragged_exit.batch import RaggedBatch
from ragged_exit.bench.environment import environment, write_result
from ragged_exit.heads import MlpHead
from ragged_exit.ops import add_layer_norm, compact, embed_layer_norm, exit_decide, exit_step, varlen_attention
from ragged_exit.rules import Entropy
from ragged_exit.testing import quiet_threshold, random_lengths, seeded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Outputs = tuple[Tensor, ...]


class Case(NamedTuple):
    """One op at one size. ``plain`` takes ``inputs`` in any float dtype; ``ours`` runs on them as they are."""

    name: str
    inputs: dict[str, Tensor]
    ours: Callable[[], Outputs]
    plain: Callable[..., Outputs]
    threshold: float | None  # of the score, the second output, when the op decides
    bytes: int
    flops: int
    varlen_attn: Callable[[], object] | None = None  # PyTorch's own kernel for packed tokens, timed beside ours


def plain_decide(logits: Tensor, cu_seqlens: Tensor, live: Tensor, threshold: float) -> Outputs:
    """Entropy, comparison and plan without waiting for the device."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = wide.log_softmax(1)
    score = -(log_probs.exp() * log_probs).sum(1)
    rows = torch.arange(len(logits), device=logits.device)
    alive = rows < live[0]
    exits = alive & (score < threshold)
    stays = alive & ~exits
    order = torch.argsort(stays.logical_not(), stable=True)
    count = stays.sum()
    survivors = torch.where(rows < count, order, -1).to(torch.int32)
    lengths = (cu_seqlens.diff() * stays)[order]
    new_cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return wide, score, exits, survivors, new_cu_seqlens, torch.stack((count, new_cu_seqlens[-1]))


def exit_step_case(
    rows: int, hidden_size: int, classes: int, dtype: torch.dtype, device: str, impl: str | None
) -> Case:
    generator = seeded(rows)
    batch = _batch(rows, 24, device)

    def new(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype)

    inputs = {
        "hidden": new(batch.tokens, hidden_size) * hidden_size**0.5,
        "pooler_weight": new(hidden_size, hidden_size),
        "pooler_bias": new(hidden_size),
        "classifier_weight": 4 * new(classes, hidden_size),
        "classifier_bias": new(classes),
    }
    batch = batch.with_hidden(inputs["hidden"])
    head = MlpHead(**{name: value for name, value in inputs.items() if name != "hidden"})
    scores = exit_step(batch, head, Entropy(0.0), impl="reference").score
    threshold = quiet_threshold(scores.double().cpu(), 0.5)

    def plain(
        hidden: Tensor, pooler_weight: Tensor, pooler_bias: Tensor, classifier_weight: Tensor, classifier_bias: Tensor
    ) -> Outputs:
        pooled = torch.tanh(F.linear(hidden[batch.cu_seqlens[:-1]], pooler_weight, pooler_bias))
        logits = F.linear(pooled, classifier_weight, classifier_bias)
        return plain_decide(logits, batch.cu_seqlens, batch.live, threshold)

    weights = hidden_size * (hidden_size + classes)
    return Case(
        name=f"exit_step B={rows} H={hidden_size} C={classes}",
        inputs=inputs,
        ours=lambda: exit_step(batch, head, Entropy(threshold), impl=impl)[:-1],
        plain=plain,
        threshold=threshold,
        bytes=(weights + rows * hidden_size) * dtype.itemsize + 4 * rows * (classes + 4),
        flops=2 * rows * weights,
    )


def exit_decide_case(rows: int, classes: int, dtype: torch.dtype, device: str, impl: str | None) -> Case:
    batch = _batch(rows, 24, device)
    logits = torch.randn(rows, classes, generator=seeded(rows)).to(device, dtype) * 2
    scores = exit_decide(batch, logits, Entropy(0.0), impl="reference").score
    threshold = quiet_threshold(scores.double().cpu(), 0.5)
    return Case(
        name=f"exit_decide B={rows} C={classes}",
        inputs={"logits": logits},
        ours=lambda: exit_decide(batch, logits, Entropy(threshold), impl=impl)[:-1],
        plain=lambda logits: plain_decide(logits, batch.cu_seqlens, batch.live, threshold),
        threshold=threshold,
        bytes=rows * (classes * (dtype.itemsize + 4) + 16),
        flops=0,
    )


def compact_case(rows: int, hidden_size: int, dtype: torch.dtype, device: str, impl: str | None) -> Case:
    generator = seeded(rows)
    batch = _batch(rows, 24, device)
    hidden = torch.randn(batch.tokens, hidden_size, generator=generator).to(device, dtype)
    batch = batch.with_hidden(hidden)
    logits = torch.randn(rows, 2, generator=generator).to(device)
    logits[0] = 0  # entropy ln 2: the first row stays
    decision = exit_decide(batch, logits, Entropy(0.5), impl="reference")
    capacity = int(decision.live[1])
    survivors, new_cu_seqlens = decision.survivors, decision.cu_seqlens

    def plain(hidden: Tensor) -> Outputs:
        token = torch.arange(capacity, device=hidden.device)
        row = torch.searchsorted(new_cu_seqlens, token, right=True) - 1
        source = batch.cu_seqlens[survivors[row]] + token - new_cu_seqlens[row]
        return (torch.where((token < decision.live[1])[:, None], hidden[source], 0),)

    def ours() -> Outputs:
        compacted = compact(batch, decision, capacity, impl=impl).hidden
        assert compacted is not None
        return (compacted,)

    return Case(
        name=f"compact B={rows} T'={capacity} H={hidden_size}",
        inputs={"hidden": hidden},
        ours=ours,
        plain=plain,
        threshold=None,
        bytes=2 * capacity * hidden_size * dtype.itemsize,
        flops=0,
    )


def attention_case(rows: int, longest: int, dtype: torch.dtype, device: str, impl: str | None) -> Case:
    """12 heads of 64. PyTorch gets its queries, keys and values padded already, and is not asked to unpad."""
    heads, size = 12, 64
    batch = _batch(rows, longest, device)
    cu_seqlens, width = batch.cu_seqlens, batch.max_seqlen
    qkv = torch.randn(batch.tokens, 3, heads, size, generator=seeded(rows)).to(device, dtype)
    padded, mask = batch.unpack(qkv)  # [B, S, 3, N, D], [B, S]
    mask = mask.bool()

    def plain(padded: Tensor) -> Outputs:
        queries, keys, values = (x.transpose(1, 2) for x in padded.unbind(2))  # [B, N, S, D]
        return (F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None, :]),)

    q, k, v = qkv.unbind(1)

    def ours() -> Outputs:
        return (varlen_attention(q, k, v, cu_seqlens, width, size**-0.5, impl=impl),)

    packed = None
    if device == "cuda" and dtype != torch.float32:  # it runs nowhere else
        from torch.nn.attention.varlen import varlen_attn

        packed = partial(varlen_attn, q, k, v, cu_seqlens, cu_seqlens, width, width)
    pairs = int(batch.seqlens.long().pow(2).sum())
    return Case(
        name=f"varlen_attention B={rows} T={batch.tokens} S<={width}",
        inputs={"padded": padded},
        ours=ours,
        plain=plain,
        threshold=None,
        bytes=4 * batch.tokens * heads * size * dtype.itemsize,
        flops=4 * pairs * heads * size,
        varlen_attn=packed,
    )


def layer_norm_case(tokens: int, hidden_size: int, dtype: torch.dtype, device: str, impl: str | None) -> Case:
    x, residual = torch.randn(2, tokens, hidden_size, generator=seeded(tokens)).to(device, dtype)
    weight, bias = torch.randn(2, hidden_size, generator=seeded(tokens)).to(device, dtype)
    return Case(
        name=f"add_layer_norm T={tokens} H={hidden_size}",
        inputs={"x": x, "residual": residual, "weight": weight, "bias": bias},
        ours=lambda: (add_layer_norm(x, residual, weight, bias, 1e-12, impl=impl),),
        plain=lambda x, residual, weight, bias: (F.layer_norm(x + residual, (hidden_size,), weight, bias, 1e-12),),
        threshold=None,
        bytes=3 * tokens * hidden_size * dtype.itemsize,
        flops=0,
    )


def embed_case(tokens: int, hidden_size: int, dtype: torch.dtype, device: str, impl: str | None) -> Case:
    generator = seeded(tokens)
    sizes = {"word": 30522, "position": 512, "token_type": 2}
    ids = {name: torch.randint(0, size, (tokens,), generator=generator).to(device) for name, size in sizes.items()}
    word, position, token_type = (
        torch.randn(size, hidden_size, generator=generator).to(device, dtype) for size in sizes.values()
    )
    weight, bias = torch.randn(2, hidden_size, generator=generator).to(device, dtype)

    def plain(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        total = word[ids["word"]] + token_type[ids["token_type"]] + position[ids["position"]]
        return (F.layer_norm(total, (hidden_size,), weight, bias, 1e-12),)

    def ours() -> Outputs:
        places = (ids["word"], ids["position"], ids["token_type"])
        return (embed_layer_norm(*places, word, position, token_type, weight, bias, 1e-12, impl=impl),)

    return Case(
        name=f"embed_layer_norm T={tokens} H={hidden_size}",
        inputs={"word": word, "position": position, "token_type": token_type, "weight": weight, "bias": bias},
        ours=ours,
        plain=plain,
        threshold=None,
        bytes=tokens * (2 * hidden_size * dtype.itemsize + 24),
        flops=0,
    )


def _batch(rows: int, longest: int, device: str) -> RaggedBatch:
    return RaggedBatch.from_seqlens(torch.tensor(random_lengths(rows, longest, seeded(rows))), device)


def cases(dtype: torch.dtype, device: str, impl: str | None = None, *, small: bool = False) -> list[partial[Case]]:
    """What makes each case, so that one at a time lies in memory; ``small``: the same kinds at toy sizes."""
    hidden_size = 32 if small else 768
    batches = (5,) if small else (8, 64, 256)
    many = 40 if small else 1000
    common = (dtype, device, impl)
    made: list[partial[Case]] = []
    for rows in batches:
        made += [
            partial(exit_step_case, rows, hidden_size, 2, *common),
            partial(exit_step_case, rows, hidden_size, many, *common),
            partial(exit_decide_case, rows, 2, *common),
            partial(compact_case, rows, hidden_size, *common),
            partial(attention_case, rows, 9 if small else 64, *common),
            partial(layer_norm_case, 16 * rows, hidden_size, *common),
            partial(embed_case, 16 * rows, hidden_size, *common),
        ]
    large = [partial(attention_case, 32, 512, *common), partial(compact_case, 10_000, hidden_size, *common)]  # 64 MB
    return made if small else made + large


def disagreement(case: Case) -> str:
    """ "" when ours decides and computes as PyTorch does within the margin, else what differs."""
    ours, plain = case.ours(), case.plain(**case.inputs)
    oracle = case.plain(**{name: value.double() for name, value in case.inputs.items()})
    if "padded" in case.inputs:  # attention: PyTorch's [B, N, S, D] to packed tokens
        kept = _kept_tokens(case.inputs["padded"])
        plain, oracle = ((value.transpose(1, 2)[kept],) for (value,) in (plain, oracle))
    places = (0, 1) if case.threshold is not None else (0,)
    for place in places:
        error, own = (float((value[place].double() - oracle[place]).abs().max()) for value in (ours, plain))
        if not error <= 2 * own + 1e-5:
            return f"error {error:.1e}, PyTorch's own {own:.1e}"
    if case.threshold is None:
        return ""
    margin = max(1e-5, 4 * float((plain[1].double() - oracle[1]).abs().max()))
    clear = (oracle[1] - case.threshold).abs() > margin
    if not torch.equal(ours[2][clear], oracle[2][clear]):
        return "other exits outside the margin"
    if bool(clear.all()) and not all(map(torch.equal, ours[3:5], oracle[3:5])):
        return "another plan"
    return ""


def _kept_tokens(padded: Tensor) -> Tensor:
    return padded.flatten(2).ne(0).any(2)  # [B, S]: normal numbers are never all zero, padding always is


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph's replay of ``call``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def seconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, in interleaved rounds of enough calls to fill 2 ms or more."""
    counts: dict[str, int] = {}
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        counts[name] = max(5, int(2e-3 / max(_timed(call, 10) / 10, 1e-6)))
    for _ in range(repeats):
        for name, call in calls.items():
            rounds[name].append(_timed(call, counts[name]) / counts[name])
    return {name: statistics.median(times) for name, times in rounds.items()}


def _timed(call: Callable[[], object], count: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def device_peaks(dtype: torch.dtype) -> dict[str, float]:
    """GB/s of a large copy (read and write counted) and TFLOP/s of a large matrix product, measured now."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda").to(dtype)
    times = seconds({"copy": lambda: target.copy_(source), "matmul": lambda: a @ a}, 7)
    return {
        "copy_gb_s": 2 * source.nbytes / times["copy"] / 1e9,
        "matmul_tflop_s": 2 * 8192**3 / times["matmul"] / 1e12,
    }


def measure(case: Case, repeats: int, peaks: dict[str, float]) -> dict[str, object]:
    torch.compiler.reset()  # cases share code: past a few sizes torch.compile would give up and run eagerly
    compiled = torch.compile(case.plain, dynamic=False)
    calls: dict[str, Callable[[], object]] = {
        "ours": case.ours,
        "eager": lambda: case.plain(**case.inputs),
        "compiled": lambda: compiled(**case.inputs),
    }
    if case.varlen_attn is not None:
        calls["varlen_attn"] = case.varlen_attn
    differs = disagreement(case)
    replays, errors = {}, {}
    for name in list(calls):
        try:
            replays[name] = captured(calls[name])
        except Exception as error:
            if name == "ours":
                raise
            errors[name] = told(error)
            del calls[name]
    replay = seconds(replays, repeats)
    call = seconds(calls, repeats)
    bandwidth, rate = case.bytes / replay["ours"] / 1e9, case.flops / replay["ours"] / 1e12
    row: dict[str, object] = {
        "name": case.name,
        "disagreement": differs,
        "replay_us": {name: 1e6 * value for name, value in replay.items()},
        "call_us": {name: 1e6 * value for name, value in call.items()},
        "gb_s": bandwidth,
        "tflop_s": rate,
        "of_copy_bandwidth": bandwidth / peaks["copy_gb_s"],
        "of_matmul_rate": rate / peaks["matmul_tflop_s"],
    }
    if errors:
        row["errors"] = errors
    if not differs:
        row["speedup"] = {
            f"{how}_vs_{other}": times[other] / times["ours"]
            for how, times in (("replay", replay), ("call", call))
            for other in calls
            if other != "ours"
        }
    return row


def attempt(make: partial[Case], repeats: int, peaks: dict[str, float]) -> dict:
    name = f"{make.func.__name__}{make.args}"
    try:
        case = make()
        name = case.name
        return measure(case, repeats, peaks)
    except Exception as error:
        return {"name": name, "error": told(error)}


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def line(row: dict) -> str:
    """What is known of a case, as soon as it is."""
    if "error" in row:
        return f"{row['name']}: {row['error']}"
    times = ", ".join(f"{name} {value:.1f}" for name, value in row["replay_us"].items())
    said = [f"{row['name']}: replay us {times}", row["disagreement"]]
    said += [f"{name}: {error}" for name, error in row.get("errors", {}).items()]
    return "; ".join(filter(None, said))


def show(rows: list[dict], peaks: dict[str, float]) -> None:
    peak = f"{peaks['copy_gb_s']:.0f} GB/s copied, {peaks['matmul_tflop_s']:.0f} TFLOP/s multiplied"
    table = Table(title=f"{torch.cuda.get_device_name()}: {peak}")
    headings = ("op", "replay us", "vs eager", "vs compiled", "call us", "vs eager", "vs compiled", "GB/s", "TFLOP/s")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "op" else "right")
    for row in rows:
        if "error" in row:
            table.add_row(row["name"], "error")
            continue
        table.add_row(
            row["name"],
            f"{row['replay_us']['ours']:.1f}",
            gain(row, "replay_vs_eager"),
            gain(row, "replay_vs_compiled"),
            f"{row['call_us']['ours']:.1f}",
            gain(row, "call_vs_eager"),
            gain(row, "call_vs_compiled"),
            f"{row['gb_s']:.0f} ({row['of_copy_bandwidth']:.0%})",
            f"{row['tflop_s']:.2f} ({row['of_matmul_rate']:.1%})",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for row in rows:
        if "varlen_attn" in row.get("replay_us", {}):
            print(f"{row['name']}: replay {gain(row, 'replay_vs_varlen_attn')} the rate of torch's varlen_attn")


def gain(row: dict, name: str) -> str:
    if "speedup" not in row:
        return "differs"
    return f"{row['speedup'][name]:.2f}x" if name in row["speedup"] else "-"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks/gpu_kernels.py: this machine has no CUDA device; the Triton kernels are timed on nothing else"
        )
        return 2
    dtype = DTYPES[options.dtype]
    peaks = device_peaks(dtype)
    result = {"environment": environment(), "dtype": options.dtype, "device": peaks, "ops": []}
    rows: list[dict] = result["ops"]
    with torch.inference_mode():
        for make in cases(dtype, "cuda", "triton"):
            rows.append(attempt(make, options.repeats, peaks))
            print(line(rows[-1]), flush=True)
            if options.json:
                write_result(options.json, result)
    show(rows, peaks)
    return 1 if any(row.keys() & {"error", "errors"} or row["disagreement"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
