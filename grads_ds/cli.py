"""The command line: `grads-ds run CONFIG`, and one sub-command per stage.

Exit status: 0 done; 2 the user's input is wrong (every fault listed); 1 anything else, with the first failing rank's own
error last. A stage started by a launcher (`deepspeed --module grads_ds probe CONFIG`) runs in that process as one rank;
started by hand it is given to the launcher first. No torch import here, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from grads_ds import __version__, ranks
from grads_ds.check import check_inputs
from grads_ds.config import Config, UserError, load_config
from grads_ds.run_dir import lock
from grads_ds.stages import STAGE_NAMES, STAGES, Stage, check_upstream, due_units, execute
from launcher.hosts import Host, read_hostfile, this_machine
from launcher.job import run_job

_HELP = {
    "prepare": "read the data, tokenise it, give every sample an id",
    "probe": "preliminary training, then every sample's gradient norms",
    "select": "choose the subset from the score table",
    "sft": "fine-tune on the subset",
    "evaluate": "held-out losses of the base model and every trained one",
    "report": "one HTML page about the run",
}


def parser() -> argparse.ArgumentParser:
    """The argument parser of `grads-ds`."""
    top = argparse.ArgumentParser(
        prog="grads-ds",
        description="Gradient-aware data selection and fine-tuning on DeepSpeed: " + " -> ".join(STAGE_NAMES) + ".",
    )
    top.add_argument("--version", action="version", version=f"grads-ds {__version__}")
    top.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed puts it before the sub-command
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run every stage that is due, in order")
    run.add_argument(
        "--from", dest="first", choices=STAGE_NAMES, default=STAGE_NAMES[0], help="first stage to consider"
    )
    run.add_argument("--to", dest="last", choices=STAGE_NAMES, default=STAGE_NAMES[-1], help="last stage to run")
    for name in STAGE_NAMES:
        commands.add_parser(name, help=_HELP[name])
    for command in commands.choices.values():
        command.add_argument("config", metavar="CONFIG", help="YAML configuration file")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")
        command.add_argument("--hosts", metavar="HOSTFILE", help="DeepSpeed hostfile; without one, this machine alone")
        command.add_argument(
            "--ranks", type=int, metavar="N", help="ranks on this machine (default: every GPU; 2 on CPU)"
        )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, translate failures into exit statuses."""
    args = parser().parse_args(argv)
    error_file = os.environ.get("GRADS_DS_ERRORS")
    # progress bars redraw on a terminal; a log gets a line now and then. Ranks inherit what their launcher found.
    os.environ.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() else "10")
    try:
        config = load_config(args.config, args.set)
        if args.command != "run" and ranks.launched():
            return _as_rank(args.command, config)
        return _by_hand(args, config)
    except UserError as error:
        if ranks.launched_rank() == 0:
            _print_faults(error)
        _record_failure(error_file, "", 2)
        status = 2
    except KeyboardInterrupt:
        print("grads-ds: interrupted; start it again to go on from here", file=sys.stderr)
        status = 130
    except Exception:
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        _record_failure(error_file, text, 1)
        status = 1
    if ranks.launched():
        # the other ranks may be waiting in a collective: leave without Python's orderly exit, which would wait for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _as_rank(name: str, config: Config) -> int:
    return execute(next(stage for stage in STAGES if stage.name == name), config)


def _by_hand(args: argparse.Namespace, config: Config) -> int:
    first, last = (args.first, args.last) if args.command == "run" else (args.command, args.command)
    begin, end = STAGE_NAMES.index(first), STAGE_NAMES.index(last)
    if begin > end:
        raise UserError(f"--from {first} --to {last}: {first} comes after {last}; swap them")
    stages = STAGES[begin : end + 1]
    hosts = read_hostfile(args.hosts) if args.hosts else [this_machine(args.ranks)]
    run_dir = Path(config.run_dir)
    ranks_in_all = sum(host.slots for host in hosts)
    with lock(run_dir, f"grads-ds {args.command}"):
        for number, stage in enumerate(stages):
            if number == 0 or stages[number - 1].name == "prepare":  # the prepared pool tells more than the config did
                # only for work that is due: a finished run stays finished when its sources move away
                due = [stage.name for stage in stages[number:] if due_units(stage, config, run_dir)]
                check_inputs(config, due, ranks_in_all)
            status = _launch(stage, config, args, hosts) if stage.distributed else execute(stage, config)
            if status:
                return status
    if stages[-1].name in ("evaluate", "report"):
        _print_outcome(run_dir)
    return 0


def _launch(stage: Stage, config: Config, args: argparse.Namespace, hosts: list[Host]) -> int:
    """Give a distributed stage to the launcher, and believe its finished units, not its exit status."""
    run_dir = Path(config.run_dir)
    check_upstream(stage, config, run_dir)
    if not due_units(stage, config, run_dir):
        print(f"{stage.name}: done already, nothing to do", flush=True)
        return 0
    overrides = [part for item in args.set for part in ("--set", item)]
    hostfile = Path(args.hosts).resolve() if args.hosts else None
    status, failure = run_job(stage.name, [stage.name, args.config, *overrides], hosts, hostfile, run_dir / "logs")
    if failure is None and not due_units(stage, config, run_dir):
        return 0
    log = run_dir / "logs" / f"{stage.name}.log"
    if failure is not None and failure.status == 2:
        return 2  # rank 0 has listed the faults
    if failure is not None:
        print(
            f"\ngrads-ds: {stage.name} failed first on rank {failure.rank} ({failure.host}); log: {log}",
            file=sys.stderr,
        )
        print(failure.error.rstrip(), file=sys.stderr)
    else:
        print(
            f"\ngrads-ds: {stage.name} ended before it was done (launcher status {status}); log: {log}", file=sys.stderr
        )
    return 1


def _print_outcome(run_dir: Path) -> None:
    from grads_ds.report import report_table

    print(report_table(run_dir))
    page = run_dir / "report.html"
    if page.is_file():
        print(f"report: {page}")


def _print_faults(error: UserError) -> None:
    count = len(error.faults)
    print(f"grads-ds: {count} fault{'s' if count > 1 else ''} in the input", file=sys.stderr)
    for fault in error.faults:
        print(f"  - {fault}", file=sys.stderr)
    sys.stderr.flush()


def _record_failure(folder: str | None, text: str, status: int) -> None:
    """Leave this rank's own error where the launcher looks for the first one."""
    if not folder or not Path(folder).is_dir():
        return
    import json
    import socket
    import time

    record = {
        "rank": ranks.launched_rank(),
        "host": socket.gethostname(),
        "time": time.time(),
        "status": status,
        "error": text,
    }
    Path(folder, f"rank{ranks.launched_rank()}.json").write_text(json.dumps(record))
