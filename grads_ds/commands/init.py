"""`grads-ds init DATA... --model M`: a commented configuration that runs, with a held-out split.

Reads the data files, the model's tokenizer and config, and looks for GPUs; with `--from`
another tool's configuration too. Writes the configuration and, beside it, a folder with the pool
and the held-out rows. Asks nothing; says why at every value.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grads_ds.config.errors import UserError


def add(command: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    command.add_argument(
        "data", nargs="*", metavar="DATA", help="files, folders or hub ids; together the pool"
    )
    command.add_argument("--model", metavar="M", help="a Hugging Face folder or hub id")
    command.add_argument(
        "--general",
        action="append",
        default=[],
        metavar="DATA",
        help="general data, of which some rows are held out to see what is forgotten",
    )
    command.add_argument(
        "--from",
        dest="other",
        metavar="FILE",
        help="model, data and values of a configuration of Axolotl, LLaMA-Factory or TRL",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("grads.yaml"),
        metavar="FILE",
        help="the configuration; its rows go to FILE's name with _data (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the split")
    command.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Look, choose, write, and say what comes next."""
    from grads_ds.first_config.write_config import Request, write_config

    problems = []
    if args.seed < 0:
        problems.append(f"--seed: wanted 0 or more; found {args.seed}; change it")
    if not args.data and not args.other:
        problems.append("DATA: wanted data files, folders or hub ids; found none; name one")
    if not args.model and not args.other:
        problems.append("--model: wanted a folder or hub id; found none; name one")
    if problems:
        raise UserError(problems)
    borrowed = None
    if args.other:
        from grads_ds.first_config.other_tools import read_other

        borrowed = read_other(args.other)
    data = args.data or (borrowed.data if borrowed else [])
    model = args.model or (borrowed.model if borrowed else "")
    request = Request(data, model, args.general, args.out, args.seed, borrowed)
    for line in write_config(request):
        print(f"init: {line}", flush=True)
    return 0
