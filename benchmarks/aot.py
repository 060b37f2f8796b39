"""Compile every Triton kernel as it ships for sm_80 and sm_90, on any machine, and record what it takes of a GPU.

    python benchmarks/aot.py             compile, print the table
    python benchmarks/aot.py --check     ... and fail on a spill or a difference from the committed table
    python benchmarks/aot.py --update    ... and rewrite this triton version's part of it
    python benchmarks/aot.py --smoke     only the cases that CI runs, for sm_90
    make aot                             --check under the oldest, the pinned and the newest supported triton
    make aot AOT=--update                --update under all three

The launchers run on CPU tensors with the launch itself replaced, so what is compiled is what they would launch:
the same tile sizes, constants and argument specialisations. Registers, stack and local memory come from the
``cuobjdump`` of the triton wheel, shared memory from the compiler.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ragged_exit.heads import MlpHead
from ragged_exit.ops import triton as kernels
from ragged_exit.ops.triton import config
from ragged_exit.rules import ScoreSpec

TABLE = Path(__file__).parent / "results" / "aot_resources.json"
TARGETS = {"sm_80": 80, "sm_90": 90}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


class Launch(NamedTuple):
    """One kernel launch as the compiler sees it."""

    kernel: JITFunction
    signature: dict[str, object]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, object]

    def compile(self, capability: int) -> triton.compiler.CompiledKernel:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def as_launch(kernel: JITFunction, args: tuple, kwargs: dict) -> Launch:
    """What triton's own launcher would make of these arguments."""
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    launch = Launch(kernel, {}, {}, {}, options)

    def type_of(place: tuple[int, ...], value: object, constant: bool, special: bool) -> object:
        if isinstance(value, tuple) and not constant:
            return type(value)(*(type_of((*place, i), item, False, special) for i, item in enumerate(value)))
        if constant or value is None or (special and type(value) is int and value == 1):
            launch.constants[place] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            kind, aligned = _POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            kind, aligned = "fp32", False
        else:
            kind, aligned = "i32", value % 16 == 0
        if special and aligned:
            launch.attributes[place] = [["tt.divisibility", 16]]
        return kind

    for place, parameter in enumerate(kernel.params):
        special = not parameter.do_not_specialize
        launch.signature[parameter.name] = type_of((place,), values[parameter.name], parameter.is_constexpr, special)
    return launch


