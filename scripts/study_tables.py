"""The study's results as Markdown tables: every method against random at the same budget, paired by domain and seed.

    python scripts/study_tables.py RESULTS.json [--role choose|confirm]

Reads what scripts/study.py collected; prints. A difference is the mean over runs with its 95 % t-interval; a run is one domain,
share of faults and seed, and only runs that hold both models count. `content` is how much less the true answers cost than
another row's answers to the same questions, against the base model: what was learned beyond style.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

Run = dict[str, Any]
Measure = Callable[[Run, str], float]


def loss(run: Run, model: str, which: str) -> float:
    """Held-out loss of one model on one set, nats per target token."""
    return float(run["models"][model][which]["loss"])


def gain(run: Run, model: str) -> float:
    """Domain loss of the base model minus the model's."""
    return loss(run, "base", "domain") - loss(run, model, "domain")


def content(run: Run, model: str) -> float:
    """How far the true answers' advantage over swapped ones grew from the base model's."""
    gap = {name: loss(run, name, "swapped") - loss(run, name, "domain") for name in ("base", model)}
    return gap[model] - gap["base"]


def forgetting(run: Run, model: str) -> float:
    """General loss of the model minus the base model's."""
    return loss(run, model, "general") - loss(run, "base", "general")


MEASURES: dict[str, Measure] = {"domain gain": gain, "content gain": content, "forgetting": forgetting}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % t-interval; infinite with one value."""
    x = np.asarray(values, float)
    mean = float(x.mean())
    if len(x) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return mean, mean - half, mean + half


def table(runs: Sequence[Run], budget: float, reference: str = "random") -> list[str]:
    """One table: a line per method at this budget, its measures, and each one's difference to the reference's."""
    suffix = f"_{budget * 100:g}"
    models = ["full", *sorted({name for run in runs for name in run["models"] if name.endswith(suffix)})]
    lines = ["| model | runs | " + " | ".join(f"{name} | to {reference}" for name in MEASURES) + " |"]
    lines.append("|" + "---|" * (2 + 2 * len(MEASURES)))
    for model in models:
        having = [run for run in runs if {model, reference + suffix} <= set(run["models"])]
        if not having:
            continue
        cells = []
        for measure in MEASURES.values():
            own = [measure(run, model) for run in having]
            against = [value - measure(run, reference + suffix) for value, run in zip(own, having, strict=True)]
            mean, low, high = interval(against)
            same = model == reference + suffix
            cells += [f"{np.mean(own):+.3f}", "-" if same else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"]
        lines.append(f"| {model} | {len(having)} | " + " | ".join(cells) + " |")
    return lines


def tables(results: dict[str, Any], role: str | None = None) -> str:
    """Every footing, share of faults and budget as a table under a heading of its own."""
    runs = [run for run in results["runs"] if role in (None, run["role"])]
    text = []
    for equal in results["study"]["equal"]:
        for noise in results["study"]["noise"]:
            chosen = [run for run in runs if run["equal"] == equal and run["noise"] == noise]
            for budget in results["study"]["budgets"] if chosen else ():
                text += [f"### {budget:.1%} of the pool, {noise:.0%} planted faults, equal {equal}", ""]
                text += [*table(chosen, budget), ""]
    return "\n".join(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--role", choices=["choose", "confirm"])
    options = parser.parse_args()
    print(tables(json.loads(options.results.read_text()), options.role))


if __name__ == "__main__":
    main()
