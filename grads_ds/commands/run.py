"""`grads-ds run CONFIG` and one sub-command per stage: the stages that are due, in order, each
where it belongs.

Reads the config and the hosts; a distributed stage goes to the launcher, the others run here. A
stage command started by a launcher (`deepspeed --module grads_ds probe CONFIG`) is one rank of that
stage.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from grads_ds import ranks
from grads_ds.check import check_inputs
from grads_ds.commands.place import add_place, ops, paths, place_of
from grads_ds.config import Config, UserError, load_config
from grads_ds.run_dir import lock
from grads_ds.stages import STAGE_NAMES, STAGES, Stage, Unit, check_upstream, due_units, execute
from launcher import kubernetes, sbatch
from launcher.doctor import glance
from launcher.hosts import shared_by
from launcher.job import Place, dry_run, run_job
from launcher.outcome import DONE, FAILED, LOST, WRONG_INPUT, Outcome

BACKOFF_SECONDS = 5.0  # before the first restart; doubled each time
_HELP = {
    "prepare": "read the data, tokenise it, give every sample an id",
    "probe": "preliminary training, then every sample's gradient norms",
    "select": "choose the subset from the score table",
    "sft": "fine-tune on the subset",
    "evaluate": "held-out losses of the base model and every trained one",
    "report": "one HTML page about the run",
}


def add(commands: Any) -> None:
    """Declare `run` and the stages."""
    run = commands.add_parser("run", help="run every stage that is due, in order")
    run.add_argument(
        "--from",
        dest="first",
        choices=STAGE_NAMES,
        default=STAGE_NAMES[0],
        help="first stage to consider",
    )
    run.add_argument(
        "--to", dest="last", choices=STAGE_NAMES, default=STAGE_NAMES[-1], help="last stage to run"
    )
    by_stage = {name: commands.add_parser(name, help=_HELP[name]) for name in STAGE_NAMES}
    by_stage["select"].add_argument(
        "--preview",
        action="store_true",
        help="print what would be chosen, and why, and write nothing",
    )
    for command in (run, *by_stage.values()):
        command.set_defaults(handler=handle)
        add_config(command)
        add_place(command)
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
                "leave hosts out that cannot be entered or have a fault, and go on with the others"
            ),
        )
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="print what would be started, exactly, and start nothing",
        )
        command.add_argument(
            "--kubernetes",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help=(
                "for --backend kubernetes: image=..., nodes=2, gpus=8, claim=NAME:/runs,"
                " namespace=..., shared_memory=16Gi"
            ),
        )
        command.add_argument(
            "--slurm",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help=(
                "sbatch option for --backend slurm outside an allocation, e.g. nodes=8,"
                " partition=gpu"
            ),
        )
        command.add_argument(
            "--wait", action="store_true", help="with --slurm: stay until the batch job is over"
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
    if args.command != "run" and ranks.launched():
        return execute(next(stage for stage in STAGES if stage.name == args.command), config)
    return _by_hand(args, config)


def _by_hand(args: argparse.Namespace, config: Config) -> int:
    first, last = (args.first, args.last) if args.command == "run" else (args.command, args.command)
    begin, end = STAGE_NAMES.index(first), STAGE_NAMES.index(last)
    if begin > end:
        raise UserError(f"--from {first} --to {last}: {first} comes after {last}; swap them")
    stages = STAGES[begin : end + 1]
    run_dir = Path(config.run_dir)
    if args.max_restarts < 0:
        raise UserError(f"--max-restarts: wanted 0 or more; found {args.max_restarts}")
    queued = args.backend == "slurm" and "SLURM_JOB_ID" not in os.environ
    given = [name for name in ("hosts", "include", "exclude", "ranks") if getattr(args, name)]
    if given and (queued or args.backend == "kubernetes"):
        faults = [
            f"--{name}: wanted the hosts that --backend {args.backend} gives; leave --{name} out"
            for name in given
        ]
        raise UserError(faults)
    if queued:
        return _submit(args, run_dir)
    if args.backend == "kubernetes":
        return _apply(args, run_dir)
    if args.kubernetes:
        raise UserError(
            "--kubernetes: wanted --backend kubernetes; found another one; leave it out"
        )
    if args.slurm or args.wait:
        raise UserError(
            "--slurm, --wait: wanted --backend slurm outside an allocation; found another place;"
            " leave them out"
        )
    place = place_of(args)
    if args.dry_run:
        for stage in stages:
            print(
                dry_run(stage.name, _words(stage.name, args), place, run_dir / "logs")
                if stage.distributed
                else f"{stage.name}: here"
            )
        return DONE
    ranks_in_all = sum(host.slots for host in place.hosts)
    with lock(run_dir, f"grads-ds {args.command}"):
        for number, stage in enumerate(stages):
            # the prepared pool tells more than the config did
            if number == 0 or stages[number - 1].name == "prepare":
                # only for work that is due: a finished run stays finished when its sources move
                # away
                units = {stage.name: due_units(stage, config, run_dir) for stage in stages[number:]}
                due = [name for name in units if units[name]] + [
                    unit.name for found in units.values() for unit, _ in found
                ]
                check_inputs(config, due, ranks_in_all)
            status = (
                _launch(stage, config, args, place) if stage.distributed else execute(stage, config)
            )
            if status:
                return status
    if stages[-1].name in ("evaluate", "report"):
        _print_outcome(run_dir)
    return 0


def _launch(stage: Stage, config: Config, args: argparse.Namespace, place: Place) -> int:
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
                LOST, "the hosts are no longer as they must be", "\n".join(error.faults)
            )
        else:
            outcome = run_job(stage.name, _words(stage.name, args), present, run_dir / "logs")
        if outcome.status == DONE and due_units(stage, config, run_dir):
            outcome = Outcome(FAILED, "every rank ended well, yet the stage is not done")
        if outcome.status in (DONE, WRONG_INPUT):
            break  # rank 0 has listed the faults
        _tell(
            run_dir / "logs" / f"{stage.name}.log",
            f"{stage.name}: {outcome.sentence}",
            outcome.error,
        )
        if attempt == args.max_restarts or not outcome.may_pass:
            break
        pause = min(BACKOFF_SECONDS * 2**attempt, 60.0)
        _tell(
            run_dir / "logs" / f"{stage.name}.log",
            f"restart {attempt + 1} of {args.max_restarts} in {pause:.0f} s",
            "",
        )
        time.sleep(pause)
    return outcome.status


def _present(config: Config, due: list[tuple[Unit, str]], place: Place, elastic: bool) -> Place:
    """The place, once its hosts have been looked at; with `elastic`, less those that cannot be
    entered or have a fault.

    Raises UserError with every fault otherwise. Warnings are printed.
    """
    lost, findings = glance(place, Path(config.run_dir), paths(config), ops(config))
    faults = dict(lost)
    for finding in findings:
        name = next(
            (host.name for host in place.hosts if host.address == finding.host), finding.host
        )
        if finding.level == "fault":
            faults[name] = f"{faults[name]}; {finding}" if name in faults else f"hosts: {finding}"
        elif finding.level == "warning":
            print(f"grads-ds: {finding}", file=sys.stderr, flush=True)
    if not faults:
        return place
    left = [host for host in place.hosts if host.name not in faults]
    if elastic and left:
        left = shared_by(left, _batches(config, due))
    if not elastic or not left:
        raise UserError([*faults.values()])
    for fault in faults.values():
        print(f"grads-ds: left out: {fault}", file=sys.stderr, flush=True)
    return replace(place, hosts=left)


def _batches(config: Config, due: list[tuple[Unit, str]]) -> list[int]:
    """Samples per step of the trainings that are due: the ranks have to share them equally."""
    names = [unit.name for unit, _ in due]
    trained = [("sft/", config.sft.batch_size), ("probe/train", config.probe.batch_size)]
    return [size for begin, size in trained if any(name.startswith(begin) for name in names)]


def _words(stage: str, args: argparse.Namespace) -> list[str]:
    """A rank's own command line."""
    return [
        sys.executable,
        "-m",
        "grads_ds",
        stage,
        args.config,
        *(part for item in args.set for part in ("--set", item)),
    ]


