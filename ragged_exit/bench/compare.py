"""One comparison from end to end: reference, contenders, timing, derived figures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch

from ragged_exit.accelerate import accelerate
from ragged_exit.bench.check import references
from ragged_exit.bench.contenders import Contender, contenders
from ragged_exit.bench.measure import measure
from ragged_exit.bench.report import Report, workload_facts
from ragged_exit.bench.roofline import linear_seconds
from ragged_exit.bench.workload import Workload
from ragged_exit.calibration.threshold import Point
from ragged_exit.models.deebert import DeeBert
from ragged_exit.rules import ExitRule

REFERENCE_ROWS = 512


def compare(
    title: str,
    model: DeeBert,
    rule: ExitRule,
    check_on: Workload,
    draw: Callable[[int], Workload],
    *,
    batch_size: int,
    dtype: torch.dtype,
    repeats: int,
    say: Callable[[str], None],
    curve: Sequence[Point] = (),
    chosen: Point | None = None,
    peers: Sequence[Contender] = (),
    missing: Mapping[str, str] | None = None,
) -> Report:
    """Compare every contender's answers with the reference, then time them on ``draw(0)``, ``draw(1)``, ...

    The reference runs the first ``REFERENCE_ROWS`` rows of ``check_on`` one at a time; accuracy is of all its rows.
    What was timed is what the work fraction and the roofline count. model is the fp32 reference; contenders compute in
    ``dtype``. ``draw`` gives equally many rows each time, the same for the same number. peers:
    more contenders; missing: those that could not be had, and why.
    """
    say("the reference model, row by row")
    lower = None if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    expected = references(model, rule, check_on.select(range(REFERENCE_ROWS)), lower)
    contestant = lower or model
    measured = measure(
        [*contenders(contestant, accelerate(model, rule=rule, dtype=dtype), batch_size=batch_size), *peers],
        check_on,
        expected,
        draw,
        repeats=repeats,
        dtype=dtype,
        config=model.config,
        on_step=say,
    )
    ragged = next(item for item in measured if item.contender.name == "ragged")
    timed = [draw(repeat) for repeat in range(repeats)]
    facts = workload_facts(timed, ragged.exit_layers, model)
    linears = linear_seconds(model.config, dtype)
    return Report(
        title=f"{title}, {str(dtype).removeprefix('torch.')}",
        measured=measured,
        workload=facts | {"threshold": rule.to_dict()["threshold"]},
        linear_seconds=[
            linears * rows.token_layers(layers) for rows, layers in zip(timed, ragged.exit_layers, strict=True)
        ],
        curve=curve,
        chosen=chosen,
        peers=[peer.name for peer in peers],
        missing=missing or {},
    )
