"""The arguments that say where jobs run, by what means and within which limits.

Every command that starts or checks jobs has them; the options of a queue stand in its own file
(launcher/submit/).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable

from grads_ds.config.errors import UserError
from grads_ds.launcher.backends import NAMES, choose
from grads_ds.launcher.host_choice import find_hosts
from grads_ds.launcher.hosts import is_host_name
from grads_ds.launcher.job import Placement
from grads_ds.launcher.network import is_loopback
from grads_ds.launcher.timeouts import Timeouts


def add_placement(command: argparse.ArgumentParser, queues: Iterable[str] = ()) -> None:
    """Declare them; `queues` are what `--backend` may name besides what starts the ranks."""
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
        choices=tuple(dict.fromkeys((*NAMES, *queues))),
        help="what starts the ranks (default: local, Slurm's srun, or pdsh)",
    )
    group.add_argument(
        "--ports",
        default="0",
        metavar="LOW-HIGH",
        help="ports rank 0 may listen on (default: any free one)",
    )
    for option, _, default, words in _LIMITS:
        group.add_argument(
            option, type=float, default=default, metavar="S", help=f"{words} (default: %(default)g)"
        )
    group.add_argument(
        "--ssh-port", type=int, metavar="PORT", help="sshd's port on every host (default: ssh's)"
    )
    group.add_argument(
        "--master-addr",
        metavar="ADDRESS",
        help="where the ranks find rank 0 (default: the address the other hosts see it by)",
    )
    group.add_argument(
        "--interface",
        metavar="NAME",
        help="network interface of gloo and NCCL (default: the one that leads to the other hosts)",
    )


# option, field of Timeouts, default, help
_LIMITS = (
    ("--hang-seconds", "hang", Timeouts.hang, "no progress for so long is a hang"),
    ("--start-seconds", "start", Timeouts.start, "how long the ranks get to start"),
    ("--lost-seconds", "lost", Timeouts.lost, "a host that is silent for so long is lost"),
    (
        "--grace-seconds",
        "checkpoint",
        Timeouts.checkpoint,
        "how long ranks get for a last checkpoint when the run is asked to stop",
    ),
)


def placement(args: argparse.Namespace) -> Placement:
    """Where the parsed arguments say that jobs run. Raises UserError with every problem."""
    problems = []
    given = {option: getattr(args, _name(option)) for option, *_ in _LIMITS}
    for option, value in given.items():
        if not 1 <= value < float("inf"):
            problems.append(f"{option}: wanted at least 1 second; found {value:g}; give more")
    found = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", args.ports)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
    if not low <= high <= 65535:
        problems.append(
            f"--ports: wanted LOW-HIGH within 1-65535, e.g. 29500-29600; found {args.ports!r}"
        )
    if args.ssh_port is not None and not 1 <= args.ssh_port <= 65535:
        problems.append(f"--ssh-port: wanted a port from 1 to 65535; found {args.ssh_port}")
    if args.master_addr is not None and not is_host_name(args.master_addr):
        problems.append(
            f"--master-addr: wanted a host name or an IPv4 address; found {args.master_addr!r}"
        )
    if args.interface is not None and not re.fullmatch(r"[\w.:@-]{1,15}", args.interface, re.A):
        problems.append(
            f"--interface: wanted the name of one interface, e.g. eth0; found {args.interface!r}"
        )
    try:
        hosts = find_hosts(args.hosts, args.ranks, args.include, args.exclude)
    except UserError as error:
        raise UserError(problems + error.problems) from None
    if len(hosts) > 1 and args.master_addr and is_loopback(args.master_addr):
        problems.append(
            f"--master-addr: wanted an address that every host reaches rank 0 by; found"
            f" {args.master_addr}, which is each host itself"
        )
    if problems:
        raise UserError(problems)
    limits = Timeouts(**{field: given[option] for option, field, *_ in _LIMITS})
    return Placement(
        hosts,
        choose(args.backend, hosts),
        (low, high),
        limits,
        args.ssh_port,
        args.master_addr,
        args.interface,
    )


def placement_words(args: argparse.Namespace) -> list[str]:
    """The same arguments again as words, less those that name hosts and backend."""
    words = ["--ports", args.ports]
    for option, *_ in _LIMITS:
        words += [option, f"{getattr(args, _name(option)):g}"]
    for option in ("--ssh-port", "--master-addr", "--interface"):
        if (value := getattr(args, _name(option))) is not None:
            words += [option, str(value)]
    return words


def _name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")
