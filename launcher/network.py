"""This host's side of the network: free ports, and the address and interface by which it reaches
another host.

Asks the kernel; sends nothing. Standard library only: every rank's supervisor imports it.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct


def free_port(low: int, high: int) -> int:
    """A TCP port of [low, high] that is free on this host on every address; 0, 0 leaves the choice
    to the system.
    """
    for port in range(low, high + 1):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise OSError(
        f"no free port from {low} to {high} on {socket.gethostname()}; widen --ports or end what"
        " holds them"
    )


def address_towards(name: str) -> str | None:
    """The address of this host that `name` sees it by; None when `name` cannot be resolved or
    reached by any route.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((name, 9))  # sends nothing; the kernel looks the route up
        return str(probe.getsockname()[0])
    return None


def interface_towards(name: str) -> str | None:
    """The network interface by which this host reaches `name`; None when it cannot tell."""
    mine = address_towards(name)
    return next(
        (
            interface
            for _, interface in socket.if_nameindex()
            if mine and address_of(interface) == mine
        ),
        None,
    )


def address_of(interface: str) -> str | None:
    """The IPv4 address of a network interface of this host; None when it has none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # SIOCGIFADDR
        answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", interface.encode()))
        return socket.inet_ntoa(answer[20:24])
    return None
