"""Several runs side by side: what they chose in common, what it came to, what it cost. Reads their
run directories alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grads_ds.config.errors import UserError, printable, problem
from grads_ds.report.outcome import Difference, Outcome, outcome_of, paired_interval, sample_losses
from grads_ds.report.read_run import Run, read_files
from grads_ds.run_dir.layout import MAIN
from grads_ds.run_dir.provenance import RESOLVED
from grads_ds.run_dir.units import foreign_outputs
from grads_ds.scores.read import arrow_table

MOST = 12  # runs that still fit beside each other
_READ = (
    "scores/table.parquet",
    "selection/selection.parquet",
    "selection/selection.json",
    "evaluation.json",
)


@dataclass(frozen=True)
class ComparedRun:
    """One run: its files, what came of it (None before an evaluation), the content hashes of the
    rows that it chose, and seconds by stage.
    """

    name: str
    run: Run
    outcome: Outcome | None
    chosen: frozenset[str]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Loss:
    """The selected model of one run on one held-out set. `to_first`: less the first run's, where
    both were measured on the same rows.
    """

    value: float
    interval: tuple[float, float] | None
    to_base: Difference | None
    to_random: Difference | None
    to_first: Difference | None


@dataclass(frozen=True)
class RunComparison:
    """Everything compared; lists are in the order of `runs`. `overlap`: [run][run] -> rows in
    common over rows in either. `losses`: set -> per run, None where it was not measured.
    `differing`: config key -> its value in each run. `warnings`: why numbers may not compare.
    """

    runs: list[ComparedRun]
    overlap: list[list[float]]
    losses: dict[str, list[Loss | None]]
    forgetting: list[str]  # those of the sets that must not be forgotten
    differing: dict[str, list[str]]
    warnings: list[str]


def compare_runs(folders: Sequence[Path]) -> RunComparison:
    """Read the runs and set them side by side.

    Raises UserError with every problem: fewer than two runs, one given twice, one that has no
    selection yet.
    """
    problems = []
    if not 2 <= len({folder.resolve() for folder in folders}) == len(folders) <= MOST:
        problems.append(
            problem(
                "compare",
                f"2 to {MOST} run directories, each once",
                f"{len(folders)}: {', '.join(map(str, folders))}",
                "give each run once",
            )
        )
    runs = []
    for folder, name in zip(folders, _names(folders), strict=True):
        try:
            runs.append(_read(folder, name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    chosen = [run.chosen for run in runs]
    overlap = [[len(a & b) / max(1, len(a | b)) for b in chosen] for a in chosen]
    sets = list(dict.fromkeys(s for run in runs if run.outcome for s in run.outcome.sets))
    general = [s for s in sets if any(run.outcome and s in run.outcome.general for run in runs)]
    return RunComparison(
        runs=runs,
        overlap=overlap,
        losses={name: _losses(runs, name) for name in sets},
        forgetting=general,
        differing=_differing([run.run.config for run in runs]),
        warnings=_warnings(runs, sets),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)) and depth < max(map(len, parts)):
        depth += 1
    return [printable("/".join(p[-depth:])) for p in parts]


def _read(folder: Path, name: str) -> ComparedRun:
    if not (folder / RESOLVED).is_file():
        raise UserError(
            problem(
                str(folder),
                f"a run directory with its {RESOLVED}",
                "none",
                "give run_dir of a config; grads-ds run CONFIG makes it",
            )
        )
    if foreign := foreign_outputs(folder, _READ):
        fix = "grads-ds run CONFIG makes it again"
        raise UserError([problem(str(folder), "the run's own results", f, fix) for f in foreign])
    # runs of other versions compare too: their configs are read, not checked
    run = read_files(folder, [], [], {})
    outcome = outcome_of(run.evaluation, folder) if run.evaluation else None
    seconds: dict[str, float] = {}
    for timing in run.timings:
        stage = timing.unit.split("/")[0]
        seconds[stage] = seconds.get(stage, 0.0) + (timing.seconds or 0.0)
    ids = run.scores.sample_id[run.subsets[0].selected]
    return ComparedRun(name, run, outcome, _hashes(folder, ids), seconds)


def _hashes(folder: Path, ids: np.ndarray) -> frozenset[str]:
    """The content hashes of these rows: runs of different pools share rows, not ids."""
    table = arrow_table(folder / "scores/table.parquet", ["sample_id", "sample_hash"])
    kept = table.filter(pc.is_in(table["sample_id"], value_set=pa.array(ids, pa.int64())))
    return frozenset(str(text) for text in kept["sample_hash"].to_pylist())


def _losses(runs: Sequence[ComparedRun], name: str) -> list[Loss | None]:
    found: list[Loss | None] = []
    for run in runs:
        model = run.outcome.model(MAIN) if run.outcome else None
        measure = model.measures.get(name) if model else None
        found.append(
            None
            if measure is None
            else Loss(
                measure.loss,
                measure.interval,
                measure.against_base,
                measure.against_random,
                None if run is runs[0] else _between(run, runs[0], name),
            )
        )
    return found


def _between(run: ComparedRun, first: ComparedRun, name: str) -> Difference | None:
    """The run's selected model less the first run's; None where their rows are not the same."""
    own, theirs = _row_losses(run, name), _row_losses(first, name)
    if own is None or theirs is None or not np.array_equal(own[1], theirs[1]):
        return None
    value = float(np.average(own[0], weights=own[1]) - np.average(theirs[0], weights=theirs[1]))
    return Difference(value, paired_interval(own[0], [theirs[0]], own[1]))


def _row_losses(run: ComparedRun, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    models = (run.run.evaluation or {}).get("models", {})
    return sample_losses(run.run.run_dir, models.get(MAIN, {}).get(name, {}))


def _differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Config keys whose values are not the same in all runs."""
    flat = [_flat(config) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    return {
        printable(key): [printable(str(one.get(key, "–"))) for one in flat]
        for key in keys
        if key != "run_dir" and len({repr(one.get(key)) for one in flat}) > 1
    }


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{before}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found


def _warnings(runs: Sequence[ComparedRun], sets: Sequence[str]) -> list[str]:
    said = []
    for run in runs:
        if run.outcome is None:
            said.append(f"{run.name} has not been evaluated: it has no losses.")
    models = {str((run.run.config.get("model") or {}).get("path")) for run in runs}
    if len(models) > 1:
        said.append("The runs fine-tune different models: compare differences to base, not losses.")
    for name in sets:
        tokens = [found[1] for run in runs if (found := _row_losses(run, name)) is not None]
        measured = sum(1 for run in runs if run.outcome and name in run.outcome.sets)
        if measured > 1 and len(tokens) < measured:
            said.append(f"{name}: not every run kept its losses row by row: no intervals between.")
        elif any(not np.array_equal(one, tokens[0]) for one in tokens[1:]):
            said.append(f"{name} does not have the same rows in every run: do not compare losses.")
    return said
