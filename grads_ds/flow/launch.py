"""Give a distributed stage to the launcher: look at the hosts, start the ranks, restart what may
pass.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from dataclasses import replace
from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.flow.host_needs import compiled_ops, input_paths
from grads_ds.flow.stages import Stage, check_upstream, due_units
from grads_ds.flow.unit_inputs import Unit
from grads_ds.launcher import orphans
from grads_ds.launcher.doctor.examine import glance
from grads_ds.launcher.environment import sweep
from grads_ds.launcher.host_choice import shared_by
from grads_ds.launcher.job import Placement, run_job
from grads_ds.launcher.job_outcome import DONE, FAILED, LOST, WRONG_INPUT, Outcome

BACKOFF_SECONDS = 5.0  # before the first restart; doubled each time


def launch(stage: Stage, config: Config, args: argparse.Namespace, place: Placement) -> int:
    """Give a distributed stage to the launcher."""
    run_dir = Path(config.run_dir)
    check_upstream(stage, config, run_dir)
    if not due_units(stage, config, run_dir):
        print(f"{stage.name}: done already, nothing to do", flush=True)
        return DONE
    for attempt in range(args.max_restarts + 1):
        try:  # all hosts each time: one that was left out may be back
            present = _present(config, due_units(stage, config, run_dir), place, args.elastic)
        except UserError as error:
            if attempt == 0:
                raise
            # they were as they must be before, and may be so again: a host that starts takes its
            # time
            outcome = Outcome(
                LOST, "the hosts are no longer as they must be", "\n".join(error.problems)
            )
        else:
            outcome = run_job(
                stage.name, stage_command(stage.name, args), present, run_dir / "logs"
            )
        if outcome.status == DONE and due_units(stage, config, run_dir):
            outcome = Outcome(FAILED, "every rank ended well, yet the stage is not done")
        if outcome.status in (DONE, WRONG_INPUT):
            break  # rank 0 has listed the problems
        _report(
            run_dir / "logs" / f"{stage.name}.log",
            f"{stage.name}: {outcome.sentence}",
            outcome.error,
        )
        if attempt == args.max_restarts or not outcome.may_pass:
            break
        pause = min(BACKOFF_SECONDS * 2**attempt, 60.0)
        _report(
            run_dir / "logs" / f"{stage.name}.log",
            f"restart {attempt + 1} of {args.max_restarts} in {pause:.0f} s",
            "",
        )
        time.sleep(pause)
    return outcome.status


def clear_after_killed_start(run_dir: Path) -> None:
    """End the ranks that a killed launcher has left at work, and remove its environment files,
    which may hold tokens. Call it with the run directory's lock held.
    """
    orphans.end(
        run_dir, "another start of this run", lambda s: print(f"grads-ds: {s}", file=sys.stderr)
    )
    if swept := sweep(run_dir / "logs"):
        print(f"grads-ds: {swept} environment files of killed starts removed", file=sys.stderr)


def _present(
    config: Config, due: list[tuple[Unit, str]], place: Placement, elastic: bool
) -> Placement:
    """The place, once its hosts have been looked at; with `elastic`, less those that cannot be
    entered or have a problem.

    Raises UserError with every problem otherwise. Warnings are printed.
    """
    lost, findings = glance(place, Path(config.run_dir), input_paths(config), compiled_ops(config))
    problems = dict(lost)
    for finding in findings:
        name = next(
            (host.name for host in place.hosts if host.address == finding.host), finding.host
        )
        if finding.level == "problem":
            before = f"{problems[name]}; " if name in problems else "hosts: "
            problems[name] = f"{before}{finding}"
        elif finding.level == "warning":
            print(f"grads-ds: {finding}", file=sys.stderr, flush=True)
    if not problems:
        return place
    left = [host for host in place.hosts if host.name not in problems]
    if elastic and left:
        left = shared_by(left, _batches(config, due))
    if not elastic or not left:
        raise UserError([*problems.values()])
    for problem in problems.values():
        print(f"grads-ds: left out: {problem}", file=sys.stderr, flush=True)
    return replace(place, hosts=left)


def _batches(config: Config, due: list[tuple[Unit, str]]) -> list[int]:
    """Samples per step of the trainings that are due: the ranks have to share them equally."""
    names = [unit.name for unit, _ in due]
    trained = [("sft/", config.sft.batch_size), ("probe/train", config.probe.batch_size)]
    return [size for begin, size in trained if any(name.startswith(begin) for name in names)]


def stage_command(stage: str, args: argparse.Namespace) -> list[str]:
    """A rank's own command line."""
    return [
        sys.executable,
        "-m",
        "grads_ds",
        stage,
        args.config,
        *(part for item in args.set for part in ("--set", item)),
    ]


def _report(log: Path, sentence: str, error: str) -> None:
    """Say it last on the terminal, and in the stage's log."""
    told = f"\ngrads-ds: {sentence}; log: {log}\n{error.rstrip()}".rstrip()
    print(told, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError), open(log, "a") as stream:  # the disk may be what is full
        stream.write(told + "\n")
