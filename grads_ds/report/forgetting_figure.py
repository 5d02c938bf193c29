"""The one picture of the report: what every model gained against what it forgot.

Right is learned, up is forgotten: the lower right corner is where one wants to be. A line joins the
base model, the random subsets and the whole pool; broken curves join the base model with a trained
one through the merges between them. Pure.
"""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from grads_ds.evaluate.candidates import Candidate
from grads_ds.report.forgetting import Forgetting
from grads_ds.report.plot import Frame, axes, finite_range, frame, legend, line, svg, word
from grads_ds.run_dir.layout import MAIN

LETTER, HEIGHT = 7.4, 15  # pixels of a label's letter and line
NAMED = 24  # characters of a name that are shown


def picture(found: Forgetting, narrow: bool = False) -> Markup:
    """The drawing; `narrow` for a phone, where a wide one's letters would be too small to read."""
    models = found.candidates.models
    xs = np.array([0.0, *(m.gain.mean for m in models)])
    ys = np.array([0.0, *(m.forgetting.mean for m in models)])
    limit = found.choice["limit"] if found.choice else None
    ys = np.append(ys, limit) if limit is not None and limit < 2 * ys.max() else ys
    width, height, ticks = (350, 380, 4) if narrow else (680, 460, 6)
    f = frame(width, height, _margin(xs), _margin(ys), left=66)
    left, right, top, bottom = f.box
    along = "gain on the domain sets, nats"
    parts = [
        axes(
            f,
            along if narrow else f"{along} (right: learned)",
            f"forgetting, {found.candidates.unit}",
            ticks,
            6,
        ),
        f'<path class="reference" d="M{f.x(0)} {top}V{bottom}M{left} {f.y(0)}H{right}"/>',
    ]
    if limit is not None and f.y.low <= limit <= f.y.high:
        parts.append(f'<path class="limit" d="M{left} {f.y(limit)}H{right}"/>')
    if found.frontier is not None:
        points = found.frontier.line
        parts.append(line(f, [p[1] for p in points], [p[2] for p in points], "frontier"))
    for name, curve in _curves(models).items():
        tip = f"merges of the base model and {name}"
        parts.append(line(f, [p[0] for p in curve], [p[1] for p in curve], "between", tip))
    parts += _points(f, found, limit)
    return svg(f, parts, f"Gain of each model against its forgetting ({found.candidates.what})")


def key(found: Forgetting) -> Markup:
    """What the marks of the drawing mean."""
    models = found.candidates.models
    entries = [("point chosen", "the selected rows")] if found.candidates.model(MAIN) else []
    if any(model.kind == "subset" and model.name != MAIN for model in models):
        entries.append(("point", "other selections"))
    if found.frontier is not None:
        entries.append(("frontier", "random rows, to the whole pool"))
    elif any(model.kind in ("random", "full") for model in models):
        entries.append(("point random", "random rows, the whole pool"))
    if _curves(models):
        entries.append(("between", "merges of the base model and a trained one"))
    if any(model.kind == "checkpoint" for model in models):
        entries.append(("checkpoint", "on the way through a training"))
    if found.choice:
        entries.append(("limit", "limit to forgetting"))
        if found.choice["chosen"]:
            entries.append(("ring", "published as best/model"))
    return legend(entries)


