"""Where the ranks of a job meet: rank 0's address and port, agreed on through a file.

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
    free_port,
    interface_towards,
    loopback,
)
from grads_ds.launcher.records import publish, read

RENDEZVOUS_SECONDS = 120.0
LISTEN_VARIABLE = "GRADS_DS_LISTEN"  # the address that rank 0's store listens on
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def agree(
    folder: Path,
    job: Mapping[str, Any],
    rank: int,
    first_host: bool,
    given: Mapping[str, str],
    stopped: Callable[[], bool],
) -> dict[str, str]:
    """MASTER_ADDR, MASTER_PORT, the address to listen on and the interface that leads there.

    Rank 0 picks a port that is free on its host; a fixed one is taken sooner or later. Between
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

    Raises TimeoutError when rank 0 names no port in time.
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
    if rank == 0:
        address = job.get("master_addr") or own or names[0]
        port = free_port(*job["ports"])
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
        LISTEN_VARIABLE: own,
    }
    return agreed | {k: interface for k in INTERFACES if interface and k not in given}
