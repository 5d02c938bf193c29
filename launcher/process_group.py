"""torch's process group over a store that listens where the supervisors have agreed to meet
(rendezvous.py), and nowhere else.

Left alone, torch's store listens on every interface of rank 0's host, on a port that any other
process may have taken by then. Under a supervisor `join` is the only way in: the port is held, and
torch's own rendezvous (env://) finds it taken.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from grads_ds.launcher.rendezvous import DOOR_VARIABLE


def held_door() -> socket.socket | None:
    """The socket that rank 0 was handed to be met at, once more; None on the other ranks and
    without a supervisor.
    """
    handed = os.environ.get(DOOR_VARIABLE)
    return socket.socket(fileno=os.dup(int(handed))) if handed else None


def join(backend: str, timeout: timedelta | None = None) -> None:
    """Start torch's process group over a store at the door that rank 0 was handed; nothing where
    nobody handed one out, or where a group stands already.
    """
    import torch.distributed as dist

    if dist.is_initialized() or DOOR_VARIABLE not in os.environ:
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    port, handle = int(os.environ["MASTER_PORT"]), None
    # this rank's alone from here on: no process that it starts has the door, the store closes it
    if handed := os.environ.pop(DOOR_VARIABLE):
        door = socket.socket(fileno=int(handed))
        door.set_inheritable(False)
        port, handle = door.getsockname()[1], door.detach()
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], port, world, is_master=rank == 0, master_listen_fd=handle
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
