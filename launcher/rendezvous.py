"""Where the ranks of a job meet: rank 0's address and port, agreed on through a file.

Rank 0's supervisor opens the door there and hands it down to rank 0, so that there is no moment in
which the port is chosen and not yet held.

Standard library only: every rank's supervisor imports it. process_group.py meets there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grads_ds.launcher.network import (
    address_of,
    address_towards,
    interface_towards,
    loopback,
    open_door,
)
from grads_ds.launcher.records import publish, read

RENDEZVOUS_SECONDS = 120.0
# the file number of rank 0's listening socket; empty for the ranks that enter there
DOOR_VARIABLE = "GRADS_DS_DOOR"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def agree(
    folder: Path,
    job: Mapping[str, Any],
    rank: int,
    first_host: bool,
    given: Mapping[str, str],
    stopped: Callable[[], bool],
) -> dict[str, str]:
    """MASTER_ADDR, MASTER_PORT, the door of rank 0 and the interface that leads there.

    Rank 0's supervisor listens on a port that is free on its host, and rank 0 inherits the socket:
    any other agreement lets another process take the port before rank 0 does. Between
    hosts, gloo and NCCL are told the interface that leads to the other hosts: left alone they take
    the one the host's own name resolves to, which is loopback on many machines. On one machine all
    of it stays on loopback.

    Args:
        folder: the job folder, where `rendezvous.json` is written by rank 0.
        job: `job.json`: hosts, ports, master_addr.
        rank: this supervisor's rank.
        first_host: whether it is on the host of rank 0.
        given: the forwarded environment; the user's own choice of interfaces stands.
        stopped: whether the launcher has told this rank to stop.

    Raises TimeoutError when rank 0 names no port in time, UserError when none of the ports that the
    user chose is free.
    """
    # this host's side: by which interface and address the others see it
    names = [name.rpartition("@")[2] for name, _ in job["hosts"]]
    if len(names) == 1:
        interface, own = loopback(), "127.0.0.1"
    else:
        other = names[1] if first_host else names[0]
        interface, own = interface_towards(other), address_towards(other) or ""
        own = address_of(given.get(INTERFACES[0], "")) or own
    # rank 0 decides; the others wait for its word
    door = ""
    if rank == 0:
        address = job.get("master_addr") or own or names[0]
        listening = open_door(own, *job["ports"])
        port, door = listening.getsockname()[1], str(listening.detach())
        publish(folder / "rendezvous.json", {"address": address, "port": port})
    deadline = time.monotonic() + RENDEZVOUS_SECONDS
    while not (found := read(folder / "rendezvous.json")):
        if time.monotonic() > deadline or stopped():
            raise TimeoutError(
                f"rank 0 on {names[0]} did not name a port within {RENDEZVOUS_SECONDS:.0f} s"
            )
        time.sleep(0.1)
    agreed = {
        "MASTER_ADDR": str(found["address"]),
        "MASTER_PORT": str(found["port"]),
        DOOR_VARIABLE: door,
    }
    return agreed | {k: interface for k in INTERFACES if interface and k not in given}
