"""This host's side of the network: a door on a free port, and the address and interface by which
it reaches another host.

Asks the kernel; sends nothing. Standard library only: every rank's supervisor imports it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path

from grads_ds.config.errors import UserError, problem

_LOOPBACK_NAMES = ("localhost", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")
_TRIES = 8  # of a port that the system chooses and another process takes before it listens
_WAITING = 4096  # connections that may wait to be let in; the kernel's somaxconn is a limit too


def open_door(address: str, low: int = 0, high: int = 0) -> socket.socket:
    """A socket that listens at `address` of this host, "" for all, on a free port of [low, high];
    0, 0 leaves the choice to the system.

    Choice and taking are one act: a port that is found free and taken later is another process's
    in between. Where two bind one port at once, the second to listen goes on to the next.

    Raises UserError when no port of a range that somebody chose is free, OSError when the system
    has none.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    why = ""
    for port in range(low, high + 1) if high else [0] * _TRIES:
        try:
            return socket.create_server((address, port), family=family, backlog=_WAITING)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    here = socket.gethostname()
    if not high:
        raise OSError(errno.EADDRINUSE, f"no free port on {here}; end what holds them (ss -tan)")
    ports = f"port {low}" if low == high else f"a port from {low} to {high}"
    raise UserError(
        problem(
            "--ports",
            f"{ports} that is free on {here}",
            f"none ({why})",
            "widen --ports, leave it out, or end what holds them (ss -tlnp)",
        )
    )


def address_towards(name: str) -> str | None:
    """The address of this host that `name` sees it by, IPv4 where there is one; None when `name`
    cannot be resolved or reached by any route.
    """
    found = []
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)
    for family, _, _, _, place in sorted(found, key=lambda entry: entry[0] != socket.AF_INET):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # sends nothing; the kernel looks the route up
            return str(probe.getsockname()[0])
    return None


def interface_towards(name: str) -> str | None:
    """The network interface by which this host reaches `name`; None when it cannot tell."""
    own = address_towards(name)
    interfaces = (interface for _, interface in socket.if_nameindex())
    return next((i for i in interfaces if own and own in addresses_of(i)), None)


def addresses_of(interface: str) -> list[str]:
    """Every address of a network interface of this host, the IPv4 one first."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # SIOCGIFADDR
        answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", interface.encode()))
        found.append(socket.inet_ntoa(answer[20:24]))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            words = line.split()
            if words[-1] == interface:
                found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0])))
    return found


def address_of(interface: str) -> str | None:
    """An address of a network interface of this host, IPv4 where it has one; None: none."""
    return next(iter(addresses_of(interface)), None)


def is_loopback(address: str) -> bool:
    """Whether an address or name leads to this very machine, whichever machine it stands on: also
    in the short forms of the system's resolver (127.1), as 0.0.0.0, scoped, or mapped into IPv6.
    """
    bare = address.lower().strip("[]").partition("%")[0]
    if bare.partition(".")[0] in _LOOPBACK_NAMES:
        return True
    try:
        found = ipaddress.ip_address(bare)
    except ValueError:
        try:
            found = ipaddress.ip_address(socket.inet_aton(bare))
        except OSError:
            return False
    found = getattr(found, "ipv4_mapped", None) or found
    return found.is_loopback or found.is_unspecified


def ipv4_read(name: str) -> str | None:
    """The address that the system's resolver reads a name of numbers as: 01.2.772, 0x1020304 and
    16909060 are 1.2.3.4, 010.2.3.4 is 8.2.3.4; None for a name that is looked up.
    """
    try:
        return socket.inet_ntoa(socket.inet_aton(name))
    except OSError:
        return None


def loopback() -> str | None:
    """The loopback interface of this host; None when there is none with an address."""
    interfaces = (interface for _, interface in socket.if_nameindex())
    return next((i for i in interfaces if (address_of(i) or "").startswith("127.")), None)
