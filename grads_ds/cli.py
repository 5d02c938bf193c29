"""The command line: parses it, hands it to the command's file in `commands/`, turns failures into
exit statuses.

Exit status: 0 done; 2 the user's input is wrong (every problem listed); 7 no space left, 8 the file
system failed; 143 stopped by a signal; 1 anything else, with the first failing rank's own error
last. docs/launcher.md has them all. No torch import here, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from grads_ds import __version__
from grads_ds.commands import (
    check,
    config_schema,
    doctor,
    export,
    merge,
    plan,
    run,
    scores,
    status,
    stop,
)
from grads_ds.config.errors import StoppedBySignal, UserError, printable
from grads_ds.distributed import heartbeat, ranks
from grads_ds.flow.stages import STAGE_NAMES
from grads_ds.launcher.job_outcome import LOCK_LOST, MEANINGS, STOPPED
from grads_ds.run_dir.lock import LostLockError
from grads_ds.run_dir.storage import storage_status


def parser() -> argparse.ArgumentParser:
    """The argument parser of `grads-ds`."""
    top = argparse.ArgumentParser(
        prog="grads-ds",
        description="Gradient-aware data selection and fine-tuning on DeepSpeed: "
        + " -> ".join(STAGE_NAMES)
        + ".",
    )
    top.add_argument("--version", action="version", version=f"grads-ds {__version__}")
    # deepspeed puts it before the sub-command
    top.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # in the order of --help
    for command in (run, doctor, plan, scores, status, check, stop, export, merge, config_schema):
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, translate failures into exit statuses."""
    heartbeat.start()
    args = parser().parse_args(argv)
    # progress bars redraw on a terminal; a log gets a line now and then. Ranks inherit what their
    # launcher found.
    os.environ.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() else "10")
    try:
        status = int(args.handler(args))
    except UserError as error:
        if ranks.launched_rank() == 0:
            _print_problems(error)
        heartbeat.failed("\n".join(error.problems), 2)
        status = 2
    except StoppedBySignal as told:
        if ranks.launched_rank() == 0:
            print(f"grads-ds: {told}; start it again to go on from there", file=sys.stderr)
        status = STOPPED
    except LostLockError as error:
        print(f"grads-ds: {error}", file=sys.stderr)
        status = LOCK_LOST
    except KeyboardInterrupt:
        print("grads-ds: interrupted; start it again to go on from here", file=sys.stderr)
        status = 130
    except Exception as error:
        status = storage_status(error) or 1
        text = printable(traceback.format_exc())
        if status != 1:
            text += f"grads-ds: {MEANINGS[status]} (exit status {status})\n"
        print(text, file=sys.stderr, flush=True)
        heartbeat.failed(text, status)
    if ranks.launched():
        # without Python's orderly exit: after a failure it would wait for ranks that sit in a
        # collective, and after a success threads of torch's process groups abort it now and then
        # ("terminate called", torch 2.13 with gloo); all is published
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _print_problems(error: UserError) -> None:
    count = len(error.problems)
    print(f"grads-ds: {count} problem{'s' if count > 1 else ''} in the input", file=sys.stderr)
    for problem in error.problems:
        print(f"  - {problem}", file=sys.stderr)
    sys.stderr.flush()