def _points(f: Frame, found: Forgetting, limit: float | None) -> list[str]:
    """Marks and names, and the limit's. The main model and the published one come first and are
    always named; another name without room is left to the tip.
    """
    best = (found.choice or {}).get("chosen") or {}
    order = {best.get("name"): 0, MAIN: 1, "full": 2}
    models = sorted(found.candidates.models, key=lambda m: order.get(m.name, 3))
    places = {m.name: (f.x(m.gain.mean), f.y(m.forgetting.mean)) for m in models}
    taken = [_box(f.x(0), f.y(0), 6), *(_box(x, y, 5) for x, y in places.values())]
    marks, drawn = [], _drawn(f, found)
    labels = [word(f.x(0) + 8, f.y(0) + 16, "base", "name", "start")]
    taken.append((f.x(0) + 8, f.y(0) + 4, f.x(0) + 40, f.y(0) + 19))
    if limit is not None and f.y.low <= limit <= f.y.high:
        text, right, at_y = f"limit {limit:g}", f.box[1] - 4, f.y(limit) - 5
        labels.append(word(right, at_y, text, "limit", "end"))
        taken.append((right - LETTER * len(text), at_y - HEIGHT + 3, right, at_y + 3))
    for model in models:
        x, y = places[model.name]
        main = "chosen" if model.name == MAIN else "plain"
        small = model.kind in ("interpolation", "checkpoint")
        if model.name == best.get("name"):
            marks.append(f'<circle class="ring" cx="{x}" cy="{y}" r="9"/>')
        tip = Markup.escape(
            f"{model.name}: gain {model.gain.mean:+.4f}, forgetting {model.forgetting.mean:+.4f}"
        )
        marks.append(
            f'<circle class="point {main} {model.kind}" cx="{x}" cy="{y}"'
            f' r="{3 if small else 5}"><title>{tip}</title></circle>'
        )
        name = model.name if len(model.name) <= NAMED else model.name[: NAMED - 1] + "…"
        always = model.name in (best.get("name"), MAIN)
        if small and not always:
            continue
        if found_place := _place(f, (x, y), name, taken, drawn, always):
            at_x, at_y, anchor, box = found_place
            labels.append(word(at_x, at_y, name, f"name {main}", anchor))
            taken.append(box)
    return [*marks, *labels]


Box = tuple[float, float, float, float]
Spot = tuple[float, float]


def _drawn(f: Frame, found: Forgetting) -> list[Spot]:
    """Spots along all that is drawn as a line, a few pixels apart."""
    left, right, _, _ = f.box
    lines = [[(0.0, 0.0), *curve] for curve in _curves(found.candidates.models).values()]
    if found.frontier is not None:
        lines.append([(gain, lost) for _, gain, lost in found.frontier.line])
    spots = [(float(x), f.y(0)) for x in range(int(left), int(right), 5)]
    for points in lines:
        xs, ys = ([scale(p[i]) for p in points] for i, scale in enumerate((f.x, f.y)))
        along = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(xs), np.diff(ys)))])
        steps = np.arange(0.0, along[-1], 5.0)
        spots += zip(np.interp(steps, along, xs), np.interp(steps, along, ys), strict=True)
    return spots


def _place(
    f: Frame, at: Spot, name: str, taken: list[Box], drawn: list[Spot], always: bool
) -> tuple[float, float, str, Box] | None:
    """Where a name fits beside its mark and crosses the fewest lines: right, left, above, below, or
    askew; with `always` where it touches least. None where nowhere.
    """
    (x, y), (left, right, top, bottom) = at, f.box
    width, own, found = LETTER * len(name), _box(x, y, 5), []
    tries = [
        (x + 13, y + 4, "start", x + 13),
        (x - 13, y + 4, "end", x - 13 - width),
        (x, y - 13, "middle", x - width / 2),
        (x, y + 24, "middle", x - width / 2),
        (x + 10, y + 19, "start", x + 10),
        (x - 10, y - 10, "end", x - 10 - width),
        (x + 10, y - 10, "start", x + 10),
        (x - 10, y + 19, "end", x - 10 - width),
    ]
    for at_x, at_y, anchor, first in tries:
        box = (first, at_y - HEIGHT + 3, first + width, at_y + 3)
        touched = sum(_overlap(box, other) for other in taken if other != own)
        inside = left <= box[0] and box[2] <= right and top <= box[1] and box[3] <= bottom
        if inside and (always or not touched):
            crossed = sum(_overlap(box, (*spot, *spot)) for spot in drawn)
            found.append(((touched, crossed), (at_x, at_y, anchor, box)))
    return min(found, key=lambda one: one[0])[1] if found else None


def _box(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _curves(models: list[Candidate]) -> dict[str, list[tuple[float, float]]]:
    """For each trained model with merges: from the base through them to itself."""
    curves = {}
    for model in models:
        between = [m for m in models if m.kind == "interpolation" and m.of == model.name]
        between.sort(key=lambda m: m.alpha or 0.0)
        if between and model.alpha is None:
            points = [(m.gain.mean, m.forgetting.mean) for m in [*between, model]]
            curves[model.name] = [(0.0, 0.0), *points]
    return curves


def _margin(values: np.ndarray) -> tuple[float, float]:
    low, high = finite_range(values)
    margin = 0.09 * ((high - low) or 1.0)
    return low - margin, high + margin
