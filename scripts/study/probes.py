"""Small for large: does a cheaper probe choose the same rows, and what does the model learn from
its choice?

    python scripts/study/probes.py configs/study/main.yaml --material FOLDER [--jobs 2] [--results
    FILE] [--collect]

Reads a study that has run (scripts/study/run.py). For every cell on the footing of equal epochs,
each of `probes` (a smaller model, a LoRA probe, none at all) scores the same pool; the first method
chooses from its table at the first budget, and the study's model is trained on that choice. Writes
runs into the cell's folder and to FILE (JSON): the rank correlation of the two tables' signals, the
share of the study's own choice that was chosen again, held-out losses, and FLOPs and seconds of the
probe and of training, of both. Resumable. Prints the tables: what is chosen, and what the road from
probe to model costs against training on everything.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.study.collect import MEASURED, choice, flops, parameters_of, probe_flops, seconds_of
from scripts.study.design import Cell, Equal, Study, cells, footings, pairs, read, variant
from scripts.study.footings import grads_ds, side_by_side, tell_failures, threads_each
from scripts.study.run_configs import placed, run_config
from scripts.study.tables import spread

EQUAL: Equal = "epochs"
COSTS = ("flops", "seconds")


def run_probe(study: Study, material: Path, cell: Cell, name: str, threads: int) -> None:
    """Score the cell's pool with one probe, choose, train the study's model on the choice,
    evaluate.
    """
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
        "model": {**plain["model"], **placed(material, other.model)},
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


def collect(study: Study, material: Path) -> dict[str, Any]:
    """Every finished probe's numbers beside those of the study's own."""
    from grads_ds.statistics import spearman

    main = variant(*pairs(study, EQUAL)[0])
    random = main.replace(pairs(study, EQUAL)[0][0], "random")
    records = []
    for cell in cells(study):
        for name, probe in study.probes.items():
            folder = Path(study.out) / cell.folder
            own, other, after = (
                folder / EQUAL,
                folder / f"probe-{name}",
                folder / f"probe-{name}-sft",
            )
            if not (after / "evaluation.json").is_file():
                continue
            a, b = (choice(run / "selection") for run in (own, other))
            paths = (study.model, probe.model.get("path", study.model))
            both = sorted(set(a) & set(b))
            chosen = [{i for i, (_, taken) in table.items() if taken} for table in (a, b)]
            reference = json.loads((own / "evaluation.json").read_text())["models"]
            trained = json.loads((after / "evaluation.json").read_text())["models"]
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
                    "rank_correlation": spearman(
                        *(np.array([table[i][0] for i in both]) for table in (a, b))
                    ),
                    "chosen_again": len(chosen[0] & chosen[1]) / len(chosen[0]),
                    "by_chance": len(chosen[0]) / len(a),
                    "seconds": _seconds(own, other, after),
                    "flops": _flops(
                        own, other, after, *(parameters_of(material / path) for path in paths)
                    ),
                    "models": {
                        model: {
                            which: {key: found[key] for key in MEASURED}
                            for which, found in sets.items()
                        }
                        for model, sets in models.items()
                    },
                }
            )
    return {"study": study.model_dump(mode="json"), "runs": records}


def _seconds(own: Path, other: Path, after: Path) -> dict[str, float]:
    """Wall time: of everything (training on the whole pool), of the study's own road and of the
    other probe's.
    """
    spent, scored, trained = seconds_of(own), seconds_of(other), seconds_of(after)

    def road(units: dict[str, float]) -> float:
        own_units = ("probe/", "select/selected")
        return sum(spent for unit, spent in units.items() if unit.startswith(own_units))

    return {
        "everything": spent["sft/full"],
        "own": road(spent) + spent["sft/selected"],
        "other": road(scored) + trained["sft/selected"],
    }


def _flops(own: Path, other: Path, after: Path, parameters: int, of_probe: int) -> dict[str, float]:
    """The same in FLOPs."""
    spent = flops(own, parameters)
    return {
        "everything": spent["full"],
        "own": spent["probe"] + spent["selected"],
        "other": probe_flops(other, of_probe) + flops(after, parameters)["selected"],
    }


def table(results: dict[str, Any]) -> str:
    """A line per probe, the study's own first: means over cells, the domain loss's difference to
    the study's own choice, to random and to everything (95 % t-interval), and the cost of probe,
    choice and training as a share of training on everything.
    """
    lines = [
        (
            "| probe | cells | rank correlation | chosen again (chance) | domain loss to own choice"
            " | to random | to everything | FLOPs | seconds |"
        ),
        "|" + "---|" * 9,
    ]
    names = list(results["study"]["probes"])
    for name in ("own", *names):
        runs = [
            run for run in results["runs"] if run["probe"] == (names[0] if name == "own" else name)
        ]
        if not runs:
            continue
        which = "own" if name == "own" else "other"
        loss = lambda run, model: run["models"][model]["domain"]["loss"]  # noqa: E731
        against = []
        for model in ("own", "random", "full"):
            against.append(
                "-"
                if model == which
                else spread([loss(run, which) - loss(run, model) for run in runs])
            )
        mean = lambda key, runs=runs: sum(run[key] for run in runs) / len(runs)  # noqa: E731
        same = (
            "- | -"
            if name == "own"
            else (
                f"{mean('rank_correlation'):.2f} | {mean('chosen_again'):.0%}"
                f" ({mean('by_chance'):.0%})"
            )
        )
        cost = [
            sum(run[kind][which] for run in runs) / sum(run[kind]["everything"] for run in runs)
            for kind in COSTS
        ]
        lines.append(
            f"| {name} | {len(runs)} | {same} | "
            + " | ".join(against)
            + f" | {cost[0]:.2f} | {cost[1]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--material", type=Path, required=True, help="folder that holds what the study names"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="probes at a time; they share the machine's cores"
    )
    parser.add_argument("--results", type=Path, default=Path("docs/results/study_probes.json"))
    parser.add_argument(
        "--collect", action="store_true", help="run nothing; gather what is finished"
    )
    options = parser.parse_args()
    study = read(options.study)
    material = options.material.resolve()
    threads = threads_each(options.jobs)
    work = [
        [(cell, name)]
        for cell in cells(study)
        if EQUAL in footings(study, cell)
        for name in study.probes
    ]
    failed = []
    for (cell, name), error in side_by_side(
        options.jobs,
        lambda pair: run_probe(study, material, *pair, threads),
        [] if options.collect else work,
    ):
        failed += [f"{name} on {cell.folder}: {error}"] if error else []
        print(f"study: {name} on {cell.folder}", flush=True)
    results = collect(study, material)
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    tell_failures(failed)


if __name__ == "__main__":
    main()
