"""`grads-ds run CONFIG` and one sub-command per stage: the stages that are due, in order."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grads_ds.commands.detach import start_detached
from grads_ds.commands.options import add_placement, placement, placement_words
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError, problem
from grads_ds.config.load import load_config
from grads_ds.distributed import heartbeat, ranks
from grads_ds.flow.execute import execute
from grads_ds.flow.launch import clear_after_killed_start, launch, stage_command
from grads_ds.flow.prepare_on_hosts import one_process_each, prepare_on_hosts, share_command
from grads_ds.flow.stages import STAGE_NAMES, STAGES, Stage, find_problems, reopen_altered
from grads_ds.launcher.job import Placement, dry_run
from grads_ds.launcher.job_outcome import DONE
from grads_ds.launcher.submit import QUEUES, Queue, queue_for
from grads_ds.run_dir.lock import lock
from grads_ds.run_dir.ownership import claim, run_dir_problems
from grads_ds.run_dir.provenance import RESOLVED, resolved_is_whole


def add_run(command: argparse.ArgumentParser) -> None:
    """Declare `run`."""
    command.add_argument(
        "--from",
        dest="first",
        choices=STAGE_NAMES,
        default=STAGE_NAMES[0],
        help="first stage to consider",
    )
    command.add_argument(
        "--to", dest="last", choices=STAGE_NAMES, default=STAGE_NAMES[-1], help="last stage to run"
    )
    add_stage(command)


def add_prepare(command: argparse.ArgumentParser) -> None:
    """Declare `prepare`. With --share, one process of several makes parts for the others."""
    command.add_argument("--share", action="store_true", help=argparse.SUPPRESS)
    add_stage(command)


def add_select(command: argparse.ArgumentParser) -> None:
    """Declare `select`."""
    command.add_argument(
        "--preview",
        action="store_true",
        help="print what would be chosen, and why, and write nothing",
    )
    add_stage(command)


def add_stage(command: argparse.ArgumentParser) -> None:
    """Declare a stage: what all of them share with `run`."""
    command.set_defaults(handler=handle)
    add_config(command)
    add_placement(command, QUEUES)
    command.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start a failed stage again, up to N times",
    )
    command.add_argument(
        "--elastic",
        action="store_true",
        help=(
            "leave hosts out that cannot be entered or have a problem, and go on with the others"
        ),
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be started, exactly, and start nothing",
    )
    for name, queue in QUEUES.items():
        command.add_argument(
            f"--{name}", action="append", default=[], metavar="KEY=VALUE", help=queue.HELP
        )
    waiting = ", ".join(f"--{name}" for name, queue in QUEUES.items() if queue.WAITS)
    command.add_argument(
        "--wait", action="store_true", help=f"with {waiting}: stay until the batch job is over"
    )
    command.add_argument(
        "--detach",
        action="store_true",
        help="go on without this terminal; grads-ds status and grads-ds stop reach it",
    )


def add_config(command: argparse.ArgumentParser) -> None:
    """The arguments of every command that reads a config."""
    command.add_argument("config", metavar="CONFIG", help="YAML configuration file")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key"
    )


def handle(args: argparse.Namespace) -> int:
    """Run the stages; the exit status."""
    config = load_config(args.config, args.set)
    if args.command == "select" and args.preview:
        from grads_ds.selection.stage import preview

        print(preview(config, Path(config.run_dir)))
        return DONE
    if args.command == "prepare" and args.share:
        from grads_ds.data.shares import make_share

        make_share(config, Path(config.run_dir), ranks.launched_rank(), heartbeat.beat)
        return DONE
    if args.command != "run" and ranks.launched():
        return execute(next(stage for stage in STAGES if stage.name == args.command), config)
    return _run_from_shell(args, config)


def _overwritten(given: str, run_dir: Path) -> list[str]:
    """Problems of a config that somebody has written in the place of the run's own copy."""
    own = run_dir / RESOLVED
    if not own.is_file() or not own.samefile(given) or resolved_is_whole(run_dir):
        return []
    found = f"{given}, changed by hand, which this run writes over"
    return [problem("CONFIG", "a file of its own", found, "copy it to another name")]


