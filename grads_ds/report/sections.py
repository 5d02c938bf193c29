"""What the sections of the page show: one function a section, (run, outcome) -> the values of its
template, `templates/<its name>.html`. `outcome` is None before an evaluation.

page.py lists the sections; a larger one has a file of its own (row_table.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import yaml

from grads_ds.report import figures
from grads_ds.report.composition import QUANTILES, norm_table, rank_correlation
from grads_ds.report.composition import composition as composition_of
from grads_ds.report.examples import examples
from grads_ds.report.forgetting import candidates_of, read_forgetting
from grads_ds.report.forgetting_figure import key, picture
from grads_ds.report.method_comparison import method_comparison
from grads_ds.report.outcome import Outcome
from grads_ds.report.read_run import Run, Scores, Subset, read_rows
from grads_ds.report.task_table import task_rows, tradeoff
from grads_ds.report.verdict import verdict as verdict_of
from grads_ds.report.what_to_do import advice

Shown = dict[str, Any]

# norms drawn against length; the others only in the table
DRAWN_GROUPS = ("embedding", "lm_head", "total")
SMALL_HISTOGRAMS = 12


def forgetting(run: Run, outcome: Outcome | None) -> Shown:
    """What to do and why; the picture of gain and forgetting; each model against random's line."""
    found = read_forgetting(run.run_dir, run.evaluation, run.config)
    if found is None:
        return {"found": None}
    return {
        "found": found,
        "advice": advice(found),
        "picture": picture(found),
        "narrow": picture(found, narrow=True),
        "key": key(found),
        "excess": found.frontier.excess if found.frontier is not None else {},
        "plan": (run.evaluation or {}).get("retention"),
    }


def verdict(run: Run, outcome: Outcome | None) -> Shown:
    """Was selecting worth it, in sentences."""
    return {"sentences": verdict_of(outcome, run.prepared) if outcome else []}


def evaluation(run: Run, outcome: Outcome | None) -> Shown:
    """Every model's held-out losses, their differences, and the tasks."""
    drawn = candidates_of(run.run_dir, run.evaluation, run.config) is not None
    return {
        "outcome": outcome,
        "forests": [figures.loss_forest(outcome, s) for s in outcome.sets] if outcome else [],
        # the picture of gain and forgetting says more, where it can be drawn
        "tradeoff": tradeoff(outcome) if outcome and not drawn else None,
        "tasks": task_rows(run.evaluation),
    }


def signal(run: Run, outcome: Outcome | None) -> Shown:
    """The signal's distribution, and the part of it that each subset takes."""
    others = run.subsets[1:]
    return {
        "main": run.subsets[0],
        "histogram": figures.signal_histogram(run.subsets[0]),
        "others": len(others),
        "small": [(s, figures.signal_histogram(s, small=True)) for s in others[:SMALL_HISTOGRAMS]],
    }


def length(run: Run, outcome: Outcome | None) -> Shown:
    """Whether the signal measures more than length."""
    return {
        "scatters": scatters(run.scores, run.subsets[0]),
        "marked": figures.MARKED,
        "correlations": correlations(run.scores, run.subsets[0]),
    }


def composition(run: Run, outcome: Outcome | None) -> Shown:
    """What the subsets are made of."""
    return {"composition": composition_of(run), "subsets": run.subsets}


def methods(run: Run, outcome: Outcome | None) -> Shown:
    """Every method on this run's scores."""
    return {"methods": method_comparison(run.comparison, int(run.subsets[0].selected.sum()))}


def norms(run: Run, outcome: Outcome | None) -> Shown:
    """Quantiles of loss, length and norms."""
    return {"norms": norm_table(run.scores), "quantiles": QUANTILES, "scores": run.scores}


def samples(run: Run, outcome: Outcome | None) -> Shown:
    """The extremes of the signal as text."""
    return {"examples": examples(run, lambda ids: read_rows(run.run_dir, ids))}


def training(run: Run, outcome: Outcome | None) -> Shown:
    """The logged training losses."""
    sft = {name: curve for name, curve in run.curves.items() if name != "probe"}
    probe = {name: curve for name, curve in run.curves.items() if name == "probe"}
    return {
        "probe_curve": figures.training_curves(probe) if probe else None,
        "sft_curves": figures.training_curves(sft) if sft else None,
    }


def settings(run: Run, outcome: Outcome | None) -> Shown:
    """Time spent, versions and the configuration."""
    return {
        "run": run,
        "total_seconds": sum(timing.seconds or 0 for timing in run.timings),
        "settings": _yaml(run.config),
        "prepared": _yaml(run.prepared) if run.prepared else None,
    }


def _yaml(value: Shown) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))


def scatters(scores: Scores, main: Subset) -> list[Any]:
    """Length against norm for the groups that are drawn."""
    groups = [group for group in DRAWN_GROUPS if group in scores.norms] or list(scores.norms)[:2]
    return [figures.length_scatter(scores, group, main, one_of=len(groups)) for group in groups]


def correlations(scores: Scores, main: Subset) -> list[tuple[str, float | None]]:
    """Rank correlation of target tokens with the signal and every norm, over the samples of status
    ok.
    """
    lengths = np.where(scores.ok, scores.num_target_tokens.astype(float), np.nan)
    columns = {"signal": main.signal} | {
        f"{group} norm": values for group, values in scores.norms.items()
    }
    return [(name, rank_correlation(lengths, values)) for name, values in columns.items()]
