"""Small for large: does a cheaper probe choose the same rows, and what does the model learn from its choice?

    python scripts/study_probes.py configs/study/main.yaml --material FOLDER [--jobs 2] [--results FILE] [--collect]

Reads a study that has run (scripts/study.py). For every cell on the footing of equal epochs, each of `probes` (a smaller model, a LoRA
probe, none at all) scores the same pool; the first method chooses from its table at the first budget, and the study's model is
trained on that choice. Writes runs into the cell's folder and to FILE (JSON, docs/study_probes.json): the rank correlation of the two
tables' signals, the share of the study's own choice that was chosen again, held-out losses, FLOPs and seconds of both
probes. Resumable. Prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from study import grads_ds
from study_collect import MEASURED, parameters_of
from study_design import REPO, Cell, Study, cells, footings, pairs, run_config, variant
from study_tables import interval

EQUAL = "epochs"


def run_probe(study: Study, material: Path, cell: Cell, name: str, threads: int) -> None:
    """Score the cell's pool with one probe, choose, train the study's model on the choice, evaluate."""
    folder = Path(study.out).resolve() / cell.folder
    if not (folder / EQUAL / "evaluation.json").is_file():
        return
    other = study.probes[name]
    plain = run_config(study.model_copy(update={"anchor": 0}), material, cell, folder, EQUAL)
    choice = {**plain["select"], "order": "pool", "variants": {}}
    sft = {**plain["sft"], "variants": []}
    scored = {
        **plain,
        "run_dir": str(folder / f"probe-{name}"),
        "model": {**plain["model"], **_below(material, other.model)},
        "data": {**plain["data"], **other.data},
        "probe": {**plain["probe"], **other.probe},
        "select": choice,
        "sft": sft,
    }
    chosen = folder / f"probe-{name}/selection/selected.jsonl"
    trained = {
        **plain,
        "run_dir": str(folder / f"probe-{name}-sft"),
        "data": {**plain["data"], "train": [str(chosen)]},
        "probe": {**plain["probe"], "epochs": 0},
        "select": {"method": "random", "budget": 1.0},
        "sft": sft,
    }
    for config, last in ((scored, "select"), (trained, "evaluate")):
        file = Path(config["run_dir"]).with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        done = {"select": "selection/selection.json", "evaluate": "evaluation.json"}[last]
        if not (Path(config["run_dir"]) / done).is_file():
            grads_ds(file, 1, threads, last)


def _below(material: Path, model: dict[str, Any]) -> dict[str, Any]:
    placed = {"path": material, "chat_template": REPO}
    return {key: str(placed[key] / value) if key in placed else value for key, value in model.items()}


def collect(study: Study, material: Path) -> dict[str, Any]:
    """Every finished probe's numbers beside those of the study's own."""
    from grads_ds.selection.numbers import spearman

    main = variant(*pairs(study, EQUAL)[0])
    random = main.replace(pairs(study, EQUAL)[0][0], "random")
    records = []
    for cell in cells(study):
        for name, probe in study.probes.items():
            folder = Path(study.out) / cell.folder
            own, other, after = folder / EQUAL, folder / f"probe-{name}", folder / f"probe-{name}-sft"
            if not (after / "evaluation.json").is_file():
                continue
            a, b = (_choice(run) for run in (own, other))
            both = sorted(set(a) & set(b))
            chosen = [{i for i, (_, taken) in table.items() if taken} for table in (a, b)]
            reference = json.loads((own / "evaluation.json").read_text())["models"]
            trained = json.loads((after / "evaluation.json").read_text())["models"]
            parameters = parameters_of(material / probe.model.get("path", study.model))
            models = {
                "base": reference["base"],
                "full": reference["full"],
                "random": reference[random],
                "own": reference["selected"],
                "other": trained["selected"],
            }
            records.append(
                asdict(cell)
                | {
                    "probe": name,
                    "parameters": parameters,
                    "rank_correlation": spearman(*([table[i][0] for i in both] for table in (a, b))),
                    "chosen_again": len(chosen[0] & chosen[1]) / len(chosen[0]),
                    "by_chance": len(chosen[0]) / len(a),
                    "seconds": {"own": _seconds(own), "other": _seconds(other)},
                    "models": {
                        model: {which: {key: found[key] for key in MEASURED} for which, found in sets.items()}
                        for model, sets in models.items()
                    },
                }
            )
    return {"study": study.model_dump(mode="json"), "runs": records}


def _choice(run: Path) -> dict[int, tuple[float, bool]]:
    table = pq.read_table(run / "selection/selection.parquet", columns=["sample_id", "signal", "selected"])
    columns = (table[name].to_pylist() for name in ("sample_id", "signal", "selected"))
    return {i: (signal, taken) for i, signal, taken in zip(*columns, strict=True)}


def _seconds(run: Path) -> float:
    return float(sum(json.loads(file.read_text())["seconds"] for file in (run / "state").glob("probe.*.json")))


def table(results: dict[str, Any]) -> str:
    """A line per probe: means over cells, and the domain loss's difference to the study's own choice and to random (95 % t-interval)."""
    lines = [
        "| probe | cells | rank correlation | chosen again (chance) | domain loss to own choice | to random | probe seconds to own |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in results["study"]["probes"]:
        runs = [run for run in results["runs"] if run["probe"] == name]
        if not runs:
            continue
        mean = lambda key, runs=runs: sum(run[key] for run in runs) / len(runs)  # noqa: E731
        against = {
            model: interval(
                [run["models"]["other"]["domain"]["loss"] - run["models"][model]["domain"]["loss"] for run in runs]
            )
            for model in ("own", "random")
        }
        shown = [f"{middle:+.3f} ({low:+.3f} to {high:+.3f})" for middle, low, high in against.values()]
        time = sum(run["seconds"]["other"] for run in runs) / sum(run["seconds"]["own"] for run in runs)
        lines.append(
            f"| {name} | {len(runs)} | {mean('rank_correlation'):.2f} | {mean('chosen_again'):.0%} ({mean('by_chance'):.0%}) | "
            f"{shown[0]} | {shown[1]} | {time:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--material", type=Path, required=True, help="folder that holds what the study names")
    parser.add_argument("--jobs", type=int, default=1, help="probes at a time; they share the machine's cores")
    parser.add_argument("--results", type=Path, default=Path("docs/study_probes.json"))
    parser.add_argument("--collect", action="store_true", help="run nothing; gather what is finished")
    options = parser.parse_args()
    study = Study.model_validate(yaml.safe_load(options.study.read_text()))
    material = options.material.resolve()
    threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)
    work = [(cell, name) for cell in cells(study) if EQUAL in footings(study, cell) for name in study.probes]
    with ThreadPoolExecutor(options.jobs) as workers:
        running = [
            workers.submit(run_probe, study, material, cell, name, threads)
            for cell, name in (() if options.collect else work)
        ]
        for done in running:
            try:
                done.result()
            except BaseException:
                workers.shutdown(wait=False, cancel_futures=True)
                raise
    results = collect(study, material)
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
