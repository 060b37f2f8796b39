"""The C++ kernels against PyTorch's best on this CPU, one op at a time.

    python benchmarks/native_ops.py [--repeats 40] [--threads N] [--json FILE]

Every contender's result is compared in float64 before it is timed; where it differs, no ratio is printed. Rounds are
interleaved, the median counts. With one thread the clock is that thread's CPU time, which other processes distort far
less; for more threads the machine must be idle. Rates stand beside what the machine gives in the same run: the
prepacked linear's GFLOP/s, and the bandwidth of an addition that moves the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ragged_exit.bench.environment import environment, write_result
from ragged_exit.heads import MlpHead
from ragged_exit.ops import linears_available, native, pack_linear, reference
from ragged_exit.ops.exit_step import packed_for
from ragged_exit.rules import Entropy

Run = Callable[[], Tensor]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@dataclass
class Row:
    """One measured case; ``ratio`` is the contender's seconds over ours, or the share named in ``against``."""

    op: str
    case: str
    ours_ms: float
    rate: str
    against: str
    ratio: float | None
    target: str


def lengths_like_sst2(tokens: int) -> list[int]:
    """Sequence lengths 3..60, about 21 on average, that add up to ``tokens``."""
    generator = torch.Generator().manual_seed(1)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        drawn = int(torch.empty(1).log_normal_(3.0, 0.6, generator=generator).clamp(3, 60))
        lengths.append(min(drawn, left))
    return lengths


def plan(lengths: list[int]) -> tuple[Tensor, Tensor]:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return cu_seqlens, torch.tensor([len(lengths), int(cu_seqlens[-1])], dtype=torch.int32)


def prepacked(x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def medians(contenders: list[Run], repeats: int) -> list[float]:
    """Seconds of each, rounds interleaved."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in contenders]
    for run in contenders:
        run()
    for _ in range(repeats):
        for run, spent in zip(contenders, times, strict=True):
            begin = clock()
            run()
            spent.append(clock() - begin)
    return [statistics.median(spent) for spent in times]


def agrees(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    return bool((actual.double() - expected.double()).abs().max() <= TOLERANCE[dtype] * (1 + expected.abs().max()))


def ratio(seconds: float, ours: float, equal: bool) -> float | None:
    return seconds / ours if equal else None


def attention_in_a_layer(repeats: int) -> Iterator[Row]:
    """Lengths as in SST-2, hidden 384, 12 heads: the share of a layer's time."""
    hidden, heads = 384, 12
    dim = hidden // heads
    for tokens in (1024, 8192):
        lengths = lengths_like_sst2(tokens)
        cu_seqlens, _ = plan(lengths)
        linears = [
            prepacked(torch.randn(tokens, i), torch.randn(o, i), torch.randn(o))
            for i, o in ((hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden))
        ]
        for dtype in (torch.float32, torch.bfloat16):
            qkv = torch.randn(tokens, 3, heads, dim).to(dtype)
            q, k, v = qkv.unbind(1)

            def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v, cu_seqlens: Tensor = cu_seqlens) -> Tensor:
                return native.varlen_attention(q, k, v, cu_seqlens, 60, dim**-0.5)

            wide = reference.varlen_attention(q.double(), k.double(), v.double(), cu_seqlens, 60, dim**-0.5)
            equal = agrees(ours(), wide, dtype)
            seconds, *layer = medians([ours, *linears], repeats)
            share = seconds / (sum(layer) + seconds)
            rate = sum(4 * length**2 * hidden for length in lengths) / seconds
            yield Row(
                "varlen_attention",
                f"{tokens} tokens, as SST-2, hidden 384, {_name(dtype)}",
                seconds * 1e3,
                f"{rate / 1e9:.0f} GFLOP/s",
                "share of a layer with fp32 linears",
                share if equal else None,
                "<= 0.08",
            )


