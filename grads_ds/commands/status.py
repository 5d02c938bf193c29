"""`grads-ds status RUN`: how far a run is, from its files alone, on any machine that sees them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from grads_ds.flow.stages import STAGE_NAMES
from grads_ds.launcher.job_status import snapshot, to_text


def add(command: argparse.ArgumentParser) -> None:
    """Declare the command."""
    command.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    shape = command.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="as one JSON object")
    shape.add_argument(
        "--prometheus", action="store_true", help="as metrics in Prometheus' text format"
    )
    command.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Print it."""
    seen = snapshot(args.run_dir)
    if args.json:
        print(json.dumps(seen))
    elif args.prometheus:
        from grads_ds.launcher.metrics import prometheus

        print(prometheus(seen), end="")
    else:
        print(to_text(seen, STAGE_NAMES))
    return 0
