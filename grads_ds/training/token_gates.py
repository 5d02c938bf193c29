"""Token gates of `sft.token_gate`: how much each target token counts in the training, by what the
base model says of it.

Pure functions over numpy arrays; docs/token_gates.md has the sources. With l_t = -log p(y_t) of the
base model and H_t the entropy of its K likeliest tokens, renormalised (nats), a target counts
    stm    1 where exp(l_t) <= 2.5, else 0
    eaft   H_t / log K, K = 20
    flow   exp(-mean_s(l_s) / tau): one number for all targets of a sample; tau is the median of the
           training samples' means
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

STM_PERPLEXITY = 2.5
EAFT_TOKENS = 20


@dataclass(frozen=True)
class BaseTokens:
    """What the base model says of the target tokens of N samples, laid end to end.

    losses: float32 [M]. entropies: float32 [M]; none for a gate that reads losses alone. starts:
    int64 [N + 1], where each sample's targets begin.
    """

    losses: np.ndarray
    entropies: np.ndarray | None
    starts: np.ndarray


def _stm(base: BaseTokens) -> np.ndarray:
    return (base.losses.astype(np.float64) <= math.log(STM_PERPLEXITY)).astype(np.float64)


def _eaft(base: BaseTokens) -> np.ndarray:
    assert base.entropies is not None
    return np.clip(base.entropies.astype(np.float64) / math.log(EAFT_TOKENS), 0.0, 1.0)


def _flow(base: BaseTokens) -> np.ndarray:
    counts = np.diff(base.starts)
    sums = np.add.reduceat(np.append(base.losses.astype(np.float64), 0.0), base.starts[:-1])
    means = np.where(counts > 0, sums, 0.0) / np.maximum(counts, 1)
    taught = means[counts > 0]
    tau = max(float(np.median(taught)) if len(taught) else 0.0, np.finfo(np.float64).tiny)
    return np.repeat(np.exp(-means / tau), counts)


GATES: dict[str, Callable[[BaseTokens], np.ndarray]] = {"stm": _stm, "eaft": _eaft, "flow": _flow}


@dataclass(frozen=True)
class GateCounts:
    """What a gate did to the training rows: `shut` of `targets` target tokens count nothing,
    `emptied` of `rows` rows have no target left that counts; `mean` weight of a target.
    """

    gate: str
    rows: int
    emptied: int
    targets: int
    shut: int
    mean: float

    def __str__(self) -> str:
        return (
            f"token gate {self.gate}: {self.shut:,} of {self.targets:,} target tokens count nothing"
            f" ({self.shut / max(1, self.targets):.1%}), a target counts {self.mean:.3f} in the"
            f" mean; {self.emptied:,} of {self.rows:,} rows have no target left that counts"
        )


def open_gates(gate: str, base: BaseTokens) -> tuple[np.ndarray, GateCounts]:
    """(how much each target counts, float64 [M]; the counts)."""
    values = GATES[gate](base)
    rows = len(base.starts) - 1
    opened = np.add.reduceat(np.append(values > 0, False).astype(np.int64), base.starts[:-1])
    emptied = int(((opened == 0) & (np.diff(base.starts) > 0)).sum()) if rows else 0
    shut, mean = int((values == 0).sum()), float(values.mean()) if len(values) else 0.0
    return values, GateCounts(gate, rows, emptied, len(values), shut, mean)
