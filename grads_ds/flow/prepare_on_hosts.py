"""Prepare with every host of the run: one process on each makes parts of the pool's blocks, in the
run directory that they share; everything else of the stage is done here.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.flow.execute import execute
from grads_ds.flow.launch import present, run_on_hosts, stage_command
from grads_ds.flow.stages import STAGES, due_units
from grads_ds.launcher.job import Placement
from grads_ds.launcher.job_outcome import DONE
from grads_ds.run_dir.units import begin

PREPARE = STAGES[0]


def share_command(args: argparse.Namespace) -> list[str]:
    """The command line of the process on each host."""
    return [*stage_command(PREPARE.name, args), "--share"]


def one_process_each(place: Placement) -> Placement:
    """The place with one slot on each host: that process starts the others there."""
    return replace(place, hosts=[replace(h, slots=1, devices=None) for h in place.hosts])


def prepare_on_hosts(config: Config, args: argparse.Namespace, place: Placement) -> int:
    """Prepare, with the hosts where there are several and the pool is large; the exit status.

    Raises UserError for hosts that are not as they must be, before any work.
    """
    from grads_ds.data.shares import open_shares, shares_made, worth_sharing

    run_dir = Path(config.run_dir)
    due = due_units(PREPARE, config, run_dir)
    if not due or len(place.hosts) < 2 or not worth_sharing(config):
        return execute(PREPARE, config)
    unit = due[0][0]

    def look() -> Placement:
        return present(config, one_process_each(place), args.elastic)

    seen = look()
    begin(run_dir, unit.name, unit.owned)
    if open_shares(config, run_dir, unit.identity):
        names = ", ".join(host.address for host in seen.hosts)
        print(
            f"prepare: the pool's blocks are made on {len(seen.hosts)} hosts ({names}); held-out"
            " sets and data sets of the hub here, where everything is put together",
            flush=True,
        )
        command = share_command(args)
        status = run_on_hosts(PREPARE.name, command, run_dir, args, seen, look, lambda: False)
        for share in shares_made(run_dir):
            print(f"prepare: {share}", flush=True)
        if status != DONE:
            return status
    return execute(PREPARE, config)
