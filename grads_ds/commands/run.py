"""`grads-ds run CONFIG` and one sub-command per stage: the stages that are due, in order, each where it belongs.

Reads the config and the hosts; a distributed stage goes to the launcher, the others run here. A stage command started by
a launcher (`deepspeed --module grads_ds probe CONFIG`) is one rank of that stage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from grads_ds import ranks
from grads_ds.check import check_inputs
from grads_ds.config import Config, UserError, load_config
from grads_ds.run_dir import lock
from grads_ds.stages import STAGE_NAMES, STAGES, Stage, check_upstream, due_units, execute
from launcher.backends import NAMES, choose
from launcher.hosts import read_hostfile, this_machine
from launcher.job import Place, run_job
from launcher.outcome import DONE, FAILED, WRONG_INPUT, Outcome

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
        "--from", dest="first", choices=STAGE_NAMES, default=STAGE_NAMES[0], help="first stage to consider"
    )
    run.add_argument("--to", dest="last", choices=STAGE_NAMES, default=STAGE_NAMES[-1], help="last stage to run")
    for command in (run, *(commands.add_parser(name, help=_HELP[name]) for name in STAGE_NAMES)):
        command.set_defaults(handler=handle)
        add_config(command)
        command.add_argument("--hosts", metavar="HOSTFILE", help="DeepSpeed hostfile; without one, this machine alone")
        command.add_argument(
            "--backend", choices=NAMES, help="what starts the ranks (default: local, Slurm's srun, or pdsh)"
        )
        command.add_argument(
            "--ranks", type=int, metavar="N", help="ranks on this machine (default: every GPU; 2 on CPU)"
        )


def add_config(command: argparse.ArgumentParser) -> None:
    """The arguments of every command that reads a config."""
    command.add_argument("config", metavar="CONFIG", help="YAML configuration file")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")


def handle(args: argparse.Namespace) -> int:
    """Run the stages; the exit status."""
    config = load_config(args.config, args.set)
    if args.command != "run" and ranks.launched():
        return execute(next(stage for stage in STAGES if stage.name == args.command), config)
    return _by_hand(args, config)


def _by_hand(args: argparse.Namespace, config: Config) -> int:
    first, last = (args.first, args.last) if args.command == "run" else (args.command, args.command)
    begin, end = STAGE_NAMES.index(first), STAGE_NAMES.index(last)
    if begin > end:
        raise UserError(f"--from {first} --to {last}: {first} comes after {last}; swap them")
    stages = STAGES[begin : end + 1]
    hosts = read_hostfile(args.hosts) if args.hosts else [this_machine(args.ranks)]
    run_dir = Path(config.run_dir)
    place = Place(hosts, choose(args.backend, hosts))
    ranks_in_all = sum(host.slots for host in hosts)
    with lock(run_dir, f"grads-ds {args.command}"):
        for number, stage in enumerate(stages):
            if number == 0 or stages[number - 1].name == "prepare":  # the prepared pool tells more than the config did
                # only for work that is due: a finished run stays finished when its sources move away
                due = [stage.name for stage in stages[number:] if due_units(stage, config, run_dir)]
                check_inputs(config, due, ranks_in_all)
            status = _launch(stage, config, args, place) if stage.distributed else execute(stage, config)
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
    overrides = [part for item in args.set for part in ("--set", item)]
    outcome = run_job(stage.name, [stage.name, args.config, *overrides], place, run_dir / "logs")
    if outcome.status == DONE and due_units(stage, config, run_dir):
        outcome = Outcome(FAILED, "every rank ended well, yet the stage is not done")
    if outcome.status in (DONE, WRONG_INPUT):
        return outcome.status  # rank 0 has listed the faults
    log = run_dir / "logs" / f"{stage.name}.log"
    told = f"\ngrads-ds: {stage.name}: {outcome.sentence}; log: {log}\n{outcome.error.rstrip()}".rstrip()
    print(told, file=sys.stderr, flush=True)
    with open(log, "a") as stream:
        stream.write(told + "\n")
    return outcome.status


def _print_outcome(run_dir: Path) -> None:
    from grads_ds.report import report_table

    print(report_table(run_dir))
    page = run_dir / "report.html"
    if page.is_file():
        print(f"report: {page}")
