"""Look at what the stages that are due are about to read, before any work starts."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.engine.model_check import check_model
from grads_ds.evaluate.task_files import task_faults
from grads_ds.training.division import check_training


def check_inputs(config: Config, stages: Collection[str], ranks: int) -> None:
    """Look at what the named stages are about to read. Raises UserError with every fault found.

    `stages` are those that are due and their units that are ("probe", "probe/train"), `ranks` is
    how many the distributed ones will have.
    """
    faults: list[str] = []
    run_dir = Path(config.run_dir)
    if "prepare" in stages:
        from grads_ds.data.stage import check_prepare

        faults += check_prepare(config)
    if {"probe", "sft", "evaluate"} & set(stages):
        faults += check_model(config.model.path)
    if "probe/train" in stages:  # a recording goes on with any number of ranks
        faults += check_training(config, "probe", config.probe, ranks)
    if "select" in stages:
        from grads_ds.selection.requirements import check_select

        faults += check_select(config, run_dir)
        if "prepare" not in stages:
            faults += check_budgets(config, run_dir)
    if "sft" in stages:
        faults += check_training(config, "sft", config.sft, ranks)
    if "evaluate" in stages:
        faults += task_faults(config.evaluate)
    if faults:
        raise UserError(list(dict.fromkeys(faults)))


def check_budgets(config: Config, run_dir: Path) -> list[str]:
    """Faults of budgets given as a count that the prepared pool does not hold."""
    pool = json.loads((run_dir / "prepared/prepared.json").read_text())["sets"]["pool"]["kept"]
    faults = []
    for name in (None, *config.select.variants):
        budget = config.select.resolve(name).budget
        if isinstance(budget, float) and budget > max(1, pool):
            where = f"select.variants.{name}.budget" if name else "select.budget"
            faults.append(
                f"{where}: wanted at most the pool's {pool} samples; found {budget:g}; lower it or"
                " add data"
            )
    return faults
