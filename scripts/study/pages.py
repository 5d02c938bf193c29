"""The study's numbers put where they are read: the tables in docs/STUDY.md and README.md, and the
figure docs/images/study.png.

    python scripts/study/pages.py            # write them from docs/results/study_*.json
    python scripts/study/pages.py --check    # exit status 1 where a page shows other numbers

A table stands between `<!-- study: NAME -->` and `<!-- end of NAME -->`. Needs nothing but the
committed JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from scripts.study import probes
from scripts.study.design import method_and_budget, subsets, variant
from scripts.study.tables import (
    Measure,
    Run,
    combinations,
    content,
    difference,
    forgetting,
    gain,
    interval,
    rule,
    spread,
    tables,
)

PAGES = ("docs/STUDY.md", "README.md")
FIGURE, BUDGETS = "docs/images/study.png", "docs/images/study_budgets.png"


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
        f"{budget * 100:g} %, {noise * 100:g} % faults ({len(chosen)} pools)"
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


def pooled_table() -> str:
    """The methods of both draws, over all their noisy pools at 25 % and equal epochs, to random."""
    runs = [run for name in ("main", "noise") for run in results(name)["runs"]]
    runs = [run for run in runs if run["equal"] == "epochs" and run["noise"] > 0]
    measures: dict[str, Measure] = {
        "domain gain": gain,
        "content gain": content,
        "forgetting": forgetting,
    }
    lines = [
        f"| subset ({len(runs)} pools) | " + " | ".join(measures) + " |",
        "|" + "---|" * (len(measures) + 1),
    ]
    for method in (
        name
        for name in results("noise")["study"]["footings"]["epochs"]["methods"]
        if name != "random"
    ):
        cells = [
            difference(measure, runs, f"{method}_25", "random_25") for measure in measures.values()
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def lengths_table() -> str:
    """The default and what goes by general text, to random rows of the default's lengths and to the
    default.
    """
    runs = results("rivals")["runs"]
    lines = ["| difference | domain gain | content gain | forgetting |", "|---|---|---|---|"]
    pairs = [
        ("density", "length_matched"),
        ("forget_less", "density"),
        ("orthogonal", "density"),
        ("snr", "density"),
    ]
    for one, other in pairs:
        cells = [
            difference(measure, runs, variant(one, 0.25), variant(other, 0.25))
            for measure in (gain, content, forgetting)
        ]
        lines.append(f"| {one} to {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replay_table() -> str:
    """The same pools with one general row in five beside the training rows and without: gain and
    forgetting, and what replay changed.
    """
    having = results("replay")["runs"]
    plain = {
        (run["domain"], run["noise"], run["seed"], run["equal"]): run
        for run in results("budgets")["runs"]
    }
    lines = [
        (
            f"| model ({len(having) // 2} pools) | domain gain | with replay | change | forgetting"
            " | with replay | change |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for equal in dict.fromkeys(run["equal"] for run in having):
        pairs = [
            (plain[run["domain"], run["noise"], run["seed"], equal], run)
            for run in having
            if run["equal"] == equal
        ]
        whole = [] if len(lines) > 2 else ["full"]  # the same model on every footing
        for model in [*whole, *(variant(*which) for which in subsets(pairs[0][1]["models"]))]:
            cells = []
            for measure in (gain, forgetting):
                before, after = (
                    [measure(run, model) for run in side] for side in zip(*pairs, strict=True)
                )
                cells += [f"{sum(before) / len(before):+.3f}", f"{sum(after) / len(after):+.3f}"]
                cells.append(spread([y - x for x, y in zip(before, after, strict=True)], bold=True))
            name = model if model == "full" else f"{method_and_budget(model)[0]}, 25 %"
            lines.append(f"| {name}, equal {equal} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost_table() -> str:
    """The road from probe to model against training on everything, in FLOPs and in seconds of one
    run.
    """
    runs = results("cost")["runs"]
    lines = [
        "| road | FLOPs | share | seconds | share | domain loss to everything |",
        "|---|---|---|---|---|---|",
    ]
    rows = [("everything", runs[0], "everything", "full"), ("own", runs[0], "own", "own")]
    for name, run, road, model in [*rows, *((run["probe"], run, "other", "other") for run in runs)]:
        spent = [
            (run[kind][road], run[kind][road] / run[kind]["everything"]) for kind in probes.COSTS
        ]
        loss = run["models"][model]["domain"]["loss"] - run["models"]["full"]["domain"]["loss"]
        (flops, of_flops), (seconds, of_seconds) = spent
        lines.append(
            f"| {name} | {flops:.2e} | {of_flops:.2f} | {seconds:.0f} | {of_seconds:.2f} |"
            f" {loss:+.3f} |"
        )
    return "\n".join(lines)


def kept_table() -> str:
    """The share of planted faults in each subset of the noisy pools, beside the pool's own."""
    main = results("main")
    lines = [
        "| subset of 25 % | clean | wrong answers | near-duplicates | off-domain |",
        "|---|---|---|---|---|",
    ]
    runs = [run for run in main["runs"] if run["equal"] == "epochs" and run["noise"] > 0]
    kinds = ("clean", "wrong_answer", "near_duplicate", "off_domain")
    for name in dict.fromkeys(name for run in runs for name in run["kept"]):
        total = {kind: sum(run["kept"][name].get(kind, 0) for run in runs) for kind in kinds}
        share = [total[kind] / sum(total.values()) for kind in kinds]
        lines.append(
            f"| {method_and_budget(name)[0]} | " + " | ".join(f"{x:.1%}" for x in share) + " |"
        )
    return "\n".join(lines)


