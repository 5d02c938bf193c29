"""Give a stage to the launcher: look at the hosts, start the ranks, restart what may pass."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.flow.host_needs import compiled_ops, input_paths
from grads_ds.flow.stages import Stage, check_upstream, due_units
from grads_ds.flow.unit_inputs import Unit
from grads_ds.launcher import orphans
from grads_ds.launcher.doctor.examine import glance
from grads_ds.launcher.doctor.findings import Finding
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

    def due() -> list[tuple[Unit, str]]:
        return due_units(stage, config, run_dir)

    def look() -> Placement:
        batches = _batches(config, due())
        return present(config, place, args.elastic, batches, compiled_ops(config))

    command = stage_command(stage.name, args)
    return run_on_hosts(stage.name, command, run_dir, args, look(), look, lambda: bool(due()))


def run_on_hosts(
    name: str,
    command: Sequence[str],
    run_dir: Path,
    args: argparse.Namespace,
    place: Placement,
    look: Callable[[], Placement],
    unfinished: Callable[[], bool],
) -> int:
    """Run a command on every slot until it ends well, or may not be tried again; the exit status.

    Args:
        name: of the stage, under which the logs lie.
        command: a rank's command line.
        run_dir: the run's.
        args: how often a failed job is started again.
        place: where it is started first; its hosts have been looked at.
        look: looks at the hosts before a start again, all of them: one that was left out may be
            back; raises UserError.
        unfinished: whether there is still something to do once every rank ended well.
    """
    log = run_dir / "logs" / f"{name}.log"
    for attempt in range(args.max_restarts + 1):
        try:
            place = look() if attempt else place
        except UserError as error:
            # they were as they must be before, and may be so again: a host that starts takes its
            # time
            outcome = Outcome(
                LOST, "the hosts are no longer as they must be", "\n".join(error.problems)
            )
        else:
            outcome = run_job(name, command, place, run_dir / "logs")
        if outcome.status == DONE and unfinished():
            outcome = Outcome(FAILED, "every rank ended well, yet the stage is not done")
        if outcome.status in (DONE, WRONG_INPUT):
            break  # rank 0 has listed the problems
        _report(log, f"{name}: {outcome.sentence}", outcome.error)
        if attempt == args.max_restarts or not outcome.may_pass:
            break
        pause = min(BACKOFF_SECONDS * 2**attempt, 60.0)
        _report(log, f"restart {attempt + 1} of {args.max_restarts} in {pause:.0f} s", "")
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


def present(
    config: Config,
    place: Placement,
    elastic: bool,
    batches: Sequence[int] = (),
    ops: Sequence[str] = (),
) -> Placement:
    """The place, once its hosts have been looked at; with `elastic`, less those that cannot be
    entered or have a problem. Warnings are printed.

    Raises UserError with every problem otherwise.

    Args:
        config: the run's.
        place: where the stage is to run.
        elastic: whether hosts may be left out.
        batches: samples per step, which the ranks that are left have to share equally.
        ops: what DeepSpeed loads.
    """
    lost, findings = _look(config, place, ops)
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
        left = shared_by(left, batches)
    if not elastic or not left:
        raise UserError([*problems.values()])
    for problem in problems.values():
        print(f"grads-ds: left out: {problem}", file=sys.stderr, flush=True)
    return replace(place, hosts=left)


def _look(
    config: Config, place: Placement, ops: Sequence[str]
) -> tuple[dict[str, str], list[Finding]]:
    """What a glance at the hosts finds; they are asked to write in a folder that this start has
    made in the run directory, so that one of the same name on a disk of their own is found out.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    for left in run_dir.glob(".shared.*"):  # of a start that was killed
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".shared.", dir=run_dir))
    folder.chmod(run_dir.stat().st_mode)
    try:
        lost, findings = glance(place, folder, input_paths(config), ops)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return lost, [
        replace(
            finding,
            found=f"wanted {run_dir.resolve()} on a file system that all hosts share; found another"
            " folder of that name here, or none",
            advice="put run_dir on one",
        )
        if finding.check == "run directory" and finding.found == os.strerror(errno.ENOENT)
        else finding
        for finding in findings
    ]


def _batches(config: Config, due: Sequence[tuple[Unit, str]]) -> list[int]:
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
