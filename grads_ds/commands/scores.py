"""`grads-ds scores show | compare | export | verify`: look at finished score tables, and check one.

Each action stands in a file of its own. They read run directories and work while other runs go on;
all but `verify` need no GPU and no torch.
"""

from __future__ import annotations

import argparse
from typing import Any

from grads_ds.commands import scores_compare, scores_export, scores_show, scores_verify


def add(commands: Any) -> None:
    """Declare `scores` and what it can do."""
    top = commands.add_parser("scores", help="look at score tables: show, compare, export, verify")
    actions = top.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action in (scores_show, scores_compare, scores_export, scores_verify):
        action.add(actions)
    top.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit status, raises UserError for wrong input."""
    status: int = args.act(args)
    return status
