"""The tables of docs/STUDY.md about levers against forgetting, as Markdown.

Reads docs/results/study_forgetting.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grads_ds.config.evaluate import KL
from scripts.study.lever_tables import over_pools
from scripts.study.page_tables import results

Run = Mapping[str, Any]
TRAINED = {"full": "the whole pool", "guided_25": "guided, 25 %", "random_25": "random, 25 %"}
ENDS = {
    "": "the end",
    "~0.5": "half its steps",
    "@0.75": "a = 0.75",
    "@0.5": "a = 0.5",
    "@0.25": "a = 0.25",
}
KINDS = {
    "interpolation": "merge",
    "random": "random subset",
    "full": "whole pool",
    "subset": "selection",
    "checkpoint": "stop half-way",
}
SWEPT = {
    "all": "all",
    "plain": "plain",
    "plain, choose": "plain, medicine and law",
    "plain, confirm": "plain, finance",
}


def limits_table() -> str:
    """Per limit: what it publishes, whether the audit half holds, and the excess there."""
    rows = [
        "| runs | limit | published | of these kept | what | gain | forgetting, audit half"
        " | excess, audit half |",
        "|---|---:|---:|---|---|---|---|---|",
    ]
    for name, words in SWEPT.items():
        for entry in results("forgetting")["pooled"]["sweep"][name]:
            share, kinds = "-", "-"
            if entry["published"]:
                low, high = (f"{100 * end:.0f}" for end in entry["share"][1:])
                share = f"{entry['kept']} ({low} to {high} %)"
                kinds = ", ".join(_counted(n, KINDS[kind]) for kind, n in entry["kinds"].items())
            told = [cell(entry.get(key)) for key in ("gain", "audit")]
            excess = cell(entry.get("audit_excess"), bold=True)
            rows.append(
                f"| {words} | {entry['limit']:g} | {entry['published']} of {entry['runs']}"
                f" | {share}"
                f" | {kinds} | {' | '.join(told)} | {excess} |"
            )
    return "\n".join(rows)


def plain_table() -> str:
    """Of the training without a lever: each model's end, its stop half-way and its merges."""
    rows = [
        "| trained on | model | gain | divergence | excess over random's line |",
        "|---|---|---|---|---|",
    ]
    models = results("forgetting")["pooled"]["levers"]["plain"]
    for model, words in TRAINED.items():
        for place, end in ENDS.items():
            entry = models[model + place]
            excess = "on the line"
            if f"{KL}_excess" in entry:
                excess = cell(entry[f"{KL}_excess"], bold=True)
            told = f"{cell(entry['gain'])} | {cell(entry[KL])}"
            rows.append(f"| {words} | {end} | {told} | {excess} |")
    return "\n".join(rows)


def levers_table() -> str:
    """Per lever, over the pools that every lever was run on: gain; divergence; excess."""
    runs = complete(results("forgetting")["runs"])
    columns = [f"{model}{place}" for model in TRAINED for place in ("", "@0.5")]
    rows = [f"| lever | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for footing in dict.fromkeys(run["footing"] for run in runs):
        cells = []
        for model in columns:
            found = [run["models"][model] for run in runs if run["footing"] == footing]
            means = [
                over_pools([one[key][0] if key in one else None for one in found])
                for key in ("gain", KL, f"{KL}_excess")
            ]
            told = [f"{v[0]:+.3f}" if v[3] == len(found) else "-" for v in means]
            cells.append("; ".join(told))
        rows.append(f"| {footing} | {' | '.join(cells)} |")
    return "\n".join(rows)


def published_table() -> str:
    """Per lever and limit, over the pools that every lever was run on: how many runs publish a
    model, and its mean gain.
    """
    runs = complete(results("forgetting")["runs"])
    limits = [best["limit"] for best in runs[0]["sweep"]]
    head = " | ".join(f"{limit:g}" for limit in limits)
    rows = [f"| lever | {head} |", "|---|" + "---|" * len(limits)]
    for footing in dict.fromkeys(run["footing"] for run in runs):
        cells = []
        for place in range(len(limits)):
            tried = [run["sweep"][place] for run in runs if run["footing"] == footing]
            gains = [best["gain"] for best in tried if best["chosen"] is not None]
            told = f": {over_pools(gains)[0]:+.3f}" if gains else ""
            cells.append(f"{len(gains)} of {len(tried)}{told}")
        rows.append(f"| {footing} | {' | '.join(cells)} |")
    return "\n".join(rows)


def complete(runs: Sequence[Run]) -> list[Run]:
    """The runs of pools that every footing was run on."""
    footings = {run["footing"] for run in runs}
    pools: dict[Any, list[Run]] = {}
    for run in runs:
        pools.setdefault((run["domain"], run["noise"], run["seed"]), []).append(run)
    return [
        run
        for having in pools.values()
        if {run["footing"] for run in having} == footings
        for run in having
    ]


def cell(values: Sequence[float | None] | None, bold: bool = False) -> str:
    """Mean and 95 % t-interval over pools and their number; with `bold` the mean is where the
    interval leaves zero out.
    """
    if not values or values[0] is None:
        return "-"
    mean, low, high, pools = values
    if low is None or high is None:
        return f"{mean:+.3f} (one pool)"
    strong = bold and (low > 0 or high < 0)
    told = f"**{mean:+.3f}**" if strong else f"{mean:+.3f}"
    return f"{told} ({low:+.3f} to {high:+.3f}; {pools})"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number > 1 and "-" not in what else "")
