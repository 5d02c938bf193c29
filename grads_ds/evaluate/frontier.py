"""Random's own line of gain and forgetting, and how every other model lies to it. Pure.

The line goes through the base model (no gain, nothing forgotten), the random subsets and the whole
pool, straight between neighbours in gain. A model's excess is its forgetting less the line's at the
same gain: below zero it forgets less than random rows that teach as much. Its interval redraws the
domain rows and the forgetting rows, the same for all models, and reads the line anew each time: it
holds the line's own uncertainty, not that of another training with another seed. Where the model
learns more than every random subset there is no line, and no excess.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grads_ds.evaluate.candidates import Candidate
from grads_ds.statistics import Floats

DEFINED = 0.9  # of the redraws that must find a line for an interval to be given


@dataclass(frozen=True)
class Excess:
    """Forgetting less random's at the same gain (None: beyond random's reach), and its 95 %
    interval.
    """

    value: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Frontier:
    """line: (name, gain, forgetting) by gain, the base model first by name; excess: of every
    other model.
    """

    line: list[tuple[str, float, float]]
    excess: dict[str, Excess]


def frontier(models: list[Candidate], resamples: int, seed: int) -> Frontier | None:
    """The line and every other model's excess; None without a random subset."""
    on_line = [m for m in models if m.kind in ("random", "full")]
    others = [m for m in models if m.kind not in ("random", "full")]
    if not any(m.kind == "random" for m in on_line):
        return None
    rng = np.random.default_rng([seed, 13])
    ordered = [*on_line, *others]
    gains = _means([m.gain.values for m in ordered], ordered[0].gain.weights, resamples, rng)
    forgotten = _means(
        [m.forgetting.values for m in ordered], ordered[0].forgetting.weights, resamples, rng
    )
    count = len(on_line)
    line = sorted(
        [
            ("base", 0.0, 0.0),
            *(
                (m.name, float(g), float(f))
                for m, g, f in zip(on_line, gains[0], forgotten[0], strict=False)
            ),
        ],
        key=lambda point: point[1],
    )
    origin = np.zeros((len(gains), 1))
    xs = np.hstack([origin, gains[:, :count]])
    ys = np.hstack([origin, forgotten[:, :count]])
    excess = {}
    for number, model in enumerate(others, count):
        found = forgotten[:, number] - _on_line(xs, ys, gains[:, number])
        value, redrawn = float(found[0]), found[1:][np.isfinite(found[1:])]
        enough = len(redrawn) >= DEFINED * resamples
        interval = np.quantile(redrawn, [0.025, 0.975]) if enough else None
        excess[model.name] = Excess(
            value if np.isfinite(value) else None,
            (float(interval[0]), float(interval[1]))
            if interval is not None and np.isfinite(value)
            else None,
        )
    return Frontier(line, excess)


def _on_line(xs: Floats, ys: Floats, at: Floats) -> Floats:
    """Of each row of points [R, P], the broken line's height at `at` [R]; NaN beyond its ends."""
    order = np.argsort(xs, axis=1, kind="stable")
    found = np.empty(len(at))
    for row in range(len(at)):
        x, y = xs[row, order[row]], ys[row, order[row]]
        found[row] = np.interp(at[row], x, y, left=np.nan, right=np.nan)
    return found


def _means(
    values: list[Floats], weights: Floats, resamples: int, rng: np.random.Generator
) -> Floats:
    """Weighted means of each model's rows [models][N]: first as they are, then redrawn, the same
    rows for all; float64 [1 + resamples, models].
    """
    table = np.stack(values, 1) * weights[:, None]
    rows = len(weights)
    found = [(table.sum(0) / weights.sum())[None]]
    block = max(1, 2**22 // rows)
    for first in range(0, resamples, block):
        count = min(block, resamples - first)
        draws = rng.multinomial(rows, np.full(rows, 1 / rows), size=count).astype(np.float64)
        found.append((draws @ table) / np.maximum(draws @ weights, 1e-300)[:, None])
    return np.concatenate(found)
