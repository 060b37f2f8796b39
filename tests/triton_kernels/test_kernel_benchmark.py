"""benchmarks/kernels.py needs a GPU to time anything; its cases and its comparison run anywhere."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

_SPEC = importlib.util.spec_from_file_location("kernels", Path(__file__).parents[2] / "benchmarks" / "kernels.py")
kernels = importlib.util.module_from_spec(_SPEC)
sys.modules["kernels"] = kernels
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