def _tell(log: Path, sentence: str, error: str) -> None:
    """Say it last on the terminal, and in the stage's log."""
    told = f"\ngrads-ds: {sentence}; log: {log}\n{error.rstrip()}".rstrip()
    print(told, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError), open(log, "a") as stream:  # the disk may be what is full
        stream.write(told + "\n")


def _same_again(args: argparse.Namespace) -> list[str]:
    """This very command, less where it runs."""
    words = [args.command, args.config, *_words("", args)[5:]]
    if args.command == "run":
        words += ["--from", args.first, "--to", args.last]
    words += [
        "--ports",
        args.ports,
        "--max-restarts",
        str(args.max_restarts),
        *(["--elastic"] if args.elastic else []),
    ]
    return [
        *words,
        "--hang-seconds",
        f"{args.hang_seconds:g}",
        "--start-seconds",
        f"{args.start_seconds:g}",
    ]


def _apply(args: argparse.Namespace, run_dir: Path) -> int:
    """Render this command as a Kubernetes job and hand it to kubectl."""
    manifest = kubernetes.render(_same_again(args), args.kubernetes)
    if args.dry_run:
        print(manifest, end="")
        return DONE
    return kubernetes.apply(manifest, run_dir)


def _submit(args: argparse.Namespace, run_dir: Path) -> int:
    """Queue this very command as a Slurm batch job, less what is for sbatch alone."""
    words = [*_same_again(args), "--backend", "slurm"]
    script = sbatch.render(words, args.slurm, run_dir)
    if args.dry_run:
        print(script, end="")
        return DONE
    return sbatch.submit(script, run_dir, args.wait)


def _print_outcome(run_dir: Path) -> None:
    from grads_ds.report import report_table

    print(report_table(run_dir))
    page = run_dir / "report.html"
    if page.is_file():
        print(f"report: {page}")
