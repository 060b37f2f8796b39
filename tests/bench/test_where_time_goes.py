"""The profile names operations as the profiler does: one that is renamed must not become "everything else"."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny import one_thread  # noqa: F401  (autouse)

from ragged_exit.bench.synthetic import random_workload
from ragged_exit.cli import DType
from ragged_exit.linears import prepacking_available


@pytest.mark.skipif(not prepacking_available(), reason="this torch has no prepacked linears: the profile counts those")
def test_every_operation_is_found(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "where_time_goes.py"
    spec = importlib.util.spec_from_file_location("where_time_goes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("ragged_exit::")}
    counted = {name for names in module.OPS.values() for name in names}
    # for other heads than the profile's, and a whole layer, which tells itself what it spent on what
    assert ours - counted == {"ragged_exit::exit_decide", "ragged_exit::packed_layer"}
    module.main("sst2", "tiny", DType.fp32, False, 64, 256, 1, tmp_path / "p.json")
    found = json.loads((tmp_path / "p.json").read_text())
    assert set(found["seconds"]) == {*module.OPS, "everything else"}
    assert [found[name] for name in ("shape", "dtype", "profile", "exits")] == ["tiny", "fp32", "sst2", "uniform"]
    assert found["workload"]["tokens"] == sum(random_workload(64, module.WARM_UP).lengths)
    assert 1 < found["workload"]["mean_exit_layer"] < 2
    assert min(found["seconds"].values()) > 0  # the rest too: nothing is counted twice
