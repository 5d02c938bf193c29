"""`grads-ds status RUN`: how far a run is, from its files alone, on any machine that sees them."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from grads_ds.commands.watching import add_watch, watched
from grads_ds.flow.stages import STAGE_NAMES
from grads_ds.flow.time_left import time_left
from grads_ds.launcher.job_status import snapshot
from grads_ds.launcher.status_text import status_text


def add(command: argparse.ArgumentParser) -> None:
    """Declare the command."""
    command.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    shape = command.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="as one JSON object")
    shape.add_argument(
        "--prometheus", action="store_true", help="as metrics in Prometheus' text format"
    )
    add_watch(shape, "again and again, until nobody is at work")
    command.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Print it, once or until nobody is at work."""
    if args.watch is not None:
        return watched(lambda: _look(args.run_dir), args.watch)
    seen = snapshot(args.run_dir)
    if args.json:
        print(json.dumps(seen))
    elif args.prometheus:
        from grads_ds.launcher.metrics import prometheus

        print(prometheus(seen), end="")
    else:
        print(_text(args.run_dir, seen))
    return 0


def _look(run_dir: Path) -> tuple[str, bool]:
    """The text, and whether there is more to come."""
    seen = snapshot(run_dir)
    return _text(run_dir, seen), bool(seen["holder"] or seen["orphans"])


def _text(run_dir: Path, seen: dict[str, Any]) -> str:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    return status_text(seen, STAGE_NAMES, time_left(run_dir, seen), width)
