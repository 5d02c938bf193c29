"""`grads-ds export CONFIG --to TOOL --out FOLDER`: the chosen subset in another tool's data format
(docs/exports.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grads_ds.commands.run import add_config
from grads_ds.config.errors import UserError, nearest, problem
from grads_ds.config.load import load_config
from grads_ds.export import TOOLS
from grads_ds.flow.stages import require_done
from grads_ds.run_dir.layout import MAIN


def add(command: argparse.ArgumentParser) -> None:
    """Declare the command."""
    add_config(command)
    command.add_argument(
        "--to", required=True, choices=tuple(TOOLS), metavar="TOOL", help=", ".join(TOOLS)
    )
    command.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="a new folder")
    command.add_argument(
        "--variant",
        default="selected",
        metavar="NAME",
        help="one of select.variants (default: the main selection)",
    )
    command.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Export, and say what was written."""
    from grads_ds.export.subset import export_subset

    config = load_config(args.config, args.set)
    run_dir = Path(config.run_dir)
    known = [MAIN, *config.select.variants]
    if args.variant not in known:
        found = f"{args.variant}{nearest(args.variant, known)}"
        raise UserError(problem("--variant", "a selection of this config", found, "change it"))
    require_done("export", f"select/{args.variant}", config, run_dir)
    rows = export_subset(config, run_dir, args.variant, args.to, args.out)
    print(f"export: {rows:,} rows for {args.to} in {args.out}")
    return 0
