"""Hosts and their slots, and the hostfile of DeepSpeed that names them.

Names are data: what is not a host name is refused, and none ever stands in a shell's text. No torch
import.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grads_ds.config.errors import UserError
from grads_ds.config.text_file import text_of
from grads_ds.launcher.network import ipv4_read, is_loopback

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\S+)")
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_NAME = re.compile(rf"(?:[A-Za-z0-9_.-]+@)?(?=[^@]{{1,253}}$){_LABEL}(?:\.{_LABEL})*")
MOST_SLOTS = 1024  # of one host; more is a slip of the pen


@dataclass(frozen=True)
class Host:
    """One machine and the number of ranks it takes."""

    name: str
    slots: int
    # chosen accelerators of this host; None: the first `slots` of them
    devices: tuple[int, ...] | None = None

    @property
    def address(self) -> str:
        """The name without a user."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a DeepSpeed hostfile (`name slots=N`, `#` comments).

    Raises UserError listing every line with a problem.
    """
    path = Path(path)
    lines = re.split("\r?\n|\r", text_of(path, "hosts", "a hostfile"))
    hosts: dict[str, Host] = {}
    problems, addresses = [], list[str]()
    for number, raw in enumerate(lines, 1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        found = _LINE.fullmatch(line)
        where = f"hosts: {path}:{number}"
        if not found:
            problems.append(f"{where}: wanted 'name slots=N'; found {line!r}")
            continue
        name, slots = found["name"], found["slots"]
        given = name.rpartition("@")[2].lower()  # names know no case
        address = (_NAME.fullmatch(name) and ipv4_read(given)) or given
        if address != given:
            problems.append(
                f"{where}: wanted an IPv4 address as four numbers without leading zeros; found"
                f" {given}, which is read as {address}; write the one that is meant"
            )
        if not _NAME.fullmatch(name):
            problems.append(f"{where}: {_no_name(name)}")
        elif address in addresses:
            problems.append(f"{where}: {name} is a duplicate; add its slots up on one line")
        elif not is_number(slots) or not 1 <= int(slots) <= MOST_SLOTS:
            problems.append(
                f"{where}: wanted slots to be a whole number from 1 to {MOST_SLOTS}; found"
                f" {slots!r}"
            )
        else:
            hosts[name] = Host(name, int(slots))
            addresses.append(address)
    problems += [f"hosts: {path}: {text}" for text in _loopback_beside_others(list(hosts.values()))]
    if not hosts and not problems:
        problems.append(f"hosts: {path}: wanted at least one line 'name slots=N'; found none")
    if problems:
        raise UserError(problems)
    return list(hosts.values())


def is_host_name(name: str) -> bool:
    """Whether a text is a host name or an IPv4 address."""
    return bool(_NAME.fullmatch(name))


def _no_name(name: str) -> str:
    if ":" in name and re.fullmatch(r"\[?[0-9A-Fa-f:.]+(%[^\s\]]+)?\]?", name.rpartition("@")[2]):
        return (
            f"wanted a host name or an IPv4 address; found the IPv6 address {name}, which pdsh and"
            " mpirun read as something else; give the host a name in DNS or /etc/hosts"
        )
    return f"{name!r} is not a host name (letters, digits, '.', '-', '_')"


def is_number(text: str) -> bool:
    """Digits of ASCII alone: "²" is a digit to Python and no number."""
    return re.fullmatch(r"[0-9]{1,9}", text) is not None


def _loopback_beside_others(hosts: Sequence[Host]) -> list[str]:
    """Problems for names that lead every host to itself."""
    return [
        f"{host.name}: wanted a name that the other hosts reach this one by; found loopback, where"
        " each would wait for itself; write its name in the network"
        for host in hosts
        if len(hosts) > 1 and is_loopback(host.address)
    ]


def hostfile_text(hosts: Sequence[Host]) -> str:
    """`hosts` as a hostfile that DeepSpeed and Open MPI read."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)
