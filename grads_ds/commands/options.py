"""The arguments that say where jobs run, by what means and within which limits.

Every command that starts or checks jobs has them.
"""

from __future__ import annotations

import argparse
import re

from grads_ds.config.errors import UserError
from grads_ds.launcher.backends import NAMES, choose
from grads_ds.launcher.hosts import find_hosts
from grads_ds.launcher.job import Placement
from grads_ds.launcher.watch import Timeouts


def add_placement(command: argparse.ArgumentParser) -> None:
    """Declare them."""
    group = command.add_argument_group("where and how")
    group.add_argument(
        "--hosts",
        metavar="HOSTFILE",
        help="DeepSpeed hostfile; without one, Slurm's allocation or this machine",
    )
    group.add_argument(
        "--include",
        default="",
        metavar="HOSTS",
        help="only these of the hosts, e.g. node1@node2:0,2",
    )
    group.add_argument("--exclude", default="", metavar="HOSTS", help="all hosts but these")
    group.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="ranks on this machine (default: every GPU; 2 on CPU)",
    )
    group.add_argument(
        "--backend",
        choices=(*NAMES, "kubernetes"),
        help="what starts the ranks (default: local, Slurm's srun, or pdsh)",
    )
    group.add_argument(
        "--ports",
        default="0",
        metavar="LOW-HIGH",
        help="ports rank 0 may listen on (default: any free one)",
    )
    group.add_argument(
        "--hang-seconds",
        type=float,
        default=Timeouts.hang,
        metavar="S",
        help="no progress for so long is a hang (default: %(default)g)",
    )
    group.add_argument(
        "--start-seconds",
        type=float,
        default=Timeouts.start,
        metavar="S",
        help="how long the ranks get to start (default: %(default)g)",
    )


def placement(args: argparse.Namespace) -> Placement:
    """Where the parsed arguments say that jobs run. Raises UserError with every fault."""
    faults = []
    for option, value in (
        ("--hang-seconds", args.hang_seconds),
        ("--start-seconds", args.start_seconds),
    ):
        if not 1 <= value < float("inf"):
            faults.append(f"{option}: wanted at least 1 second; found {value:g}")
    found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", args.ports)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
    if not low <= high <= 65535:
        faults.append(
            f"--ports: wanted LOW-HIGH within 1-65535, e.g. 29500-29600; found {args.ports!r}"
        )
    try:
        hosts = find_hosts(args.hosts, args.ranks, args.include, args.exclude)
    except UserError as error:
        raise UserError(faults + error.problems) from None
    if faults:
        raise UserError(faults)
    limits = Timeouts(start=args.start_seconds, hang=args.hang_seconds)
    return Placement(hosts, choose(args.backend, hosts), (low, high), limits)
