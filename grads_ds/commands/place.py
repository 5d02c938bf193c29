"""The arguments that say where jobs run, by what means and within which limits, and what a run
needs there of files and ops.

Every command that starts or checks jobs has them.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from grads_ds.config import Config, UserError
from launcher.backends import NAMES, choose
from launcher.hosts import find_hosts
from launcher.job import Place
from launcher.watch import Limits


def add_place(command: argparse.ArgumentParser) -> None:
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
        default=Limits.hang,
        metavar="S",
        help="no progress for so long is a hang (default: %(default)g)",
    )
    group.add_argument(
        "--start-seconds",
        type=float,
        default=Limits.start,
        metavar="S",
        help="how long the ranks get to start (default: %(default)g)",
    )


def place_of(args: argparse.Namespace) -> Place:
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
        raise UserError(faults + error.faults) from None
    if faults:
        raise UserError(faults)
    limits = Limits(start=args.start_seconds, hang=args.hang_seconds)
    return Place(hosts, choose(args.backend, hosts), (low, high), limits)


def paths(config: Config) -> list[str]:
    """Files and folders that a run reads, absolute; hub ids are left to the hub's client."""
    held_out = [
        source for sources in config.data.validation_sources().values() for source in sources
    ]
    named = [
        config.model.path,
        config.deepspeed,
        *config.data.train,
        *config.data.replay,
        *held_out,
        *config.anchor_sources(),
    ]
    return list(dict.fromkeys(str(Path(name).resolve()) for name in named if Path(name).exists()))


def ops(config: Config) -> list[str]:
    """What DeepSpeed will compile or load for this config's offload."""
    zero = config.deepspeed_json().get("zero_optimization", {})
    optimizer, parameters = (
        zero.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")
    )
    return [
        *(["cpu_adam"] if optimizer != "none" else []),
        *(["async_io"] if "nvme" in (optimizer, parameters) else []),
    ]
