"""torch's process group over a store that listens where the supervisors have agreed to meet
(rendezvous.py), and nowhere else.

Left alone, torch's store listens on every interface of rank 0's host.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from grads_ds.launcher.rendezvous import LISTEN_VARIABLE


def join(backend: str, timeout: timedelta | None = None, listen: str | None = None) -> None:
    """Start torch's process group over a store on the job's interface alone (`listen`, by default
    the supervisor's word); nothing without one, or where a group stands already.
    """
    import torch.distributed as dist

    listen = listen or os.environ.get(LISTEN_VARIABLE)
    if not listen or dist.is_initialized():
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    port = int(os.environ["MASTER_PORT"])
    handle = None
    if rank == 0:
        family = socket.AF_INET6 if ":" in listen else socket.AF_INET
        door = socket.create_server((listen, port), family=family, backlog=1024)
        port, handle = door.getsockname()[1], door.detach()  # the store closes it
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], port, world, is_master=rank == 0, master_listen_fd=handle
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