def attention_at_one_length(repeats: int) -> Iterator[Row]:
    """Uniform lengths: against SDPA on the same strided views and on contiguous copies, and the linear's rate."""
    heads = 12
    linear = prepacked(torch.randn(1024, 768), torch.randn(3072, 768), torch.randn(3072))
    linear_flops = 2 * 1024 * 768 * 3072
    for dim in (32, 64):
        for length in (16, 32, 64, 128, 256, 512, 1024):
            count = max(1, 2048 // length)
            cu_seqlens, _ = plan([length] * count)
            qkv = torch.randn(count * length, 3, heads, dim)
            q, k, v = qkv.unbind(1)
            strided = [x.view(count, length, heads, dim).transpose(1, 2) for x in (q, k, v)]
            contiguous = [x.contiguous() for x in strided]
            narrow = [x.bfloat16() for x in (q, k, v)]

            def ours(
                inputs: list[Tensor], cu_seqlens: Tensor = cu_seqlens, length: int = length, dim: int = dim
            ) -> Tensor:
                return native.varlen_attention(*inputs, cu_seqlens, length, dim**-0.5)

            expected = F.scaled_dot_product_attention(*strided).transpose(1, 2).reshape(q.shape)
            equal = agrees(ours([q, k, v]), expected, torch.float32)
            seconds, first, second, linear_seconds, bf16 = medians(
                [
                    lambda q=q, k=k, v=v: ours([q, k, v]),
                    lambda strided=strided: F.scaled_dot_product_attention(*strided),
                    lambda contiguous=contiguous: F.scaled_dot_product_attention(*contiguous),
                    linear,
                    lambda narrow=narrow: ours(narrow),
                ],
                repeats,
            )
            rate = 4 * length**2 * dim * heads * count / seconds
            case = f"{count} x {length}, head size {dim}"
            shown = f"{rate / 1e9:.0f} GFLOP/s"
            yield Row(
                "varlen_attention",
                case,
                seconds * 1e3,
                shown,
                "best SDPA",
                ratio(min(first, second), seconds, equal),
                ">= 1",
            )
            share = rate / (linear_flops / linear_seconds)
            target = ">= 0.35" if length in (64, 128, 512) else ""
            yield Row(
                "varlen_attention",
                case,
                seconds * 1e3,
                shown,
                "share of the linear's rate",
                share if equal else None,
                target,
            )
            yield Row("varlen_attention", case, bf16 * 1e3, "", "fp32 over bf16", ratio(seconds, bf16, equal), ">= 1")


def linears(repeats: int) -> Iterator[Row]:
    """The four linears of a layer, each as the layer calls it, against oneDNN's prepacked one."""
    dtypes = [dtype for dtype in (torch.float32, torch.bfloat16) if linears_available(dtype)]
    for dtype, hidden in itertools.product(dtypes, (384, 768)):
        for inner, outer, finish in (
            (hidden, 3 * hidden, ""),
            (hidden, hidden, "residual"),
            (hidden, 4 * hidden, "gelu"),
            (4 * hidden, hidden, "residual"),
        ):
            weight, bias = (torch.randn(outer, inner) * inner**-0.5).to(dtype), torch.randn(outer).to(dtype)
            weights, packed = pack_linear(weight, bias), torch.ops.mkldnn._reorder_linear_weight(weight, None)
            for tokens in (16, 512, 4096):
                x, added = torch.randn(tokens, inner).to(dtype), torch.randn(tokens, outer).to(dtype)

                def ours(x=x, weights=weights, added=added, finish=finish) -> Tensor:
                    residual, activation = (added, "") if finish == "residual" else (None, finish)
                    return native.packed_linear(x, *weights, residual, activation)

                def theirs(x=x, packed=packed, bias=bias, added=added, finish=finish) -> Tensor:
                    if finish == "residual":
                        return torch.ops.mkldnn._linear_pointwise.binary(x, added, packed, bias, "add")
                    attr, algorithm = ("gelu", "none") if finish else ("none", "")
                    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, attr, [], algorithm)

                exact = F.linear(x.double(), weight.double(), bias.double())
                exact = F.gelu(exact) if finish == "gelu" else exact + added if finish == "residual" else exact
                equal = agrees(ours(), exact, dtype)
                seconds, other = medians([ours, theirs], repeats)
                case = f"{_name(dtype)}, {tokens} tokens, {inner} to {outer}{', ' if finish else ''}{finish}"
                if dtype == torch.float32 and tokens == 512:
                    error, their_error = (float((run() - exact).square().mean().sqrt()) for run in (ours, theirs))
                    shown = f"error {error:.1e}"
                    yield Row(
                        "packed_linear", case, seconds * 1e3, shown, "oneDNN's error", their_error / error, ">= 1"
                    )
                yield Row(
                    "packed_linear",
                    case,
                    seconds * 1e3,
                    f"{2 * tokens * inner * outer / seconds / 1e9:.0f} GFLOP/s",
                    "oneDNN, prepacked",
                    ratio(other, seconds, equal),
                    ">= 1",
                )


