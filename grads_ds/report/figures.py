"""The page's figures: arrays of a run in, inline SVG out. Pure and deterministic; a million samples
draw as small as a thousand.

Large pools are binned (histogram, two-way histogram); single points are drawn only up to fixed
numbers, by an even stride.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from markupsafe import Markup

from grads_ds.report.outcome import Outcome
from grads_ds.report.plot import (
    axes,
    cells,
    dots,
    finite_range,
    frame,
    legend,
    line,
    number,
    rectangle,
    svg,
    word,
)
from grads_ds.report.read_run import Scores, Subset
from grads_ds.statistics import Floats, Ints

BINS = 72
POINTS = 1500  # pool points drawn one by one; above that the pool is a shaded grid
MARKED = 400  # selected points drawn one by one
CURVE_POINTS = 300
COLOURS = 8


def signal_histogram(subset: Subset, small: bool = False) -> Markup:
    """The signal's histogram with the selected part of each bar, the estimated density and the
    selected region.
    """
    signal = subset.signal[np.isfinite(subset.signal)]
    chosen = subset.signal[subset.selected & np.isfinite(subset.signal)]
    if not len(signal):
        return Markup('<p class="absent">No sample has a finite signal.</p>')
    low, high = (float(v) for v in np.quantile(signal, [0.001, 0.999]))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, (36 if small else BINS) + 1)
    inside, taken = (np.histogram(np.clip(part, low, high), edges)[0] for part in (signal, chosen))
    width = edges[1] - edges[0]
    curve = subset.report.get("curve") or {}
    x, pool = (
        np.array(curve.get("signal") or [], dtype=float),
        np.array(curve.get("pool") or [], dtype=float),
    )
    expected = pool * len(signal) * width  # a density in the units of the bars: samples per bar
    within = (x >= low) & (x <= high)
    top = 1.08 * max(
        1.0, float(inside.max()), float(expected[within].max()) if within.any() else 0.0
    )
    f = frame(430, 230, (low, high), (0, top)) if small else frame(960, 360, (low, high), (0, top))
    parts = [
        axes(
            f,
            "signal" if small else "gradient signal",
            "samples per bar",
            5 if small else 9,
            4 if small else 5,
        )
    ]
    for start, end in subset.report.get("region") or []:
        a, b = max(start, low), min(end, high)
        if b > a:
            parts.append(
                rectangle(f, a, b, 0, top, "region", f"selected region: {start:.4g} to {end:.4g}")
            )
    for i in range(len(inside)):
        tip = (
            f"signal {edges[i]:.4g} to {edges[i + 1]:.4g}: {inside[i]:,} samples, {taken[i]:,}"
            " selected"
        )
        gap = 0.06 * width
        parts.append(
            rectangle(f, edges[i] + gap, edges[i + 1] - gap, 0, float(inside[i]), "bar", tip)
        )
        parts.append(
            rectangle(f, edges[i] + gap, edges[i + 1] - gap, 0, float(taken[i]), "bar chosen", tip)
        )
    parts.append(line(f, x[within], expected[within], "curve", "estimated density"))
    drawing = svg(
        f,
        parts,
        f"Histogram of the gradient signal of {len(signal)} samples, {len(chosen)} selected"
        f" ({subset.name})",
    )
    if small:
        return drawing
    entries = [("bar", "pool"), ("bar chosen", "selected")]
    entries += [("line", "estimated density")] if within.any() else []
    entries += [("region", "selected region")] if subset.report.get("region") else []
    return drawing + legend(entries)


def length_scatter(scores: Scores, group: str, chosen: Subset, one_of: int = 1) -> Markup:
    """Target tokens against one group's norm, both logarithmic; a shaded grid for a large pool, the
    selected as points.
    """
    lengths, norms = scores.num_target_tokens, scores.norms[group]
    good = scores.ok & (lengths > 0) & np.isfinite(norms) & (norms > 0)
    if not good.any():
        return Markup('<p class="absent">No sample has a positive norm.</p>')
    x, y = lengths[good].astype(float), norms[good]
    selected = chosen.selected[good]
    spread = (1.08, 1 / 1.08)
    f = frame(
        960 if one_of == 1 else 520,
        360 if one_of == 1 else 330,
        (x.min() * spread[1], x.max() * spread[0]),
        (y.min() * spread[1], y.max() * spread[0]),
        log_x=True,
        log_y=True,
    )
    parts = [axes(f, "target tokens", f"{group} gradient norm", 6, 5)]
    if len(x) <= POINTS:
        parts.append(dots(f, x[~selected], y[~selected], "pool", 1.8))
    else:
        grid = (
            np.geomspace(f.x.low, f.x.high, 73 if one_of == 1 else 55),
            np.geomspace(f.y.low, f.y.high, 45),
        )
        parts.append(cells(f, *grid, np.histogram2d(x, y, bins=grid)[0], "cell"))
    marked = np.flatnonzero(selected)[:: max(1, -(-int(selected.sum()) // MARKED))]
    parts.append(dots(f, x[marked], y[marked], "chosen", 1.7 if len(marked) > 150 else 2.4))
    return svg(
        f,
        parts,
        f"{group} norm against target tokens of {len(x)} samples, {int(selected.sum())} selected",
    )


def loss_forest(outcome: Outcome, set_name: str) -> Markup:
    """Each model's loss on one held-out set as a point with its 95 % interval, on one scale."""
    rows = [(m, m.measures[set_name]) for m in outcome.models if set_name in m.measures]
    ends = np.array([v for _, found in rows for v in (found.loss, *(found.interval or ()))])
    low, high = finite_range(ends)
    margin = 0.06 * ((high - low) or 1.0)
    step, label = 26, 24 + 8 * max([4, *(min(26, len(m.name)) for m, _ in rows)])
    f = frame(520, 60 + step * len(rows), (low - margin, high + margin), (0, 1), left=label, top=8)
    left, right, top, bottom = f.box
    parts = []
    for tick in f.x.ticks(4):
        parts.append(
            f'<path class="grid" d="M{f.x(tick)} {top}V{bottom}"/>'
            + word(f.x(tick), bottom + 19, number(tick), "tick")
        )
    base = outcome.model("base")
    if base is not None and set_name in base.measures:
        parts.append(
            f'<path class="reference" d="M{f.x(base.measures[set_name].loss)} {top}V{bottom}"/>'
        )
    for i, (model, found) in enumerate(rows):
        y = top + step * (i + 0.5)
        style = "chosen" if model.name == "selected" else "plain"
        name = model.name if len(model.name) <= 26 else model.name[:25] + "…"
        parts.append(word(left - 10, y + 4, name, f"name {style}", "end"))
        if found.interval:
            parts.append(
                f'<path class="whisker {style}" d="M{f.x(found.interval[0])}'
                f' {y}H{f.x(found.interval[1])}"/>'
            )
        tip = Markup.escape(f"{model.name}: {found.loss:.4f}")
        parts.append(
            f'<circle class="point {style}" cx="{f.x(found.loss)}" cy="{y}"'
            f' r="4.5"><title>{tip}</title></circle>'
        )
    parts.append(
        word((left + right) / 2, f.height - 5, f"{set_name} loss (nats per token)", "label")
    )
    return svg(f, parts, f"Loss of each model on {set_name}")


