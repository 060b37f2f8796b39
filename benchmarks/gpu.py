"""The whole encoder on a GPU: padded Hugging Face, torch.compile, ours at full depth, with exits, with CUDA graphs.

python benchmarks/gpu.py [--profile sst2|mrpc|long|uniform] [--shape base|small|tiny] [--dtype fp16|bf16|fp32]
                         [--rows N] [--repeats N] [--no-compile] [--device cuda] [--json F]

The encoder is random, its heads are fitted to two topics of random words, the same number of rows leaves at every
layer. Decisions are compared first, with the fp32 model on the CPU, one row at a time; a contender that differs gets no
speed-up. Every time ends with the answers in host memory. The JSON is written anew after every check and every repeat.
A contender that raises is recorded as an error, and the others go on.
"""

from __future__ import annotations

import copy
import functools
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ragged_exit.accelerate import accelerate
from ragged_exit.bench.check import Measured, references
from ragged_exit.bench.contenders import Contender
from ragged_exit.bench.gpu import CardReport, card_contenders, matrix_rate
from ragged_exit.bench.measure import measure
from ragged_exit.bench.options import Profile, Shape
from ragged_exit.bench.report import workload_facts
from ragged_exit.bench.synthetic import fit_heads, random_deebert, random_workload, uniform_rule
from ragged_exit.bench.workload import Workload

SEED = 20
ROWS = {"sst2": 16_384, "mrpc": 8_192, "long": 2_048, "uniform": 4_096}  # a repeat
CHECKED_ROWS = 512  # a single one must not be 0.3 points of accuracy


class DType(StrEnum):
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


DTYPES = {DType.fp16: torch.float16, DType.bf16: torch.bfloat16, DType.fp32: torch.float32}


def main(
    profile: Profile = "sst2",
    shape: Shape = "base",
    dtype: DType = DType.fp16,
    rows: Annotated[int | None, typer.Option(min=1, help="sequences a repeat (default: by profile)")] = None,
    repeats: int = 5,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="measure torch.compile too")] = True,
    device: Annotated[str, typer.Option(help="cpu: to try the benchmark itself, without graphs")] = "cuda",
    json: Path | None = None,
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        console.print("benchmarks/gpu.py: this machine has no CUDA device, and a GPU's times are taken on nothing else")
        raise typer.Exit(2)
    rows = ROWS[profile] if rows is None else rows
    precision = DTYPES[dtype]
    model = random_deebert(shape, SEED)
    fit_heads(model, SEED + 100, profile)
    rule = uniform_rule(model, SEED, profile)
    check_on = random_workload(CHECKED_ROWS, SEED + 1, profile)
    on_card = copy.deepcopy(model).to(place, precision)

    failed: list[dict[str, Any]] = []

    @functools.cache  # every contender asks for the same
    def draw(number: int) -> Workload:
        return random_workload(rows, 1000 + number, profile)

    def say(line: str) -> None:
        console.print(line, style="dim", soft_wrap=True)

    say("the reference model, row by row")
    expected = references(model, rule, check_on, on_card)
    rate = matrix_rate(place, precision, 8192 if place.type == "cuda" else 512)

    def report(measured: list[Measured]) -> CardReport:
        facts: dict[str, Any] = {"sequences": rows}
        leaves = next((item for item in measured if item.contender.exits and item.seconds), None)
        if leaves is not None:
            timed = [draw(repeat) for repeat in range(len(leaves.seconds))]
            facts = workload_facts(timed, leaves.exit_layers, model)
        return CardReport(
            title=f"BERT {shape}, random encoder, {profile} lengths, {dtype}, {place}",
            measured=measured,
            workload=facts | {"threshold": rule.to_dict()["threshold"]},
            rate=rate,
            close=expected.close,
            failed=failed,
        )

    def known(measured: list[Measured]) -> None:
        say(report(measured).progress())
        if json is not None:
            report(measured).write_json(json)

    def give_up(contender: Contender, error: Exception, seconds: list[float]) -> None:
        said = f"{type(error).__name__}: {error}"[:2000]
        failed.append({"name": contender.name, "error": said, "seconds_of_repeats": seconds})
        console.print(f"{contender.name}: {said}", style="red", markup=False, soft_wrap=True)

    measured = measure(
        card_contenders(on_card, accelerate(model, rule=rule, dtype=precision, device=place), compiled=compiled),
        check_on,
        expected,
        draw,
        repeats=repeats,
        dtype=precision,
        config=model.config,
        on_step=say,
        on_known=known,
        on_error=give_up,
    )
    report(measured).print(console)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
