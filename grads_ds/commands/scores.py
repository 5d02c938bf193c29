"""`grads-ds scores show | compare | export | verify`: look at finished score tables, and check one.

Each action stands in a file of its own. They read run directories and work while other runs go on;
all but `verify` need no GPU and no torch.
"""

from __future__ import annotations

import argparse

from grads_ds.commands import scores_compare, scores_export, scores_show, scores_verify
from grads_ds.commands.guidance import epilog


def add(command: argparse.ArgumentParser) -> None:
    """Declare `scores` and what it can do."""
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action in (scores_show, scores_compare, scores_export, scores_verify):
        action.add(actions)
    for name, action_parser in actions.choices.items():
        action_parser.formatter_class = argparse.RawDescriptionHelpFormatter
        action_parser.epilog = epilog(f"scores {name}")
    command.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit status, raises UserError for wrong input."""
    status: int = args.act(args)
    return status
