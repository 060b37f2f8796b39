"""benchmarks/gpu_kernels.py needs a GPU to time anything; its cases and its comparison run anywhere."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

_SPEC = importlib.util.spec_from_file_location(
    "gpu_kernels", Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"
)
kernels = importlib.util.module_from_spec(_SPEC)
sys.modules["gpu_kernels"] = kernels
_SPEC.loader.exec_module(kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cases_agree_with_pytorch(dtype):
    for make in kernels.cases(dtype, "cpu", "reference", small=True):
        case = make()
        assert kernels.disagreement(case) == "", case.name
        assert case.bytes > 0


def test_a_wrong_result_is_noticed():
    for make in kernels.cases(torch.float32, "cpu", "reference", small=True):
        case = make()
        first, *rest = case.ours()
        assert kernels.disagreement(case._replace(ours=lambda first=first, rest=rest: (first + 1, *rest)))
        if case.threshold is not None:
            logits, score, exits, *plan = case.ours()
            flipped = (logits, score, ~exits, *plan)
            assert "exits" in kernels.disagreement(case._replace(ours=lambda flipped=flipped: flipped))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert kernels.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def as_on_a_gpu(monkeypatch) -> None:
    """The small cases, the reference for ours, and nothing that needs a GPU: the times mean nothing."""
    made = kernels.cases(torch.float32, "cpu", "reference", small=True)
    monkeypatch.setattr(kernels, "cases", lambda *args: made)
    monkeypatch.setattr(kernels, "device_peaks", lambda dtype: {"copy_gb_s": 1.0, "matmul_tflop_s": 1.0})
    monkeypatch.setattr(kernels, "captured", lambda call: call() and call)
    for name, found in {"is_available": True, "synchronize": None, "get_device_name": "none"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)


def test_what_fails_costs_nothing_else(tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("does not compile")

    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: broken)
    monkeypatch.setattr(kernels, "exit_decide", broken)  # raises while its case, and compact's, is made
    monkeypatch.setattr(kernels, "add_layer_norm", broken)  # raises while it is compared
    assert kernels.main(["--repeats", "1", "--json", str(tmp_path / "new" / "r.json")]) == 1
    found = {
        row["name"].split("_case")[0].split()[0]: row
        for row in json.loads((tmp_path / "new" / "r.json").read_text())["ops"]
    }
    failed = {name for name, row in found.items() if "error" in row}
    assert failed == {"exit_decide", "compact", "add_layer_norm"}
    for name in found.keys() - failed:
        assert found[name]["errors"] == {"compiled": "RuntimeError: does not compile"}
        assert set(found[name]["speedup"]) == {"replay_vs_eager", "call_vs_eager"}
    said = capsys.readouterr().out
    assert "RuntimeError: does not compile" in said and said.index("exit_step B=5") < said.index("exit_decide_case(5,")


def test_what_is_known_is_on_disk_when_a_run_is_cut(tmp_path, monkeypatch):
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    measure, seen = kernels.measure, []

    def cut(case, *rest):
        seen.append(case.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return measure(case, *rest)

    monkeypatch.setattr(kernels, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        kernels.main(["--repeats", "1", "--json", str(tmp_path / "r.json")])
    rows = json.loads((tmp_path / "r.json").read_text())["ops"]
    assert [row["name"] for row in rows] == seen[:2] and all("speedup" in row for row in rows)
