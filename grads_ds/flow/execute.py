"""Run a stage's due units here, on every rank of a distributed stage, and record them."""

from __future__ import annotations

import time
from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.distributed import heartbeat
from grads_ds.flow.stages import Stage, check_upstream, due_units
from grads_ds.flow.unit_inputs import Unit
from grads_ds.run_dir.lock import lock
from grads_ds.run_dir.ownership import claim
from grads_ds.run_dir.provenance import RESOLVED, resolved_is_whole, save_config
from grads_ds.run_dir.publish import refuse_folders
from grads_ds.run_dir.units import begin, mark_done


def execute(stage: Stage, config: Config) -> int:
    """Run the stage's due units in this process (on every rank of a distributed stage); returns 0.

    Finished units are left alone. Under a launcher, a stage that needs one process runs on rank 0
    and the others leave.
    """
    from grads_ds.distributed import ranks

    run_dir = Path(config.run_dir)
    heartbeat.beat(f"{stage.name}: starting")
    if not stage.distributed:
        if ranks.launched_rank() == 0:
            claim(run_dir)
            with lock(run_dir, f"grads-ds {stage.name}"):
                _execute_here(stage, config, run_dir)
        return 0
    ranks.start()
    ranks.from_main(lambda: claim(run_dir))
    with ranks.on_main(lambda: lock(run_dir, f"grads-ds {stage.name}")):
        names = [unit.name for unit in stage.units(config, run_dir)]
        due = ranks.from_main(lambda: _announce(stage, config, run_dir))
        for name in names:
            if name not in due:
                continue
            unit = _named(stage, config, run_dir, name)
            began = time.monotonic()
            heartbeat.beat(f"{name}: loading")
            ranks.from_main(lambda unit=unit: begin(run_dir, unit.name, unit.owned))  # type: ignore[misc]
            unit.work(config, run_dir, unit.identity)
            heartbeat.beat(f"{name}: finishing")
            ranks.barrier()
            ranks.from_main(lambda unit=unit, began=began: _finish(unit, config, run_dir, began))  # type: ignore[misc]
    ranks.finish()
    return 0


def _execute_here(stage: Stage, config: Config, run_dir: Path) -> None:
    for name in _announce(stage, config, run_dir):
        unit = _named(stage, config, run_dir, name)
        began = time.monotonic()
        begin(run_dir, unit.name, unit.owned)
        unit.work(config, run_dir, unit.identity)
        _finish(unit, config, run_dir, began)


def _announce(stage: Stage, config: Config, run_dir: Path) -> list[str]:
    check_upstream(stage, config, run_dir)
    refuse_folders(run_dir / RESOLVED)
    if not resolved_is_whole(run_dir):
        print(f"{run_dir / RESOLVED} was altered: written again from the config given", flush=True)
        save_config(config, run_dir)
    due = due_units(stage, config, run_dir)
    for unit, reason in due:
        print(f"{unit.name}: {reason}", flush=True)
    if not due:
        print(f"{stage.name}: done already, nothing to do", flush=True)
    return [unit.name for unit, _ in due]


def _named(stage: Stage, config: Config, run_dir: Path, name: str) -> Unit:
    return next(unit for unit in stage.units(config, run_dir) if unit.name == name)


def _finish(unit: Unit, config: Config, run_dir: Path, began: float) -> None:
    seconds = time.monotonic() - began
    # now, not before: a refused input leaves the saved config as it was
    save_config(config, run_dir)
    written = [name for name in unit.optional if (run_dir / name).exists()]
    mark_done(run_dir, unit.name, unit.inputs, [*unit.outputs, *written], seconds)
    print(f"{unit.name}: done in {seconds:.1f} s", flush=True)
