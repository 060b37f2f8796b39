"""The dtypes and kernels of packed linears that this processor can run."""

from __future__ import annotations

import pytest
import torch

from ragged_exit.ops import linears_available

PACKED_NATIVELY = [
    pytest.param(
        dtype, marks=pytest.mark.skipif(not linears_available(dtype), reason=f"no kernels for {dtype} linears")
    )
    for dtype in (torch.bfloat16, torch.float32)
]
PACKED_KERNELS = [pytest.param("reference", dtype) for dtype in (torch.bfloat16, torch.float32)] + [
    pytest.param("native", *param.values, marks=param.marks) for param in PACKED_NATIVELY
]
