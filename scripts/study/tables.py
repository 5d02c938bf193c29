"""The study's results as Markdown tables: every method against random at the same budget, paired by
domain and seed.

    python scripts/study/tables.py RESULTS.json [--role choose|confirm] [--to full] [--rule]

Reads what scripts/study/run.py collected; prints. A difference is the mean over runs with its 95 %
t-interval; a run is one domain, share of noise and seed, and only runs that hold both models
count. `content` is how much less the true answers cost than another row's answers to the same
questions, against the base model: what was learned beyond style. `accuracy` is the share of
held-out questions whose true answer was the likeliest of three. --rule applies the rule for
defaults (docs/STUDY.md).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.study.design import subsets, variant

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


def accuracy(run: Run, model: str) -> float:
    """Share of the domain's held-out questions answered rightly, out of three answers."""
    return float(run["accuracy"][model]["domain"])


MEASURES: dict[str, Measure] = {
    "domain gain": gain,
    "content gain": content,
    "forgetting": forgetting,
    "accuracy": accuracy,
}


def measured(runs: Sequence[Run]) -> dict[str, Measure]:
    """The measures that these runs hold."""
    return {
        name: measure
        for name, measure in MEASURES.items()
        if name != "accuracy" or all(r.get("accuracy") for r in runs)
    }


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % t-interval; infinite with one value."""
    x = np.asarray(values, float)
    mean = float(x.mean())
    if len(x) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return mean, mean - half, mean + half


def spread(values: Sequence[float], bold: bool = False) -> str:
    """Mean and interval in words; with `bold` the mean is where the interval leaves zero out."""
    mean, low, high = interval(values)
    if len(values) < 2:
        return f"{mean:+.3f} (one pool)"
    middle = f"**{mean:+.3f}**" if bold and (low > 0 or high < 0) else f"{mean:+.3f}"
    return f"{middle} ({low:+.3f} to {high:+.3f})"


def table(runs: Sequence[Run], budget: float, reference: str = "random") -> list[str]:
    """One table: a line per method at this budget, its measures, and each one's difference to the
    reference's.
    """
    measures = measured(runs)
    against = reference if reference in ("base", "full") else variant(reference, budget)
    methods = [
        method
        for method, found in subsets(name for run in runs for name in run["models"])
        if found == budget
    ]
    lines = [
        "| model | runs | " + " | ".join(f"{name} | to {reference}" for name in measures) + " |"
    ]
    lines.append("|" + "---|" * (2 + 2 * len(measures)))
    for method in ("full", *methods):
        model = "full" if method == "full" else variant(method, budget)
        having = [run for run in runs if {model, against} <= set(run["models"])]
        if not having:
            continue
        cells = []
        for measure in measures.values():
            own = [measure(run, model) for run in having]
            shown = "-" if model == against else difference(measure, having, model, against)
            cells += [f"{np.mean(own):+.3f}", shown]
        lines.append(f"| {method} | {len(having)} | " + " | ".join(cells) + " |")
    return lines


def difference(measure: Measure, runs: Sequence[Run], model: str, against: str) -> str:
    """The mean difference of two models over runs and its interval; bold when the interval leaves
    zero out.
    """
    return spread([measure(run, model) - measure(run, against) for run in runs], bold=True)


Combination = tuple[str, float, float]  # footing, share of noise, budget


def combinations(runs: Sequence[Run]) -> dict[Combination, list[Run]]:
    """The runs by footing, share of noise and budget, in the order in which they come."""
    found: dict[Combination, list[Run]] = {}
    for run in runs:
        for budget in sorted({budget for _, budget in subsets(run["models"])}):
            found.setdefault((run["equal"], run["noise"], budget), []).append(run)
    return found


def tables(runs: Sequence[Run], reference: str = "random") -> str:
    """Every footing, share of noise and budget as a table under a heading of its own."""
    text = []
    for (equal, noise, budget), chosen in sorted(combinations(runs).items()):
        text += [
            f"### {budget * 100:g} % of the pool, {noise * 100:g} % planted noise, equal {equal}",
            "",
        ]
        text += [*table(chosen, budget, reference), ""]
    return "\n".join(text)


def rule(runs: Sequence[Run], candidates: Sequence[str]) -> list[str]:
    """The rule for defaults on these runs: a line per candidate with its worst combination, whether
    any puts it out (domain gain significantly below random's), and the mean over combinations of
    domain gain less forgetting, to random: over all that it ran on, and over those that all
    candidates ran on.
    """
    shared = [
        where
        for where, chosen in combinations(runs).items()
        if all(
            any(variant(name, where[2]) in run["models"] for run in chosen) for name in candidates
        )
    ]
    lines = [
        (
            "| candidate | worst combination | domain gain to random there | out | gain less"
            " forgetting, to random | where all ran |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for name in candidates:
        worst: tuple[list[float], str] | None = None
        out, balance, alike = False, [], []
        for (equal, noise, budget), chosen in sorted(combinations(runs).items()):
            model, against = variant(name, budget), variant("random", budget)
            having = [run for run in chosen if {model, against} <= set(run["models"])]
            if not having:
                continue
            gains = [gain(run, model) - gain(run, against) for run in having]
            out |= interval(gains)[2] < 0
            if worst is None or np.mean(gains) < np.mean(worst[0]):
                worst = gains, f"{budget * 100:g} %, {noise * 100:g} % noise, equal {equal}"
            score = lambda run, which: gain(run, which) - forgetting(run, which)  # noqa: E731
            balance.append(
                float(np.mean([score(run, model) - score(run, against) for run in having]))
            )
            if (equal, noise, budget) in shared:
                alike.append(balance[-1])
        if worst is not None:
            gains, where = worst
            means = (
                f"{np.mean(balance):+.3f} | {np.mean(alike):+.3f}"
                if alike
                else f"{np.mean(balance):+.3f} | -"
            )
            lines.append(
                f"| {name} | {where} | {spread(gains)} | {'yes' if out else 'no'} | {means} |"
            )
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--role", choices=["choose", "confirm"])
    parser.add_argument(
        "--to", default="random", help="what differences are taken to: a method, full or base"
    )
    parser.add_argument("--rule", action="store_true", help="the rule for defaults, for each role")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    runs = [run for run in results["runs"] if options.role in (None, run["role"])]
    if options.rule:
        for role in ("choose", "confirm"):
            print(f"{role}:\n")
            candidates = results["study"]["candidates"]
            print("\n".join(rule([run for run in runs if run["role"] == role], candidates)) + "\n")
    else:
        print(tables(runs, options.to))


if __name__ == "__main__":
    main()
