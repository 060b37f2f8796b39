"""Every op once, at sizes that divide by nothing: for compute-sanitizer. ``python tests/every_op.py [device]``"""

from __future__ import annotations

import sys

import torch

from ragged_exit.ops import add_layer_norm, compact, embed_layer_norm, exit_decide, exit_step, varlen_attention
from ragged_exit.rules import DistanceEntropy, Entropy, ExitRule, LearnedUncertainty, Patience
from ragged_exit.testing import assert_plan, qkv_views, random_batch, random_head, random_state, seeded

RULES: tuple[ExitRule, ...] = (Entropy(0.9), LearnedUncertainty(0.5), Patience(2), DistanceEntropy(0.5))
LENGTHS = [3, 1, 7, 19, 2]


def exits(dtype: torch.dtype, device: str, rule: ExitRule, classes: int, pooling: str) -> None:
    generator = seeded(classes)
    batch = random_batch(
        LENGTHS, 37, generator, dtype=dtype, device=device, spare_rows=2, spare_tokens=5, token_ids=True
    )
    batch.state = random_state(rule, batch.row_capacity, classes, generator, device=device)
    head = random_head(
        37, classes, generator, pooling=pooling, pooled_size=33, uncertainty=True, prototype_size=17,
        dtype=dtype, device=device,
    )  # fmt: skip
    decision = exit_step(batch, head, rule, impl="triton")
    assert_plan(batch, decision)
    if int(decision.live[0]):
        compact(batch, decision, int(decision.live[1]) + 3, impl="triton")
    if not rule.needs:
        assert_plan(batch, exit_decide(batch, decision.logits.to(dtype), rule, impl="triton"))


def layers(dtype: torch.dtype, device: str) -> None:
    generator = seeded(0)
    tokens = sum(LENGTHS)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    for head_size in (13, 64):
        for layout in ("fused", "misaligned"):
            q, k, v = qkv_views(tokens + 5, 3, head_size, generator, dtype=dtype, device=device, layout=layout)
            assert varlen_attention(q, k, v, bounds, max(LENGTHS), 0.2, impl="triton").isfinite().all()
    x, residual, table = torch.randn(3, tokens, 45, generator=generator).to(dtype).to(device)
    weight, bias = torch.randn(2, 45, generator=generator).to(dtype).to(device)
    for kind in ("standard", "uer"):
        assert add_layer_norm(x, residual, weight, bias, 1e-6, kind, impl="triton").isfinite().all()
    ids = torch.randint(0, tokens, (9,), generator=generator).to(device)
    assert embed_layer_norm(ids, ids, ids, x, residual, table, weight, bias, 1e-6, impl="triton").isfinite().all()


def main(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layers(dtype, device)
        for rule in RULES:
            exits(dtype, device, rule, 3, "cls")
        exits(dtype, device, DistanceEntropy(0.5), 1030, "mean")  # three launches
    print("every op ran")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
