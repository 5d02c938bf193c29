"""What the runs of scripts/study/levers.py say together: means over pools, and tables of them.

Pure: the records of docs/results/study_forgetting.json in, numbers and text out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from grads_ds.config.evaluate import KL
from scripts.study.tables import interval

Json = dict[str, Any]


def pooled(runs: Sequence[Mapping[str, Any]]) -> Json:
    """Over pools: per footing the promises kept and what was published, per model the means."""
    by_footing: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_footing.setdefault(run["footing"], []).append(run)
    best = {name: promises(having) for name, having in by_footing.items()}
    levers: Json = {}
    for footing, having in by_footing.items():
        for model in dict.fromkeys(name for run in having for name in run["models"]):
            found = [run["models"][model] for run in having if model in run["models"]]
            levers.setdefault(footing, {})[model] = {"pools": len(found)} | {
                key: over_pools([one[key][0] for one in found])
                for key in found[0]
                if key != "on_line"
            }
    return {"best": {"all": promises(runs), **best}, "levers": levers}


def promises(runs: Sequence[Mapping[str, Any]]) -> Json:
    """How many runs published a model, how many of those kept the limit on the audit half with the
    share's exact 95 % interval (Clopper-Pearson), and the means of what was published.
    """
    published = [run["best"] for run in runs if run["best"]["chosen"] is not None]
    found: Json = {"runs": len(runs), "published": len(published)}
    if not published:
        return found
    kept = sum(best["kept"] for best in published)
    ends = stats.binomtest(kept, len(published)).proportion_ci(0.95, "exact")
    return found | {
        "kept": kept,
        "share": rounded([kept / len(published), ends.low, ends.high]),
        "gain": over_pools([best["gain"] for best in published]),
        "audit": over_pools([best["audit"][0] for best in published]),
        "cost_in_gain": over_pools([best["cost_in_gain"][0] for best in published]),
        "audit_excess": over_pools([best["audit_excess"][0] for best in published]),
    }


def over_pools(values: Sequence[float | None]) -> list[float | int | None]:
    """[mean, low, high, pools] with the 95 % t-interval over the pools that have a value."""
    there = [value for value in values if value is not None]
    return [*(rounded(interval(there)) if there else [None] * 3), len(there)]


def as_text(results: Mapping[str, Any]) -> str:
    """The tables, for a terminal."""
    found = results["pooled"]
    lines = [f"{'best/model':12s} runs published kept  gain, forgetting on the audit half, excess"]
    for footing, entry in found["best"].items():
        told = [_told(entry.get(key)) for key in ("gain", "audit", "audit_excess")]
        counts = f"{entry['runs']:4d} {entry['published']:9d} {entry.get('kept', 0):4d}"
        share = f"share {entry['share']}" if "share" in entry else ""
        lines.append(f"{footing:12s} {counts}  {' '.join(told)} {share}")
    for footing, models in found["levers"].items():
        lines.append(f"{footing}: gain, divergence, its excess over random's line")
        for model, entry in models.items():
            told = [_told(entry.get(key)) for key in ("gain", KL, f"{KL}_excess")]
            lines.append(f"  {model:18s} {entry['pools']:2d} {' '.join(told)}")
    for run in results["runs"]:
        chosen = run["best"]["chosen"]
        pool = f"{run['domain']}-seed{run['seed']}/{run['footing']}"
        lines.append(f"{pool:28s} {run['verdict']} best/model: {chosen}")
    return "\n".join(lines)


def _told(values: Sequence[float | None] | None) -> str:
    if not values or values[0] is None:
        return f"{'-':27s}"
    ends = "one pool" if values[1] is None else f"{values[1]:+.4f} to {values[2]:+.4f}"
    return f"{values[0]:+.4f} ({ends})".ljust(27)


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """To four digits; None for what is none, or infinite."""
    return [None if v is None or not np.isfinite(v) else round(float(v), 4) for v in values]
