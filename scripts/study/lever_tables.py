"""What the runs of scripts/study/levers.py say together: means over pools, and tables of them.

Pure: the records of docs/results/study_forgetting.json in, numbers and text out.
"""

from __future__ import annotations

from collections import Counter
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
    first = next(iter(by_footing), None)
    sweep = {"all": limits(runs)}
    if first is not None:
        sweep[first] = limits(by_footing[first])
        for role in dict.fromkeys(run["role"] for run in by_footing[first]):
            having = [run for run in by_footing[first] if run["role"] == role]
            sweep[f"{first}, {role}"] = limits(having)
    together = {"best": {"all": promises(runs), **best}, "sweep": sweep, "levers": levers}
    return together | {"kept": kept_at_all_limits(runs)}


def kept_at_all_limits(runs: Sequence[Mapping[str, Any]]) -> Json:
    """Of what all limits of the sweep would have published in all runs, how much kept its limit on
    the audit half; and of the pools, in how many all of it did. A run's limits and a pool's runs
    share their prompts: the second share holds for other pools, the first for these alone.
    """
    pools: dict[Any, list[bool]] = {}
    for run in runs:
        for best in run["sweep"]:
            if best["chosen"] is not None:
                key = (run["domain"], run["noise"], run["seed"])
                pools.setdefault(key, []).append(best["kept"])
    published = [kept for having in pools.values() for kept in having]
    return {
        "published": _share(published),
        "pools": _share([all(having) for having in pools.values()]),
    }


def _share(kept: Sequence[bool]) -> list[float | None]:
    """[how many of them, all, share, low, high] with the exact 95 % interval (Clopper-Pearson)."""
    if not kept:
        return [0, 0, None, None, None]
    ends = stats.binomtest(sum(kept), len(kept)).proportion_ci(0.95, "exact")
    return [sum(kept), len(kept), *rounded([sum(kept) / len(kept), ends.low, ends.high])]


def limits(runs: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Per limit of the sweep: the promises of what it would have published."""
    found = []
    for place, limit in enumerate(best["limit"] for best in runs[0]["sweep"]):
        entry = promises([{**run, "best": run["sweep"][place]} for run in runs])
        found.append({"limit": limit} | entry)
    return found


def promises(runs: Sequence[Mapping[str, Any]]) -> Json:
    """How many runs published a model, of what kinds, how many of those kept the limit on the audit
    half with the share's exact 95 % interval (Clopper-Pearson), and the means of what was
    published: over pools, of each pool's mean over its runs.
    """
    there = [run for run in runs if run["best"]["chosen"] is not None]
    found: Json = {"runs": len(runs), "published": len(there)}
    if not there:
        return found
    kept, _, *share = _share([run["best"]["kept"] for run in there])
    found |= {
        "kept": kept,
        "share": share,
        "kinds": dict(Counter(sorted(run["best"]["kind"] for run in there))),
    }
    for key in ("gain", "audit", "cost_in_gain", "audit_excess"):
        pools: dict[Any, list[float]] = {}
        for run in there:
            value = run["best"][key]
            value = value if key == "gain" else value[0]
            if value is not None:
                pools.setdefault((run["domain"], run["noise"], run["seed"]), []).append(value)
        found[key] = over_pools([float(np.mean(values)) for values in pools.values()])
    return found


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
    for footing, entries in found["sweep"].items():
        lines.append(f"{footing}, by limit: runs published kept  gain, audit half, excess")
        for entry in entries:
            told = [_told(entry.get(key)) for key in ("gain", "audit", "audit_excess")]
            counts = f"{entry['runs']:4d} {entry['published']:9d} {entry.get('kept', 0):4d}"
            lines.append(f"  {entry['limit']:10g} {counts}  {' '.join(told)} {entry.get('kinds')}")
    for footing, models in found["levers"].items():
        lines.append(f"{footing}: gain, divergence, its excess over random's line")
        for model, entry in models.items():
            told = [_told(entry.get(key)) for key in ("gain", KL, f"{KL}_excess")]
            lines.append(f"  {model:18s} {entry['pools']:2d} {' '.join(told)}")
    lines.append(f"kept over all limits: {found['kept']}")
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