def _run_from_shell(args: argparse.Namespace, config: Config) -> int:
    first, last = (args.first, args.last) if args.command == "run" else (args.command, args.command)
    begin, end = STAGE_NAMES.index(first), STAGE_NAMES.index(last)
    if begin > end:
        raise UserError(f"--from {first} --to {last}: {first} comes after {last}; swap them")
    stages = STAGES[begin : end + 1]
    run_dir = Path(config.run_dir)
    if args.max_restarts < 0:
        raise UserError(f"--max-restarts: wanted 0 or more; found {args.max_restarts}")
    queue = queue_for(args.backend)
    given = [name for name in ("hosts", "include", "exclude", "ranks") if getattr(args, name)]
    if queue and given:
        problems = [
            f"--{name}: wanted the hosts that --backend {args.backend} gives; leave --{name} out"
            for name in given
        ]
        raise UserError([*problems, *_misplaced(queue, args)])
    if misplaced := _misplaced(queue, args):
        raise UserError(misplaced)
    if problems := [*run_dir_problems(config.run_dir), *_overwritten(args.config, run_dir)]:
        raise UserError(problems)
    if queue:
        return _hand_over(queue, args, run_dir)
    place = placement(args)
    if args.dry_run:
        for stage in stages:
            print(_dry_run(stage, args, place, run_dir / "logs"))
        return DONE
    ranks_in_all = sum(host.slots for host in place.hosts)
    claim(run_dir)
    if args.detach:
        find_problems(config, run_dir, stages, ranks_in_all)  # here, where somebody reads them
        return start_detached([sys.executable, "-m", "grads_ds", *same_words(args)], run_dir)
    with lock(run_dir, f"grads-ds {args.command}"):
        clear_after_killed_start(run_dir)
        if args.command == "run":
            reopen_altered(config, run_dir, stages)
        for number, stage in enumerate(stages):
            # the prepared pool tells more than the config did
            if number == 0 or stages[number - 1].name == "prepare":
                find_problems(config, run_dir, stages[number:], ranks_in_all)
            if stage.distributed:
                status = launch(stage, config, args, place)
            elif stage.name == "prepare":
                status = prepare_on_hosts(config, args, place)
            else:
                status = execute(stage, config)
            if status:
                return status
    if stages[-1].name in ("evaluate", "report"):
        _print_outcome(run_dir)
    return 0


def _dry_run(stage: Stage, args: argparse.Namespace, place: Placement, logs: Path) -> str:
    if stage.distributed:
        return dry_run(stage.name, stage_command(stage.name, args), place, logs)
    if stage.name == "prepare" and len(place.hosts) > 1:
        said = dry_run(stage.name, share_command(args), one_process_each(place), logs)
        return f"prepare: here, and where the pool is large before that on every host:\n{said}"
    return f"{stage.name}: here"


def _misplaced(queue: Queue | None, args: argparse.Namespace) -> list[str]:
    """Options of queues that do not take this run."""
    return [
        other.MISPLACED
        for name, other in QUEUES.items()
        if other is not queue
        and (getattr(args, name) or (args.wait and other.WAITS and not (queue and queue.WAITS)))
    ]


def same_words(args: argparse.Namespace) -> list[str]:
    """This very command without --detach, the hosts named in it included."""
    words = _rerun_arguments(args)
    for name in ("hosts", "include", "exclude", "ranks", "backend"):
        if value := getattr(args, name):
            words += [f"--{name}", str(value)]
    return words


def _rerun_arguments(args: argparse.Namespace) -> list[str]:
    """This very command, less where it runs."""
    words = [args.command, args.config, *stage_command("", args)[5:]]
    if args.command == "run":
        words += ["--from", args.first, "--to", args.last]
    words += ["--max-restarts", str(args.max_restarts), *(["--elastic"] if args.elastic else [])]
    return [*words, *placement_words(args)]


def _hand_over(queue: Queue, args: argparse.Namespace, run_dir: Path) -> int:
    """Queue this very command as one job, less what is for the queue alone."""
    if args.detach:
        raise UserError("--detach: wanted ranks started from here; a batch job needs no terminal")
    if not args.dry_run:
        claim(run_dir)
    options = getattr(args, queue.NAME)
    job = queue.render(_rerun_arguments(args), options, run_dir, args.grace_seconds)
    if args.dry_run:
        print(job, end="")
        return DONE
    return queue.submit(job, run_dir, args.wait)


def _print_outcome(run_dir: Path) -> None:
    from grads_ds.report.text_table import report_table

    print(report_table(run_dir))
    page = run_dir / "report.html"
    if page.is_file():
        print(f"report: {page}")
