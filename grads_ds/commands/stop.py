"""`grads-ds stop RUN`: end a run in order, from any machine that sees its directory; training
writes a checkpoint first.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from grads_ds.config.errors import printable
from grads_ds.launcher import orphans
from grads_ds.launcher.job_outcome import DONE, FAILED
from grads_ds.launcher.timeouts import Timeouts
from grads_ds.run_dir.lock import lock, lock_holder, request_stop
from grads_ds.run_dir.ownership import require_run

WAIT_SECONDS = Timeouts.checkpoint + 60.0


def add(command: argparse.ArgumentParser) -> None:
    """Declare the command."""
    command.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    command.add_argument(
        "--wait-seconds",
        type=float,
        default=WAIT_SECONDS,
        metavar="S",
        help="how long to wait for its end (default: %(default)g)",
    )
    command.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Ask whoever is at work to stop and wait for it: 0 once nobody is, 1 when somebody still is
    after --wait-seconds.
    """
    require_run(args.run_dir)
    holder = request_stop(args.run_dir)
    if holder is not None:
        who = printable(f"{holder.get('what')} on {holder.get('host')}")
        _say(f"asked {who} to stop")
        deadline = time.monotonic() + args.wait_seconds
        while (now := lock_holder(args.run_dir)) and now.get("since") == holder.get("since"):
            if time.monotonic() > deadline:
                _say(f"{who} is still at work after {args.wait_seconds:g} s")
                return FAILED
            time.sleep(0.2)
    with lock(args.run_dir, "grads-ds stop"):
        ended = orphans.end(args.run_dir, "grads-ds stop", _say, Timeouts.checkpoint)
    _say("stopped" if holder or ended else "nobody is at work")
    return DONE


def _say(sentence: str) -> None:
    print(f"grads-ds: {sentence}", file=sys.stderr, flush=True)
