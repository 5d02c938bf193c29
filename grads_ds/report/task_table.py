"""What was learned against what was forgotten, as one figure; and the evaluation tasks' scores as
rows.

Pure: an `Outcome` or `evaluation.json` in, inline SVG or rows out. Gain and forgetting are both
losses less the base model's, in nats per target token: a point low and to the left learned the
domain and kept the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from grads_ds.report.outcome import Difference, Outcome
from grads_ds.report.plot import axes, finite_range, frame, svg, word

# the harness's tasks name their own
KIND_SCORE = {"multiple_choice": "accuracy", "exact_match": "accuracy"}


@dataclass(frozen=True)
class TaskRow:
    """One measure of one task, and every model's value with its 95 % interval or standard error as
    text ("" without).
    """

    task: str
    measure: str
    scores: dict[str, tuple[float, str]]


def tradeoff(outcome: Outcome) -> Markup | None:
    """Each trained model at (forgetting, gain), the first general against the first domain set;
    None without both or the base.
    """
    if not (outcome.domain and outcome.general):
        return None
    domain, general = outcome.domain[0], outcome.general[0]
    points: list[tuple[str, Difference, Difference]] = []
    for model in outcome.models:
        gaps = [
            model.measures[s].against_base if s in model.measures else None
            for s in (general, domain)
        ]
        if gaps[0] is not None and gaps[1] is not None:
            points.append((model.name, gaps[0], gaps[1]))
    if not points:
        return None
    ranges = []
    for axis in (1, 2):
        ends = [v for p in points for v in (p[axis].value, *(p[axis].interval or ()))]  # type: ignore[union-attr,misc]
        # the base model, at the origin, is always in sight
        low, high = finite_range(np.array([0.0, *ends]))
        margin = 0.08 * ((high - low) or 1.0)
        ranges.append((low - margin, high + margin))
    f = frame(640, 400, ranges[0], ranges[1])
    left, right, top, bottom = f.box
    parts = [
        axes(
            f,
            f"{general} loss less base (right: forgotten)",
            f"{domain} loss less base (down: learned)",
            6,
            6,
        )
    ]
    parts.append(f'<path class="reference" d="M{f.x(0)} {top}V{bottom}M{left} {f.y(0)}H{right}"/>')
    for name, forgot, learned in points:
        style = "chosen" if name == "selected" else "plain"
        x, y = f.x(forgot.value), f.y(learned.value)
        if forgot.interval:
            parts.append(
                f'<path class="whisker {style}" d="M{f.x(forgot.interval[0])}'
                f' {y}H{f.x(forgot.interval[1])}"/>'
            )
        if learned.interval:
            parts.append(
                f'<path class="whisker {style}" d="M{x}'
                f' {f.y(learned.interval[0])}V{f.y(learned.interval[1])}"/>'
            )
        tip = Markup.escape(f"{name}: {domain} {learned.value:+.4f}, {general} {forgot.value:+.4f}")
        parts.append(
            f'<circle class="point {style}" cx="{x}" cy="{y}" r="4.5"><title>{tip}</title></circle>'
        )
        beside = x < (left + right) / 2
        parts.append(
            word(
                x + (9 if beside else -9),
                y - 7,
                name[:26],
                f"name {style}",
                "start" if beside else "end",
            )
        )
    return svg(f, parts, f"Loss on {domain} against loss on {general}, each less the base model's")


def task_rows(evaluation: Mapping[str, Any] | None) -> list[TaskRow]:
    """The tasks of evaluation.json, each measure a row: our own tasks' accuracy, all that the
    harness gave of its own.
    """
    by_model: dict[str, dict[str, Any]] = (evaluation or {}).get("tasks") or {}
    rows: dict[tuple[str, str], dict[str, tuple[float, str]]] = {}
    for model, tasks in by_model.items():
        for task, found in tasks.items():
            for measure, value in found.items():
                known = KIND_SCORE.get(str(found.get("kind")))
                stem, _, rest = measure.partition(",")
                if (
                    isinstance(value, bool)
                    or not isinstance(value, int | float)
                    or stem.endswith("_stderr")
                ):
                    continue
                if known and not measure.startswith(known):
                    continue  # a count, not a score
                if not known and measure in ("sample_len", "num_samples"):
                    continue
                between = found.get(f"{measure}_ci95")
                error = found.get(f"{stem}_stderr,{rest}" if rest else f"{stem}_stderr")
                sure = f"{between[0]:.3f}–{between[1]:.3f}" if between else ""
                sure = f"± {error:.3f}" if isinstance(error, float) else sure
                rows.setdefault((task, measure), {})[model] = (float(value), sure)
    return [TaskRow(task, measure, values) for (task, measure), values in rows.items()]
