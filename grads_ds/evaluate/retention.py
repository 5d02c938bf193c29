"""How much of the base model is kept: how far it is measured, and the numbers of one model.

Pure: counts and per-row results in, sizes and summaries out. docs/forgetting.md has the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from grads_ds.evaluate.measured_sets import MeasuredSet
from grads_ds.statistics import Floats, Ints, bootstrap_interval

FEWEST = 4  # prompts that are answered whatever they cost: two of each half
# a multiply-add of these measures takes that much longer than one of the held-out losses: on an
# H200 they took 1.25 times their share in the median of 21 runs (docs/LOG.md)
SLOWER = 1.3
HEAD_PASSES = 2.5  # of one divergence, in products with the head: the base's, the model's, softmax


@dataclass(frozen=True)
class RetentionPlan:
    """prompts: how many the base model answers; share: of the held-out targets at which the
    divergence is taken; cost: the estimated work of both over that of the held-out losses.
    """

    prompts: int
    share: float
    cost: float


def plan_retention(
    sets: list[MeasuredSet],
    prompt_lengths: list[int],
    new_tokens: int,
    sizes: tuple[int, int],
    max_cost: float,
) -> RetentionPlan:
    """As much as `max_cost` pays for, half of it for own answers, the rest for the divergence.

    Work is counted in multiply-adds, a token through the body, a target through the head; those of
    these measures count as `SLOWER`.

    Args:
        sets: the held-out sets.
        prompt_lengths: tokens of the prompts that could be answered, in the order they are taken.
        new_tokens: longest answer.
        sizes: parameters of the body (without embeddings) and of the head.
        max_cost: allowed work over that of the held-out losses.
    """
    body, head = sizes
    tokens = sum(int(s.lengths.sum()) for s in sets)
    targets = sum(int(s.targets.sum()) for s in sets)
    work = float(tokens * body + targets * head) / SLOWER
    own, taken = 0.0, 0
    for length in prompt_lengths:
        # the loss on the answer, and its divergence
        one = (length + new_tokens) * body + new_tokens * (1 + HEAD_PASSES) * head
        if own + one > max_cost * work / 2 and taken >= FEWEST:
            break
        own, taken = own + one, taken + 1
    taken -= taken % 2  # the halves stay of one size
    left = max(0.0, max_cost * work - own)
    share = min(1.0, left / max(1.0, HEAD_PASSES * head * targets))
    return RetentionPlan(taken, share, (own + share * HEAD_PASSES * head * targets) / work)


def weighted_summary(
    values: Floats, weights: Ints, resamples: int, seed: int
) -> dict[str, Any] | None:
    """{value, ci95, weight} of the weighted mean, rows redrawn whole; None without weight."""
    total = int(weights.sum())
    if not total:
        return None
    interval = bootstrap_interval(values, resamples, seed, weights.astype(np.float64))
    return {
        "value": float((values * weights).sum() / total),
        "ci95": list(interval),
        "targets": total,
    }


def bits_per_byte(loss: Floats, targets: Ints, target_bytes: Ints) -> float | None:
    """sum of the targets' losses / (ln 2 * bytes of their text); None where there is no text."""
    count = int(target_bytes.sum())
    return float((loss * targets).sum() / math.log(2) / count) if count else None


def flips(base: np.ndarray, model: np.ndarray) -> dict[str, int]:
    """Questions answered rightly by the base model alone (lost: 1 -> 0) and by the other alone
    (won: 0 -> 1).
    """
    return {
        "lost": int(((base == 1) & (model == 0)).sum()),
        "won": int(((base == 0) & (model == 1)).sum()),
        "num_samples": len(base),
    }