@contextmanager
def recorded(gpu: str) -> Iterator[list[Launch]]:
    """Collect the launches of the block, with the tile sizes of ``gpu``, instead of running them."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        launches.append(as_launch(kernel, args, kwargs))

    run, gpu_name = JITFunction.run, config.gpu_name
    JITFunction.run, config.gpu_name = record, lambda device: gpu
    try:
        yield launches
    finally:
        JITFunction.run, config.gpu_name = run, gpu_name


def exit_case(
    classes: int, score: str = "entropy_exact", size: int = 768, pooling: str = "cls", pooler: bool = True
) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        def new(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype)

        head = MlpHead(
            classifier_weight=new(classes, size),
            classifier_bias=new(classes),
            pooler_weight=new(size, size) if pooler else None,
            pooler_bias=new(size) if pooler else None,
            uncertainty_weight=new(size),
            uncertainty_bias=new(1),
            prototype_weight=new(size, size),
            prototype_bias=new(size),
            prototypes=new(classes, size),
            pooling=pooling,
        ).weights
        cu_seqlens, live, counter, previous = _rows(score)
        spec = ScoreSpec(score, "<", 0.1)
        return kernels.exit_step(
            new(32, size), None, cu_seqlens, live, head, counter, previous, torch.ones(1), spec, False
        )

    return call


def decide_case(classes: int, score: str) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        cu_seqlens, live, counter, previous = _rows(score)
        signal = torch.zeros(4, classes) if score == "distance_entropy" else torch.zeros(4)
        spec = ScoreSpec(score, "<", 0.1)
        logits = torch.zeros(4, classes, dtype=dtype)
        return kernels.exit_decide(logits, signal, cu_seqlens, live, counter, previous, torch.ones(4), spec, False)

    return call


def _rows(score: str) -> tuple[torch.Tensor, ...]:
    """cu_seqlens, live and, for the patience scores, counter and previous of four rows."""
    counts = score.endswith("patience")
    state = (torch.zeros(4, dtype=torch.int32), torch.zeros(4)) if counts else (None, None)
    return torch.arange(5, dtype=torch.int32) * 8, torch.tensor([4, 32], dtype=torch.int32), *state


def compact_case(dtype: torch.dtype) -> object:
    cu_seqlens, live, counter, previous = _rows("patience")
    tokens = [torch.zeros(32, 768, dtype=dtype), torch.zeros(32, dtype=torch.int64)]
    rows = [counter, previous]
    new_tokens, new_rows = ([torch.empty_like(value) for value in values] for values in (tokens, rows))
    return kernels.compact(new_tokens, new_rows, tokens, rows, counter, cu_seqlens, cu_seqlens, live)


def attention_case(head_size: int) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        q, k, v = torch.zeros(32, 3, 12, head_size, dtype=dtype).unbind(1)
        return kernels.varlen_attention(q, k, v, _rows("")[0], 8, head_size**-0.5)

    return call


def layer_norm_case(size: int, kind: str = "standard") -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        x, weight = torch.zeros(32, size, dtype=dtype), torch.zeros(size, dtype=dtype)
        return kernels.add_layer_norm(x, x, weight, weight, 1e-12, kind)

    return call


def embed_case(dtype: torch.dtype) -> object:
    ids, table, weight = torch.zeros(32, dtype=torch.int64), torch.zeros(512, 768, dtype=dtype), torch.zeros(768)
    weight = weight.to(dtype)
    out = torch.empty(32, 768, dtype=dtype)
    return kernels.embed_layer_norm(out, ids, ids, ids, table, table, table, weight, weight, 1e-12, "standard")


SMOKE = {
    "exit_step C=2": exit_case(2),
    "exit_step C=1024": exit_case(1024),
    "exit_step C=5000": exit_case(5000),
    "attention D=64": attention_case(64),
    "compact": compact_case,
    "add_layer_norm H=768": layer_norm_case(768),
    "embed_layer_norm": embed_case,
}
CASES = SMOKE | {
    "exit_step C=2 H=384": exit_case(2, size=384),
    "exit_step C=2 mean": exit_case(2, pooling="mean"),
    "exit_step C=2 no pooler": exit_case(2, pooler=False),
    "exit_step C=2 castorini": exit_case(2, "entropy_castorini"),
    "exit_step C=2 uncertainty": exit_case(2, "uncertainty"),
    "exit_step C=2 patience": exit_case(2, "patience"),
    "exit_step C=2 distance": exit_case(2, "distance_entropy"),
    "exit_step C=1024 distance": exit_case(1024, "distance_entropy"),
    "exit_step C=5000 distance": exit_case(5000, "distance_entropy"),
    "exit_decide C=2": decide_case(2, "confident_patience"),
    "exit_decide C=5000": decide_case(5000, "distance_entropy"),
    "attention D=8": attention_case(8),
    "attention D=32": attention_case(32),
    "attention D=128": attention_case(128),
    "attention D=256": attention_case(256),
    "add_layer_norm H=384": layer_norm_case(384, "uer"),
    "add_layer_norm H=4096": layer_norm_case(4096),
    "add_layer_norm H=16384": layer_norm_case(16384),
}


def resources(kernel: triton.compiler.CompiledKernel) -> dict[str, int]:
    """Registers, stack and local bytes a thread, shared bytes a program of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [str(tool), "--dump-resource-usage", cubin.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found | {"SHARED": kernel.metadata.shared}


def measure(cases: dict[str, Callable], targets: dict[str, int]) -> dict[str, dict[str, int]]:
    """ "case / kernel / dtype / target" -> its resources; a GPU with tile sizes of its own comes in front."""
    gpus = sorted({gpu for table in config.tables().values() for gpu in table})
    found = {}
    for gpu in gpus:
        for name, call in cases.items():
            for dtype_name, dtype in DTYPES.items():
                with recorded(gpu) as launches:
                    call(dtype)
                for number, launch in enumerate(launches, 1):
                    kernel = f"{number} {launch.kernel.__name__.removesuffix('_kernel')}"
                    for target, capability in targets.items():
                        prefix = "" if gpu == "default" else f"{gpu}: "
                        key = prefix + " / ".join((name, kernel, dtype_name, target))
                        found[key] = resources(launch.compile(capability))
    return found


def spills(found: dict[str, dict[str, int]]) -> list[str]:
    """The kernels that use stack or local memory: none may."""
    return [
        f"{key}: stack {row['STACK']}, local {row['LOCAL']} bytes"
        for key, row in found.items()
        if row["STACK"] > 0 or row["LOCAL"] > 0
    ]


def differences(found: dict[str, dict[str, int]], committed: dict[str, dict[str, int]], whole: bool) -> list[str]:
    """Where ``found`` and the ``committed`` table part; ``whole`` when nothing may be missing from ``found``."""
    changed = [
        f"{key}: {committed.get(key, 'absent')} -> {row}" for key, row in found.items() if committed.get(key) != row
    ]
    return changed + [f"{key}: no longer compiled" for key in committed if whole and key not in found]


def as_json(tables: dict[str, dict[str, dict[str, int]]]) -> str:
    """The tables of all triton versions, a kernel a line, so that a change shows as the lines it touches."""
    parts = []
    for version in sorted(tables):
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in tables[version].items())
        parts.append(f" {json.dumps(version)}: {{\n{rows}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def show(found: dict[str, dict[str, int]]) -> None:
    table = Table(title=f"triton {triton.__version__}: resources of the kernels as shipped")
    for heading in ("case", "launch", "dtype", "target"):
        table.add_column(heading)
    for heading in ("registers", "stack", "local", "shared"):
        table.add_column(heading, justify="right")
    for key, row in found.items():
        table.add_row(*key.split(" / "), *map(str, row.values()))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="fail on a difference from the committed table")
    mode.add_argument("--update", action="store_true", help="rewrite the table of this triton version")
    parser.add_argument("--smoke", action="store_true", help="only the cases that CI runs, for sm_90")
    parser.add_argument("--triton", metavar="VERSION", help="fail unless this is the triton that runs")
    options = parser.parse_args(arguments)
    if options.triton not in (None, triton.__version__):
        parser.error(
            f"--triton {options.triton} was asked for, and {triton.__version__} is imported ({triton.__file__})"
        )
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 is set: the interpreter does not compile")
    if options.update and options.smoke:
        parser.error("--update writes the whole table, which --smoke does not compile")
    found = measure(SMOKE, {"sm_90": 90}) if options.smoke else measure(CASES, TARGETS)
    show(found)
    problems = spills(found)
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if options.update:
        TABLE.write_text(as_json(tables | {triton.__version__: found}))
    elif options.check:
        if triton.__version__ in tables:
            changed = differences(found, tables[triton.__version__], whole=not options.smoke)
        else:
            changed = [f"{TABLE.name} has no table for triton {triton.__version__}, only for {', '.join(tables)}"]
        if changed:
            changed.append(f"if this is meant: make aot AOT=--update, and commit {TABLE.name} with the change")
        problems += changed
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
