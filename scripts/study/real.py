"""The study on a real model: runs the cells, and gathers what a real model's signals see.

    python scripts/study/real.py configs/study/real_small.yaml --material FOLDER
        [--to probe] [--cells medicine-noise0.4-seed0 ...] [--jobs N] [--collect]

Runs what scripts/study/run.py runs (resumable: what is finished is skipped) and writes to `results`
(JSON), of every cell whose pool is scored, finished or not: each column's area under the curve for
the probe's controls and for the noise that was planted, the rows of each kind that every method
keeps (those under `chosen` too, from the same score table), and, of the trained models, held-out
losses and the content margin: the loss of another row's answer less the loss of the true one, per
held-out question, with paired 95 % intervals against random. Prints them as tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from grads_ds.config.errors import UserError
from grads_ds.config.load import load_config
from grads_ds.run_dir.publish import publish_json
from grads_ds.scores.read import ScoreTable, read_table
from grads_ds.selection import control_areas
from grads_ds.selection.pool import read_pool
from grads_ds.selection.stage import decide
from grads_ds.statistics import area_under_curve, bootstrap_interval
from scripts.study import orders
from scripts.study.design import Study, cells, footings, pairs, read, variant
from scripts.study.footings import Place, run_cells, tell_failures
from scripts.study.run_configs import method_settings
from scripts.study.tables import interval

RESAMPLES = 10_000


def planted_areas(table: ScoreTable, kinds: np.ndarray) -> dict[str, dict[str, float]]:
    """Column -> kind of planted noise -> area under the curve against the clean rows, among rows of
    like length. `kinds` [N] in the order of the table.
    """
    lengths, clean = table.floats("num_target_tokens"), kinds == "clean"
    found: dict[str, dict[str, float]] = {}
    for column in control_areas.columns_of(table):
        values = table.floats(column)
        shares = control_areas.within_length(values, lengths, values, lengths)
        for kind in sorted({str(kind) for kind in kinds} - {"clean"}):
            area = area_under_curve(shares[kinds == kind], shares[clean])
            if area is not None:
                found.setdefault(column, {})[kind] = round(area, 4)
    return found


def kept_by_kind(
    config: Any, run: Path, settings: Mapping[str, Any], kinds: np.ndarray
) -> dict[str, Any]:
    """How many rows of each kind a method's settings choose, what was rejected, and the ids of what
    was chosen.
    """
    given = method_settings(dict(settings), run)
    chosen = config.model_copy(update={"select": type(config.select)(**given)})
    try:
        table, _, _, choice, report = decide(chosen, None, run)
    except UserError as error:
        return {"cannot": "; ".join(error.problems)}
    words, counts = np.unique(kinds[choice.selected], return_counts=True)
    kept = {str(word): int(count) for word, count in zip(words, counts, strict=True)}
    told = {"kept": kept, "filters": report["filters"], "warnings": report["warnings"]}
    return told | {"chosen": table.sample_id[choice.selected]}


def trained_on(run: Path, name: str, main: str) -> np.ndarray:
    """The ids of the samples that a model was trained on, int64, in the pool's order."""
    folder = run / "selection" / ("" if name == main else f"variants/{name}")
    found = pq.read_table(folder / "selection.parquet", columns=["sample_id", "selected"])
    return np.sort(found["sample_id"].to_numpy()[found["selected"].to_numpy()])


def sample_losses(run: Path, found: Mapping[str, Any]) -> np.ndarray:
    """The losses of a held-out set's rows, in their order, float64 [N]."""
    table = pq.read_table(run / found["sample_losses_file"])
    return np.asarray(table["loss"].to_numpy(), np.float64)


def margins(run: Path, main: str, comparisons: int) -> dict[str, Any]:
    """Per model the held-out losses and the content margin, each with its paired difference to
    random's and, `jointly`, that with the interval that holds over so many comparisons (Bonferroni,
    95 %); {} before anything is evaluated.
    """
    file = run / "evaluation.json"
    if not file.is_file():
        return {}
    models = json.loads(file.read_text())["models"]
    by_name: dict[str, dict[str, np.ndarray]] = {}
    for name, sets in models.items():
        losses = {which: sample_losses(run, found) for which, found in sets.items()}
        losses["margin"] = losses["swapped"] - losses["domain"]
        by_name[main if name == "selected" else name] = losses
    random = next((losses for name, losses in by_name.items() if name.startswith("random")), None)
    found: dict[str, Any] = {}
    for name, losses in by_name.items():
        entry: dict[str, Any] = {which: round(float(v.mean()), 4) for which, v in losses.items()}
        entry["void"] = bool(losses["domain"].mean() > by_name["base"]["domain"].mean())
        for which in ("domain", "margin") if random is not None and losses is not random else ():
            difference = losses[which] - random[which]
            for name_of, level in (("", 0.95), ("_jointly", 1 - 0.05 / comparisons)):
                low, high = bootstrap_interval(difference, RESAMPLES, 0, level=level)
                entry[f"{which}_minus_random{name_of}"] = [
                    round(float(value), 4) for value in (difference.mean(), low, high)
                ]
        found[name] = entry
    return found


