"""The flow: prepare -> probe -> select -> sft -> evaluate -> report, as stages and their units.

A stage is one or more units (the preliminary training and the recording; one subset; one model), so
that an interrupted or partly changed run repeats only what it must (`unit_inputs.py` has them).
Each stage brings what can be found wrong before it starts. No torch import.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError, problem
from grads_ds.engine.model_check import check_model
from grads_ds.evaluate.task_files import task_problems
from grads_ds.flow.unit_inputs import (
    BEST,
    Unit,
    evaluate_units,
    prepare_units,
    probe_units,
    report_units,
    select_units,
    sft_units,
)
from grads_ds.run_dir.units import record_file, why_due
from grads_ds.training.division import check_training
from grads_ds.training.four_bit_problems import check_four_bit
from grads_ds.training.trainer_problems import check_trainer


@dataclass(frozen=True)
class Stage:
    """One step of the flow. `distributed` stages run on every rank, the others on one process.

    `problems(config, run_dir, ranks)`: what the stage is about to read or to be asked for and
    cannot be right, found before any work starts; only asked when a unit of it is due.
    """

    name: str
    distributed: bool
    units: Callable[[Config, Path], list[Unit]]
    problems: Callable[[Config, Path, int], list[str]]


def _prepare_problems(config: Config, run_dir: Path, ranks: int) -> list[str]:
    from grads_ds.data.stage import check_prepare

    return check_prepare(config)


def _probe_problems(config: Config, run_dir: Path, ranks: int) -> list[str]:
    found = check_model(config.model.path)
    # a recording goes on with any number of ranks
    if any(unit.name == "probe/train" for unit, _ in due_units(STAGES[1], config, run_dir)):
        found += check_training(config, "probe", config.probe, ranks) + check_four_bit(config)
    return found


def _select_problems(config: Config, run_dir: Path, ranks: int) -> list[str]:
    from grads_ds.selection.requirements import check_select

    found = check_select(config, run_dir)
    if not due_units(STAGES[0], config, run_dir):
        found += _budget_problems(config, run_dir)
    return found


def _budget_problems(config: Config, run_dir: Path) -> list[str]:
    """Problems of budgets given as a count that the prepared pool does not hold."""
    pool = json.loads((run_dir / "prepared/prepared.json").read_text())["sets"]["pool"]["kept"]
    found = []
    for name in (None, *config.select.variants):
        budget = config.select.resolve(name).budget
        if isinstance(budget, float) and budget > max(1, pool):
            where = f"select.variants.{name}.budget" if name else "select.budget"
            wanted = f"at most the pool's {pool} samples"
            found.append(problem(where, wanted, f"{budget:g}", "lower it or add data"))
    return found


def _sft_problems(config: Config, run_dir: Path, ranks: int) -> list[str]:
    return [
        *check_model(config.model.path),
        *check_training(config, "sft", config.sft, ranks),
        *check_trainer(config),
        *check_four_bit(config),
    ]


def _evaluate_problems(config: Config, run_dir: Path, ranks: int) -> list[str]:
    return check_model(config.model.path) + task_problems(config.evaluate)


def _report_problems(config: Config, run_dir: Path, ranks: int) -> list[str]:
    return []


STAGES = (
    Stage("prepare", False, prepare_units, _prepare_problems),
    Stage("probe", True, probe_units, _probe_problems),
    Stage("select", False, select_units, _select_problems),
    Stage("sft", True, sft_units, _sft_problems),
    Stage("evaluate", True, evaluate_units, _evaluate_problems),
    Stage("report", False, report_units, _report_problems),
)


# units that read what another unit of their stage writes
FOLLOWING = ("probe/record", BEST)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def due_units(
    stage: Stage, config: Config, run_dir: Path, read: frozenset[str] = frozenset()
) -> list[tuple[Unit, str]]:
    """The stage's units that have to run, each with the reason, given what is recorded now.

    Of the units named in `read`, whose outputs are about to be read, every output is compared.
    """
    due: list[tuple[Unit, str]] = []
    for unit in stage.units(config, run_dir):
        reason = why_due(run_dir, unit.name, unit.inputs, thorough=unit.name in read)
        if reason is None and due and unit.name in FOLLOWING:
            # it follows what is due inside one stage
            reason = f"{due[0][0].name} runs again"
        if reason:
            due.append((unit, reason))
    return due


def units_read(stage: Stage, config: Config, run_dir: Path) -> frozenset[str]:
    """The units whose outputs the stage's due units read."""
    return frozenset(name for unit, _ in due_units(stage, config, run_dir) for name in unit.reads)


def check_upstream(stage: Stage, config: Config, run_dir: Path) -> None:
    """Raise UserError when an earlier stage has to run before this one can, or has left something
    that was altered since and that this one is about to read.
    """
    read = units_read(stage, config, run_dir)
    for earlier in STAGES[: STAGES.index(stage)]:
        due = due_units(earlier, config, run_dir, read)
        if due:
            unit, reason = due[0]
            raise UserError(
                problem(
                    stage.name,
                    f"{earlier.name} to be finished and up to date",
                    f"{unit.name}: {reason}",
                    f"run: grads-ds run CONFIG --to {stage.name}",
                )
            )


def reopen_altered(config: Config, run_dir: Path, stages: Sequence[Stage]) -> None:
    """Make units of `stages` due again whose outputs were altered and are about to be read: by
    units that are due, or by those that become so.
    """
    read: frozenset[str] = frozenset()
    for stage in reversed(STAGES):
        due = due_units(stage, config, run_dir, read)
        for unit, reason in due:
            if stage in stages and why_due(run_dir, unit.name, unit.inputs) is None:
                print(f"{unit.name}: {reason}; it is made again", file=sys.stderr, flush=True)
                record_file(run_dir, unit.name).unlink(missing_ok=True)
            read |= frozenset(unit.reads)


def require_done(who: str, name: str, config: Config, run_dir: Path) -> None:
    """Raise UserError unless unit `name` and all before it are done under this config, and what
    they wrote is as they wrote it.
    """
    read = frozenset({name, "prepare"})
    last = next(stage for stage in STAGES if stage.name == name.partition("/")[0])
    for stage in STAGES[: STAGES.index(last) + 1]:
        for unit, reason in due_units(stage, config, run_dir, read):
            if stage is not last or unit.name == name:
                raise UserError(
                    problem(
                        who,
                        f"{name} finished under this config",
                        f"{unit.name}: {reason}",
                        f"run: grads-ds run CONFIG --to {last.name}",
                    )
                )


def find_problems(config: Config, run_dir: Path, stages: Sequence[Stage], ranks: int) -> None:
    """Look at what the due units of `stages` are about to read. Raises UserError with every
    problem found; a finished stage stays finished when its sources move away.

    `ranks` is how many the distributed stages will have.
    """
    found = [
        text
        for stage in stages
        if due_units(stage, config, run_dir)
        for text in stage.problems(config, run_dir, ranks)
    ]
    if found:
        raise UserError(list(dict.fromkeys(found)))
