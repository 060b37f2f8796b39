"""Exit scores of a tile of rows: every score of ``rules.SCORES``, as the reference defines it.

All of them stream over class tiles in a fixed order, reading the logits from memory once a pass; up to 1,024 classes
that is one tile. Rows that are not alive count as rows of zeros, as in the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, rows, alive, cols, C: tl.constexpr, fill: tl.constexpr):
    """fp32 ``[BLOCK_R, BLOCK_C]`` of ``[rows, C]``: zero where the row is not alive, ``fill`` past the last class."""
    inside = (cols < C)[None, :]
    tile = tl.load(ptr + rows[:, None] * C + cols[None, :], mask=alive[:, None] & inside, other=0.0)
    return tl.where(inside, tile.to(tl.float32), fill)


@triton.jit
def two_largest(ptr, rows, alive, sign: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The largest ``sign * value`` of each row, its class, the second, its class, and whether the row holds a NaN.

    Ties go to the lower class. NaNs rank below everything.
    """
    first = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    second = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    first_at = tl.zeros((BLOCK_R,), tl.int32)
    second_at = tl.zeros((BLOCK_R,), tl.int32)
    broken = tl.zeros((BLOCK_R,), tl.int32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        value = sign * load_tile(ptr, rows, alive, cols, C, sign * float("-inf"))  # [BLOCK_R, BLOCK_C]
        broken |= tl.max((value != value).to(tl.int32), 1)
        value = tl.where(value == value, value, float("-inf"))
        high = tl.max(value, 1)
        high_at = tl.min(tl.where(value == high[:, None], cols[None, :], C), 1)
        value = tl.where(cols[None, :] == high_at[:, None], float("-inf"), value)
        low = tl.max(value, 1)
        low_at = tl.min(tl.where(value == low[:, None], cols[None, :], C), 1)
        # earlier tiles hold lower classes, so what is there stays unless it is strictly beaten
        wins = high > first
        runner_up, runner_up_at = tl.where(wins, first, second), tl.where(wins, first_at, second_at)
        rival, rival_at = tl.where(wins, low, high), tl.where(wins, low_at, high_at)
        second = tl.where(rival > runner_up, rival, runner_up)
        second_at = tl.where(rival > runner_up, rival_at, runner_up_at)
        first = tl.where(wins, high, first)
        first_at = tl.where(wins, high_at, first_at)
    return first, first_at, second, second_at, broken != 0


@triton.jit
def exp_sum(ptr, rows, alive, shift, temperature, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """sum exp((z - shift) / temperature) of each row."""
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        z = load_tile(ptr, rows, alive, cols, C, float("-inf"))
        weight = tl.exp((z - shift[:, None]) / temperature)
        total += tl.sum(tl.where((cols < C)[None, :], weight, 0.0), 1)
    return total


@triton.jit
def entropy(
    ptr,
    rows,
    alive,
    top,  # [BLOCK_R] largest logit
    log_classes,
    DIALECT: tl.constexpr,  # "entropy_" and its name
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Entropy of softmax in one of the dialects of ``rules.Entropy``; NaN where the dialect's formula is NaN."""
    shift = tl.zeros_like(top) if DIALECT == "entropy_hf" else top
    total = tl.zeros((BLOCK_R,), tl.float32)
    moment = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        inside = (cols < C)[None, :]
        d = load_tile(ptr, rows, alive, cols, C, float("-inf")) - shift[:, None]
        weight = tl.where(inside, tl.exp(d), 0.0)
        counts = inside if DIALECT == "entropy_hf" else weight > 0  # 0 ln 0 = 0, except to the letter in hf
        total += tl.sum(weight, 1)
        moment += tl.sum(tl.where(counts, weight * d, 0.0), 1)
    result = tl.log(total) - moment / total
    if DIALECT == "entropy_exact" or DIALECT == "entropy_normalised":
        result = tl.where(result < 0, 0.0, result)  # keeps NaN, as maximum would not
    if DIALECT == "entropy_castorini" or DIALECT == "entropy_categorical":
        result = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, C, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)
            z = load_tile(ptr, rows, alive, cols, C, float("-inf"))
            p = tl.exp(z - top[:, None]) / total[:, None]
            base = p
            if DIALECT == "entropy_categorical":
                eps: tl.constexpr = 2.0**-23
                base = tl.where(p < eps, eps, tl.where(p > 1 - eps, 1 - eps, p))
            result -= tl.sum(tl.where((cols < C)[None, :], p * tl.log(base), 0.0), 1)
    if DIALECT == "entropy_categorical" or DIALECT == "entropy_normalised":
        result /= log_classes  # one class: 0 / 0 = NaN
    return result


@triton.jit
def distance_ratio(
    distance_ptr,
    rows,
    alive,
    first_at,
    second_at,
    DR_ORDER: tl.constexpr,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """DE3-BERT's DR of the distances to the two likeliest classes, or of the two smallest."""
    if DR_ORDER == "prob":
        near = tl.load(distance_ptr + rows * C + first_at, mask=alive, other=0.0).to(tl.float32)
        far = tl.load(distance_ptr + rows * C + second_at, mask=alive, other=0.0).to(tl.float32)
    else:
        near, _, far, _, _ = two_largest(distance_ptr, rows, alive, -1, C, BLOCK_R, BLOCK_C)
        near, far = -near, -far
    largest = tl.where(near > far, near, far)
    both_zero = (near == 0) & (far == 0)
    return tl.where(both_zero, 0.5, (1 + (near - far) / tl.where(both_zero, 1.0, largest)) / 2)


@triton.jit
def decide_rows(
    logits_ptr,  # [rows, C]
    signal_ptr,  # f32 [rows] uncertainty or [rows, C] distances, where the score needs one
    rule,  # RuleArguments
    out,  # ExitTensors
    rows,  # [BLOCK_R] int64
    within,  # [BLOCK_R] rows that exist
    alive,  # [BLOCK_R] rows that count
    SCORE: tl.constexpr,
    COMPARE: tl.constexpr,
    DR_ORDER: tl.constexpr,
    PER_ROW: tl.constexpr,
    FINAL: tl.constexpr,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Score, comparison and row state of a tile of rows, from their logits in memory."""
    top, top_at, _, second_at, broken = two_largest(logits_ptr, rows, alive, 1, C, BLOCK_R, BLOCK_C)
    top = tl.where(broken, float("nan"), top)
    if SCORE == "patience" or SCORE == "confident_patience":
        counter = tl.load(rule.counter + rows, mask=within, other=0)
        previous = tl.load(rule.previous + rows, mask=within, other=0.0)
        if SCORE == "confident_patience":
            current = previous
            spread = entropy(logits_ptr, rows, alive, top, rule.log_classes, "entropy_categorical", C, BLOCK_R, BLOCK_C)
            agrees = spread < rule.tolerance
        elif C == 1:
            current = top
            agrees = tl.abs(previous - current) < rule.tolerance
        else:
            current = top_at.to(tl.float32)
            agrees = current == previous
        counter = tl.where(agrees & ~broken, counter + 1, 0)
        tl.store(out.counter + rows, counter, mask=within)
        tl.store(out.previous + rows, tl.where(broken, float("nan"), current), mask=within)
        score = counter.to(tl.float32)
    elif SCORE == "max_prob":
        score = 1 / exp_sum(logits_ptr, rows, alive, top, rule.temperature, C, BLOCK_R, BLOCK_C)
    elif SCORE == "energy":
        total = exp_sum(logits_ptr, rows, alive, tl.zeros_like(top), rule.temperature, C, BLOCK_R, BLOCK_C)
        score = 1 / (1 + tl.exp(rule.temperature * tl.log(total)))
    elif SCORE == "uncertainty":
        score = tl.load(signal_ptr + rows, mask=alive, other=0.0).to(tl.float32)
    elif SCORE == "distance_entropy":
        spread = entropy(logits_ptr, rows, alive, top, rule.log_classes, "entropy_normalised", C, BLOCK_R, BLOCK_C)
        ratio = distance_ratio(signal_ptr, rows, alive, top_at, second_at, DR_ORDER, C, BLOCK_R, BLOCK_C)
        weight = rule.lam * spread + ratio
        score = tl.where(weight == 0, 0.0, (rule.lam + 1) * ratio * spread / weight)
    else:
        score = entropy(logits_ptr, rows, alive, top, rule.log_classes, SCORE, C, BLOCK_R, BLOCK_C)
    score = tl.where(alive, score, 0.0)
    tl.store(out.score + rows, score, mask=within)
    if FINAL:
        leaves = alive
    else:
        threshold = tl.load(rule.threshold + rows, mask=within, other=0.0) if PER_ROW else tl.load(rule.threshold)
        # False for NaN in every comparison: a NaN never leaves early
        if COMPARE == "<":
            leaves = alive & (score < threshold)
        elif COMPARE == "<=":
            leaves = alive & (score <= threshold)
        elif COMPARE == ">":
            leaves = alive & (score > threshold)
        else:
            leaves = alive & (score >= threshold)
    tl.store(out.exits + rows, leaves.to(tl.uint8), mask=within)