def collect(study: Study) -> dict[str, Any]:
    """Every cell whose pool has been scored."""
    records = []
    places = [Path(study.out) / c.folder / e for c in cells(study) for e in footings(study, c)]
    evaluated = sum((place / "evaluation.json").is_file() for place in places)
    for cell in cells(study):
        for equal in footings(study, cell):
            folder = Path(study.out) / cell.folder
            run, file = folder / equal, folder / f"{equal}.yaml"
            if not (run / "scores/manifest.json").is_file():
                continue
            config = load_config(file)
            table, pool = read_table(run / "scores/table.parquet"), read_pool(run / "prepared/pool")
            codes, words = pool.fields()["kind"]
            kinds = np.array(words)[codes[pool.positions(table.sample_id)]]
            budget = study.footings[equal].budgets[0]
            methods = {**study.methods, **study.chosen}
            kept = {
                name: kept_by_kind(config, run, {"budget": budget, **given}, kinds)
                for name, given in methods.items()
            }
            main = variant(*pairs(study, equal)[0])
            models = margins(run, main, 2 * evaluated)
            # a model of rows that the settings of today would not choose says nothing of them
            for name in study.methods if models else ():
                label, ids = variant(name, budget), np.sort(kept[name].get("chosen", []))
                if not np.array_equal(trained_on(run, label, main), ids):
                    print(f"study: {folder.name}: {label} was trained on other rows: left out")
                    del models[label]
            for found in kept.values():
                found.pop("chosen", None)
            records.append(
                {
                    "domain": cell.domain,
                    "noise": cell.noise,
                    "seed": cell.seed,
                    "equal": equal,
                    "pool": {str(k): int((kinds == k).sum()) for k in sorted(set(kinds))},
                    "controls": control_areas.report(table),
                    "planted_area_among_like_length": planted_areas(table, kinds),
                    "kept": kept,
                    "models": models,
                }
            )
    return {
        "study": study.model_dump(mode="json"),
        "cells": records,
        "pooled": {str(share): pooled(records, share) for share in study.noise},
    }


def pooled(records: Sequence[Mapping[str, Any]], noise: float) -> dict[str, Any]:
    """Over the pools with this share of noise, per method: pools, the share of clean rows among
    those chosen, and of what was trained the difference to random with its 95 % t-interval over
    pools (none with fewer than two).
    """
    having = [record for record in records if record["noise"] == noise]
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for record in having for name in record["kept"]):
        kept = [record["kept"][name].get("kept", {}) for record in having]
        purity = [one.get("clean", 0) / sum(one.values()) for one in kept if one]
        entry: dict[str, Any] = {"pools": len(purity)}
        if purity:
            entry |= {"clean": round(float(np.mean(purity)), 4), "clean_least": min(purity)}
        trained = [
            model
            for record in having
            for label, model in record["models"].items()
            if label.rsplit("_", 1)[0] == name and "margin_minus_random" in model
        ]
        for measure in ("margin_minus_random", "domain_minus_random") if trained else ():
            mean, low, high = interval([model[measure][0] for model in trained])
            entry["trained"] = len(trained)
            entry[measure] = [round(v, 4) if np.isfinite(v) else None for v in (mean, low, high)]
        found[name] = entry
    return found


def as_text(results: Mapping[str, Any]) -> str:
    """The tables, for a terminal."""
    lines: list[str] = []
    for cell in results["cells"]:
        lines += ["", f"{cell['domain']}, {cell['noise']:.0%} noise, seed {cell['seed']}:"]
        lines += [f"  pool {cell['pool']}", "  area among rows of like length (controls; planted)"]
        controls = (cell["controls"] or {}).get("area_among_like_length", {})
        for column, planted in cell["planted_area_among_like_length"].items():
            lines.append(f"    {column:32s} {controls.get(column, {})}  {planted}")
        lines.append("  kept")
        for name, found in cell["kept"].items():
            lines.append(f"    {name:20s} {found.get('kept', found.get('cannot'))}")
        for name, entry in cell["models"].items():
            lines.append(f"    {name:20s} {entry}")
    for share, methods in results["pooled"].items():
        lines += [f"pools with {float(share):.0%} noise"] if methods else []
        lines += [f"    {name:20s} {entry}" for name, entry in methods.items()]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--material", type=Path, required=True, help="folder of models and data")
    parser.add_argument("--threads", type=int, default=2, help="of one run")
    parser.add_argument(
        "--to", default="evaluate", help="last stage; probe: no training, what each method chooses"
    )
    parser.add_argument("--cells", nargs="+", help="these alone, by the names of their folders")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--collect", action="store_true", help="gather what is finished")
    options = parser.parse_args()
    study = read(options.study)
    orders.register(Path(study.out))
    place = Place(options.material.resolve(), options.jobs, 1, options.threads, options.to)
    wanted = [cell for cell in cells(study) if cell.folder in (options.cells or [cell.folder])]

    def ended() -> None:
        if options.jobs == 1:  # else the runs that go on need the cores
            publish_json(Path(study.results), collect(study))

    failed = run_cells(study, [] if options.collect else wanted, place, ended)
    results = collect(study)
    publish_json(Path(study.results), results)
    print(as_text(results))
    tell_failures(failed)


if __name__ == "__main__":
    main()