def training_curves(curves: Mapping[str, tuple[Ints, Floats]]) -> Markup:
    """Loss against optimizer step, one line for each training run."""
    shown = {
        name: (steps, loss) for name, (steps, loss) in curves.items() if np.isfinite(loss).any()
    }
    if not shown:
        return Markup('<p class="absent">No loss was logged.</p>')
    every = np.concatenate([loss for _, loss in shown.values()])
    low, high = finite_range(every)
    last = max(int(steps.max()) for steps, _ in shown.values())
    first = min(int(steps.min()) for steps, _ in shown.values())
    margin = 0.05 * ((high - low) or 1.0)
    f = frame(960, 330, (first, last), (low - margin, high + margin))
    parts = [axes(f, "optimizer step", "training loss", 9, 5)]
    entries = []
    for i, (name, (steps, loss)) in enumerate(shown.items()):
        stride = max(1, -(-len(steps) // CURVE_POINTS))
        style = f"run c{i % COLOURS}{' dashed' if i >= COLOURS else ''}"
        if len(steps) == 1:
            parts.append(dots(f, steps, loss, style, 3))
        parts.append(
            line(
                f,
                steps[::stride],
                loss[::stride],
                style,
                f"{name}: last loss {loss[-1]:.4f} at step {steps[-1]:,}",
            )
        )
        entries.append((style, f"{name} ({loss[0]:.3f} → {loss[-1]:.3f})"))
    return svg(f, parts, "Training loss against step of " + ", ".join(shown)) + legend(entries)
