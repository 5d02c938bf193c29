"""The tables of docs/STUDY.md and README.md, by the name between their marks.

Reads docs/results/study_*.json.
"""

from __future__ import annotations

import json
from typing import Any

from scripts.study.design import REPO, subsets, variant
from scripts.study.tables import Measure, combinations, difference, gain, rule, tables


def results(name: str) -> dict[str, Any]:
    """One committed file of numbers."""
    found: dict[str, Any] = json.loads((REPO / f"docs/results/study_{name}.json").read_text())
    return found


def main_tables(equal: str, reference: str = "random") -> str:
    """Every combination of one footing."""
    return tables(
        [run for run in results("main")["runs"] if run["equal"] == equal], reference
    ).strip()


def rule_tables() -> str:
    """The rule over the draws after the pilot that train the 8 M model as the main one does, for
    each role of the domains.
    """
    runs = [
        run
        for name in ("main", "noise", "budgets", "steps", "many_rows")
        for run in results(name)["runs"]
    ]
    candidates, text = results("main")["study"]["candidates"], []
    for role, words in (
        ("choose", "Chosen on medicine and law"),
        ("confirm", "Confirmed on finance"),
    ):
        text += [
            f"{words}:",
            "",
            *rule([run for run in runs if run["role"] == role], candidates),
            "",
        ]
    return "\n".join(text).strip()


def across(
    name: str, measure: Measure = gain, reference: str = "random", equal: str | None = None
) -> str:
    """One measure's difference to a reference, a line per method and a column per combination that
    was run.
    """
    runs = [run for run in results(name)["runs"] if equal in (None, run["equal"])]
    columns = sorted(combinations(runs).items(), key=lambda item: (item[0][1], item[0][2]))
    head = [
        f"{budget * 100:g} %, {noise * 100:g} % noise ({len(chosen)} pools)"
        for (_, noise, budget), chosen in columns
    ]
    methods = dict.fromkeys(
        method for method, _ in subsets(name for run in runs for name in run["models"])
    )
    lines = ["| subset | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
    for method in [*methods, "full"]:
        cells = []
        for (_, _, budget), chosen in columns:
            model, against = (
                which if which == "full" else variant(which, budget)
                for which in (method, reference)
            )
            having = [run for run in chosen if {model, against} <= set(run["models"])]
            cells.append(
                "-"
                if method == reference or not having
                else difference(measure, having, model, against)
            )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
