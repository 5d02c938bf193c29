"""A gathered run -> the page's HTML.

Everything the rows or the config say is escaped by the template.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from grads_ds.report import figures
from grads_ds.report.composition import QUANTILES, composition, norm_table, rank_correlation
from grads_ds.report.examples import examples
from grads_ds.report.method_comparison import method_comparison
from grads_ds.report.outcome import Difference, Outcome, outcome_of
from grads_ds.report.read_run import Run, Scores, Subset, read_rows
from grads_ds.report.task_table import task_rows, tradeoff
from grads_ds.report.verdict import verdict
from grads_ds.run_dir.layout import MAIN

# norms drawn against length; the others only in the table
DRAWN_GROUPS = ("embedding", "lm_head", "total")
SMALL_HISTOGRAMS = 12


def render(run: Run) -> str:
    """The whole page as text."""
    environment = Environment(
        loader=PackageLoader("grads_ds.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "loss": lambda v: f"{v:.4f}",
        "signed": signed,
        "compact": compact,
        "percent": percent,
        "duration": duration,
        "count": lambda v: f"{v:,}",
        "lift_style": lift_style,
        "perplexity": lambda v: f"{v:,.2f}" if v < 1e4 else f"{v:.3e}",
    }
    outcome = outcome_of(run.evaluation, run.run_dir) if run.evaluation else None
    main = run.subsets[0]
    return environment.get_template("page.html").render(
        run=run,
        name=run.run_dir.resolve().name,
        model=(run.config.get("model") or {}).get("path", "?"),
        made=time.strftime("%Y-%m-%d %H:%M"),
        main=main,
        pool=len(run.scores.sample_id),
        outcome=outcome,
        sentences=verdict(outcome, run.prepared) if outcome else [],
        tiles=tiles(run, main, outcome),
        forests=[figures.loss_forest(outcome, name) for name in outcome.sets] if outcome else [],
        tradeoff=tradeoff(outcome) if outcome else None,
        tasks=task_rows(run.evaluation),
        histogram=figures.signal_histogram(main),
        small=[
            (s, figures.signal_histogram(s, small=True))
            for s in run.subsets[1 : 1 + SMALL_HISTOGRAMS]
        ],
        scatters=scatters(run.scores, main),
        marked=figures.MARKED,
        correlations=correlations(run.scores, main),
        composition=composition(run),
        methods=method_comparison(run.comparison, int(main.selected.sum())),
        norms=norm_table(run.scores),
        quantiles=QUANTILES,
        examples=examples(run, lambda ids: read_rows(run.run_dir, ids)),
        probe_curve=(
            figures.training_curves({"probe": run.curves["probe"]})
            if "probe" in run.curves
            else None
        ),
        sft_curves=(
            figures.training_curves(sft)
            if (sft := {k: v for k, v in run.curves.items() if k != "probe"})
            else None
        ),
        settings=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100),
        prepared=(
            yaml.safe_dump(run.prepared, sort_keys=False, allow_unicode=True, width=100)
            if run.prepared
            else None
        ),
        total_seconds=sum(t.seconds or 0 for t in run.timings),
    )


def tiles(run: Run, main: Subset, outcome: Outcome | None) -> list[tuple[str, str, str, str]]:
    """(label, value, remark, tone) of the numbers at the top."""
    chosen, pool = int(main.selected.sum()), len(run.scores.sample_id)
    found = [
        ("pool", f"{pool:,}", f"samples, {int(run.scores.ok.sum()):,} scored", ""),
        (
            "selected",
            f"{chosen:,}",
            f"{percent(chosen / max(1, pool))} of the pool, by {main.report.get('method', '?')}",
            "",
        ),
    ]
    model = outcome.model(MAIN) if outcome else None
    if outcome is None or model is None:
        return found
    for name in [*outcome.domain, *outcome.general][:4]:
        measure = model.measures.get(name)
        if measure is None or measure.against_base is None:
            continue
        gap = measure.against_base
        remark = "loss against base"
        if name in outcome.domain and measure.against_random is not None:
            remark += f", {signed(measure.against_random.value)} against random"
        found.append(
            (
                f"{name} {'gain' if name in outcome.domain else 'forgetting'}",
                signed(gap.value),
                remark,
                gap.tone,
            )
        )
    return found


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


def signed(value: float | Difference | None) -> str:
    """A difference with its sign, four decimals; a dash for none."""
    if value is None:
        return "–"
    number = value.value if isinstance(value, Difference) else value
    return f"{number:+.4f}".replace("-", "−")


def compact(value: float | None) -> str:
    """Four significant digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return (
        f"{value:,.4g}".replace("-", "−") if abs(value) < 1e5 else f"{value:.3e}".replace("-", "−")
    )


def percent(share: float) -> str:
    """A share as a percentage, finer where it is small."""
    points = 100 * share
    return (
        f"{points:.0f} %"
        if points >= 99.5 or points == 0
        else f"{points:.1f} %"
        if points >= 1
        else f"{points:.2g} %"
    )


def duration(seconds: float | None) -> str:
    """Seconds as s, min or h."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def lift_style(lift: float | None) -> str:
    """CSS class of a lift: over- or under-represented, in three strengths."""
    if lift is None:
        return ""
    steps = 3.0 if lift <= 0 else min(3.0, abs(math.log2(lift)) / 0.5)
    return "" if steps < 0.4 else f"{'over' if lift > 1 else 'under'}{max(1, round(steps))}"
