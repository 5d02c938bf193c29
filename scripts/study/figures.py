"""The figures of docs/STUDY.md: gain against forgetting, and both against the budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.study.design import subsets, variant
from scripts.study.tables import Run, forgetting, gain, interval


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
        f"25 % of {len(runs)} pools with 40 % noise, equal epochs; 95 % intervals", fontsize=10
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