def first_table() -> str:
    """The README's: subsets of noisy pools against random and against the whole pool."""
    runs = [run for run in results("main")["runs"] if run["noise"] > 0]
    epochs = [run for run in runs if run["equal"] == "epochs"]
    steps = [run for run in runs if run["equal"] == "steps"]
    lines = [
        (
            f"| subset ({len(epochs)} pools, 40 % faults) | 25 %, equal epochs: domain gain to"
            " random | forgetting to random | 5 %, equal steps: domain gain to whole pool |"
            " forgetting to whole pool |"
        ),
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(
        method for method, _ in subsets(name for run in epochs for name in run["models"])
    ):
        few, many = f"{name}_5", f"{name}_25"
        cells = [
            "-" if name == "random" else difference(measure, epochs, many, "random_25")
            for measure in (gain, forgetting)
        ]
        tried = [run for run in steps if few in run["models"]]
        cells += [
            difference(measure, tried, few, "full") if tried else ""
            for measure in (gain, forgetting)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "first": first_table,
    "epochs": lambda: main_tables("epochs"),
    "steps": lambda: main_tables("steps"),
    "steps to the whole pool": lambda: main_tables("steps", "full"),
    "kept": kept_table,
    "rule": rule_tables,
    "pilot": lambda: across("pilot"),
    "probes": lambda: probes.table(results("probes")),
    "cost": cost_table,
    "noise": lambda: across("noise"),
    "pooled": pooled_table,
    "noise, forgetting": lambda: across("noise", forgetting),
    "budgets at equal epochs": lambda: across("budgets", equal="epochs"),
    "budgets at equal steps": lambda: across("budgets", equal="steps"),
    "budgets at equal steps to the whole pool": lambda: across("budgets", gain, "full", "steps"),
    "forgetting at equal steps to the whole pool": lambda: across(
        "budgets", forgetting, "full", "steps"
    ),
    "few at the whole pool's steps": lambda: tables(results("steps")["runs"]).strip(),
    "hundreds of rows to the whole pool": (
        lambda: tables(results("many_rows")["runs"], "full").strip()
    ),
    "gentle": lambda: across("gentle", gain, "full"),
    "gentle, forgetting": lambda: across("gentle", forgetting, "full"),
    "rivals": lambda: tables(results("rivals")["runs"]).strip(),
    "the default without its lengths": lengths_table,
    "replay": replay_table,
    "size": lambda: across("size"),
    "size, forgetting": lambda: across("size", forgetting),
}


def filled(text: str) -> str:
    """A page with its tables as the numbers are now.

    Raises KeyError for a table that nobody makes.
    """

    def one(found: re.Match[str]) -> str:
        return f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}"

    return re.sub(
        r"(<!-- study: ([\w, ']+) -->)\n.*?(<!-- end of \2 -->)", one, text, flags=re.DOTALL
    )


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(runs: Sequence[Run], file: Path) -> None:
    """Domain gain against forgetting, both to random, of every subset at 25 % with the intervals of
    its means.
    """
    figure, axes = _pyplot().subplots(figsize=(7, 4.2), layout="constrained")
    for name in dict.fromkeys(
        name for run in runs for name in run["models"] if name.endswith("_25")
    ):
        if name == "random_25":
            continue
        x, y = (
            interval([measure(run, name) - measure(run, "random_25") for run in runs])
            for measure in (gain, forgetting)
        )
        axes.errorbar(
            x[0],
            y[0],
            xerr=[[x[0] - x[1]], [x[2] - x[0]]],
            yerr=[[y[0] - y[1]], [y[2] - y[0]]],
            fmt="o",
            ms=4,
            capsize=2,
            lw=1,
            label=name.removesuffix("_25"),
        )
    axes.axhline(0, color="0.6", lw=0.8)
    axes.axvline(0, color="0.6", lw=0.8)
    axes.set_xlabel("domain gain to random, nats per token (right is better)")
    axes.set_ylabel("forgetting to random, nats per token (down is better)")
    axes.set_title(
        f"25 % of {len(runs)} pools with 40 % faults, equal epochs; 95 % intervals", fontsize=10
    )
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def draw_budgets(runs: Sequence[Run], file: Path) -> None:
    """Domain gain and forgetting against the budget, a column per footing; means over pools, the
    whole pool dashed.
    """
    footings = list(dict.fromkeys(run["equal"] for run in runs))
    every = subsets(name for run in runs for name in run["models"])
    colours = {
        method: f"C{i}" for i, method in enumerate(dict.fromkeys(method for method, _ in every))
    }
    ticks = sorted({budget for _, budget in every})
    figure, axes = _pyplot().subplots(
        2, len(footings), figsize=(8, 6), sharex=True, layout="constrained", squeeze=False
    )
    for column, equal in enumerate(footings):
        chosen = [run for run in runs if run["equal"] == equal]
        trained = subsets(chosen[0]["models"])
        for row, (words, measure) in enumerate(
            {"domain gain": gain, "forgetting": forgetting}.items()
        ):
            panel = axes[row][column]
            for method in dict.fromkeys(method for method, _ in trained):
                budgets = sorted(budget for which, budget in trained if which == method)
                means = [
                    sum(measure(run, variant(method, b)) for run in chosen) / len(chosen)
                    for b in budgets
                ]
                panel.plot(
                    budgets, means, marker="o", ms=3, lw=1, color=colours[method], label=method
                )
            whole = sum(measure(run, "full") for run in chosen) / len(chosen)
            panel.axhline(whole, color="0.3", lw=0.8, ls="--", label="whole pool")
            panel.axhline(0, color="0.7", lw=0.8)
            panel.set_xscale("log")
            panel.set_xticks(ticks, [f"{b * 100:g} %" for b in ticks])
            panel.minorticks_off()
            panel.set_title(f"{words}, equal {equal}", fontsize=10)
    axes[0][0].set_ylabel("nats per token to the base model")
    axes[1][0].set_ylabel("nats per token to the base model")
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit status 1 where pages are out of date",
    )
    options = parser.parse_args()
    stale = []
    for page in PAGES:
        text = (REPO / page).read_text()
        if filled(text) != text:
            stale.append(page)
            if not options.check:
                (REPO / page).write_text(filled(text))
    if options.check:
        raise SystemExit(
            f"out of date: {', '.join(stale)}; run: python scripts/study/pages.py" if stale else 0
        )
    runs = [run for run in results("main")["runs"] if run["equal"] == "epochs" and run["noise"] > 0]
    draw(runs, REPO / FIGURE)
    draw_budgets(results("budgets")["runs"], REPO / BUDGETS)
    print(f"written: {', '.join([*stale, FIGURE, BUDGETS])}")


if __name__ == "__main__":
    main()
