"""`grads-ds compare RUN RUN...`: several runs side by side, as text and as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from grads_ds.config.errors import printable
from grads_ds.report.run_comparison import compare_runs
from grads_ds.report.side_by_side import comparison_page, comparison_text
from grads_ds.run_dir.publish import publish_text


def add(command: argparse.ArgumentParser) -> None:
    """Declare the command."""
    command.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directories")
    command.add_argument("--html", type=Path, metavar="FILE", help="write the page there too")
    command.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Print the comparison; write the page where one is asked for."""
    compared = compare_runs(args.runs)
    print(printable(comparison_text(compared)))
    if args.html is not None:
        publish_text(args.html, comparison_page(compared))
    return 0