def exit_steps(repeats: int) -> Iterator[Row]:
    """The fused step against the same steps in PyTorch with a prepacked pooler."""
    threshold, rule = torch.tensor([0.3]), Entropy(0.3)
    for rows, hidden, classes in ((256, 768, 2), (256, 384, 2), (32, 768, 2), (1, 768, 2), (256, 768, 50)):
        cu_seqlens, live = plan(torch.randint(3, 60, (rows,)).tolist())
        x = torch.randn(int(live[1]), hidden)
        weight, classifier = torch.randn(hidden, hidden) * hidden**-0.5, torch.randn(classes, hidden) * hidden**-0.5
        bias, classifier_bias = torch.randn(hidden), torch.randn(classes)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        head = packed_for("native", MlpHead(classifier, classifier_bias, weight, bias)).weights
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()

        def ours(x=x, cu_seqlens=cu_seqlens, live=live, head=head) -> Tensor:
            return native.exit_step(x, None, cu_seqlens, live, head, None, None, threshold, rule.spec, False).score

        def theirs(
            x=x,
            starts=starts,
            lengths=lengths,
            packed=packed,
            bias=bias,
            classifier=classifier,
            classifier_bias=classifier_bias,
        ) -> Tensor:
            pooled = torch.tanh(torch.ops.mkldnn._linear_pointwise(x[starts], packed, bias, "none", [], ""))
            log_probs = F.linear(pooled, classifier, classifier_bias).log_softmax(1)
            score = -(log_probs.exp() * log_probs).sum(1)
            survivors = (score >= threshold).nonzero()[:, 0]
            lengths[survivors].cumsum(0)
            return score

        equal = agrees(ours(), theirs(), torch.float32)
        seconds, other = medians([ours, theirs], repeats)
        flops = 2 * rows * hidden * (hidden + classes)
        yield Row(
            "exit_step",
            f"B={rows}, H={hidden}, C={classes}",
            seconds * 1e3,
            f"{flops / seconds / 1e9:.0f} GFLOP/s",
            "PyTorch, prepacked pooler",
            ratio(other, seconds, equal),
            ">= 1.3" if rows == 256 and hidden == 768 and classes == 2 else "",
        )


def layer_norms(repeats: int) -> Iterator[Row]:
    """One pass over memory: against an addition of the same bytes."""
    for tokens, width in ((16384, 768), (1024, 384)):
        for dtype in (torch.float32, torch.bfloat16):
            x, residual = torch.randn(2, tokens, width).to(dtype)
            weight, bias = torch.randn(2, width).to(dtype)

            def ours(x=x, residual=residual, weight=weight, bias=bias) -> Tensor:
                return native.add_layer_norm(x, residual, weight, bias, 1e-5, "standard")

            wide = (value.double() for value in (x, residual, weight, bias))
            equal = agrees(ours(), reference.add_layer_norm(*wide, 1e-5, "standard"), dtype)
            seconds, addition = medians([ours, lambda x=x, residual=residual: x + residual], repeats)
            moved = 3 * x.numel() * x.element_size()
            yield Row(
                "add_layer_norm",
                f"{tokens} x {width}, {_name(dtype)}",
                seconds * 1e3,
                f"{moved / seconds / 1e9:.1f} GB/s",
                "share of x + residual's bandwidth",
                ratio(addition, seconds, equal),
                ">= 0.8" if tokens == 16384 else "",
            )


def compactions(repeats: int) -> Iterator[Row]:
    """Half the rows survive: against PyTorch's gather by an index that is ready."""
    for rows, width in ((256, 384), (256, 768)):
        cu_seqlens, live = plan(torch.randint(3, 60, (rows,)).tolist())
        x = torch.randn(int(live[1]), width)
        kept = torch.randperm(rows)[: rows // 2].sort().values
        new_cu_seqlens, new_live = plan(cu_seqlens.diff()[kept].tolist())
        index = torch.cat([torch.arange(int(cu_seqlens[row]), int(cu_seqlens[row + 1])) for row in kept.tolist()])
        survivors = kept.int()
        tokens = len(index)

        def ours(x=x, survivors=survivors, old=cu_seqlens, new=new_cu_seqlens, live=new_live, tokens=tokens) -> Tensor:
            out = x.new_empty(tokens, x.shape[1])
            native.compact([out], [], [x], [], survivors, old, new, live)
            return out

        equal = torch.equal(ours(), x[index])
        seconds, other = medians([ours, lambda x=x, index=index: x.index_select(0, index)], repeats)
        yield Row(
            "compact",
            f"{rows} rows, half survive, hidden {width}",
            seconds * 1e3,
            f"{2 * tokens * width * 4 / seconds / 1e9:.1f} GB/s",
            "index_select",
            ratio(other, seconds, equal),
            "",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    table = Table("op", "case", "ours ms", "rate", "against", "ratio", "target")
    rows: list[Row] = []
    for measure in (
        attention_in_a_layer,
        attention_at_one_length,
        linears,
        exit_steps,
        layer_norms,
        compactions,
    ):
        for row in measure(arguments.repeats):
            rows.append(row)
            shown = "differs" if row.ratio is None else f"{row.ratio:.2f}"
            table.add_row(row.op, row.case, f"{row.ours_ms:.3f}", row.rate, row.against, shown, row.target)
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)
    if arguments.json:
        write_result(arguments.json, {"environment": environment(), "rows": [asdict(row) for row in rows]})
    return 1 if any(row.ratio is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
