"""What one rank of `grads-ds doctor` finds out about its host and the way to the others.

Run under the supervisor as `python launcher/doctor/on_host.py JSON`, which names the paths to look
at. Writes into the job folder `host<rank>.json` (the first rank of each host: what the host is
like), `reach<rank>.json` (which other hosts it can enter) and `collective.json` (rank 0:
bandwidths). With `--quick` it reads the JSON from standard input, prints what the host is like as
one line of JSON and ends (launcher/ask_hosts.py). Standard library only until the
collectives, so that a host without torch can say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

# started by its path: the folder to import from is the one above the package
sys.path[0] = str(Path(__file__).absolute().parents[3])

from grads_ds.launcher.ask_hosts import MARK  # noqa: E402
from grads_ds.launcher.doctor.facts import host_facts, wrong_interfaces  # noqa: E402
from grads_ds.launcher.network import address_towards, interface_towards, open_door  # noqa: E402
from grads_ds.launcher.process_group import held_door, join  # noqa: E402
from grads_ds.launcher.records import publish, read  # noqa: E402

MEET_SECONDS = 30.0
CONNECT_SECONDS = 5.0
COLLECTIVE_BYTES = 4 * 2**20


def reach_others(
    folder: Path, rank: int, first_ranks: list[int], names: list[str], ports: tuple[int, int]
) -> None:
    """Open a port, let the others in, enter theirs.

    Writes the interface and, by host, None or why it cannot be entered.
    """
    other = next(
        (name for first, name in zip(first_ranks, names, strict=True) if first != rank), None
    )
    if other is None:
        return
    address, interface = address_towards(other), interface_towards(other)
    with _door(address, ports) as door:
        publish(folder / f"door{rank}.json", {"address": address, "port": door.getsockname()[1]})
        deadline = time.monotonic() + MEET_SECONDS
        cannot: dict[str, str | None] = {}
        for first, name in zip(first_ranks, names, strict=True):
            if first == rank:
                continue
            while (
                not (theirs := read(folder / f"door{first}.json")) and time.monotonic() < deadline
            ):
                time.sleep(0.05)
            if not theirs:
                cannot[name] = "it opened no port in time"
                continue
            try:
                with socket.create_connection(
                    (theirs["address"], theirs["port"]), timeout=CONNECT_SECONDS
                ):
                    cannot[name] = None
            except OSError as error:
                cannot[name] = f"{theirs['address']}:{theirs['port']}: {error.strerror or error}"
        found = {
            "interface": interface,
            "address": address,
            "cannot": cannot,
            "megabits": link_speed(interface),
        }
        publish(folder / f"reach{rank}.json", found)
        _reached(folder, first_ranks, deadline)  # the door stays open until everybody has tried it


def _door(address: str | None, ports: tuple[int, int]) -> socket.socket:
    """Where the ranks will meet, on rank 0, which holds that port already; elsewhere, and where the
    ranks meet at another address of this host, a port of its own.
    """
    door = held_door()
    if door is not None and door.getsockname()[0] in (address, "0.0.0.0"):
        return door
    if door is not None:
        door.close()
    return open_door(address or "", *ports)


def _reached(folder: Path, first_ranks: list[int], deadline: float) -> list[dict[str, Any]]:
    """What every host found, once all have said so or time is over."""
    while True:
        found = [read(folder / f"reach{first}.json") for first in first_ranks]
        if all(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def link_speed(interface: str | None) -> int | None:
    """The interface's link speed in Mbit/s as the kernel reports it, or None."""
    with contextlib.suppress(OSError, ValueError):
        speed = int(Path(f"/sys/class/net/{interface}/speed").read_text())
        return speed if speed > 0 else None
    return None


def may_meet(folder: Path, first_ranks: list[int]) -> bool:
    """Whether every host reaches every other through an interface it has: else a collective would
    only hang.
    """
    if len(first_ranks) == 1:
        return True
    reached = _reached(folder, first_ranks, time.monotonic() + MEET_SECONDS)
    facts = [read(folder / f"host{first}.json") for first in first_ranks]
    chosen = [wrong_interfaces(fact) for fact in facts]
    return (
        all(reached)
        and not any(chosen)
        and not any(reason for r in reached for reason in r["cannot"].values())
    )


def collectives(rank: int, world: int, size: int = COLLECTIVE_BYTES) -> dict[str, Any]:
    """All-reduce and all-gather of `size` bytes over all ranks: seconds, and bytes per second that
    cross one rank's link (in a ring).
    """
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda" if cuda else "cpu")
    join("nccl" if cuda else "gloo")
    count = size // 4
    own = torch.full((count,), float(rank + 1), device=device)
    gathered = torch.empty(world * (count // world), device=device)
    found: dict[str, Any] = {"backend": dist.get_backend()}
    for name, moved in (
        ("all_reduce", 2 * (world - 1) / world),
        ("all_gather", (world - 1) / world),
    ):
        best = float("inf")
        for _ in range(4):
            tensor = own.clone()
            dist.barrier()
            began = time.perf_counter()
            if name == "all_reduce":
                dist.all_reduce(tensor)
            else:
                dist.all_gather_into_tensor(gathered, tensor[: count // world].contiguous())
            if cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        correct = (
            bool(tensor[0] == world * (world + 1) / 2)
            if name == "all_reduce"
            else bool(gathered[-1] == world)
        )
        found[name] = {"seconds": best, "bytes_per_second": moved * size / best, "correct": correct}
    dist.barrier()
    clocks: list[Any] = [None] * world
    dist.all_gather_object(clocks, (socket.gethostname(), time.time()))
    found["clocks"] = clocks
    return found


def main(asked: dict[str, Any]) -> None:
    """Find out and write down."""
    folder = Path(os.environ["GRADS_DS_JOB_FOLDER"])
    job = read(folder / "job.json")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    names = [name.rpartition("@")[2] for name, _ in job["hosts"]]
    counts = [slots for _, slots in job["hosts"]]
    first_ranks = [sum(counts[:i]) for i in range(len(counts))]
    if os.environ["LOCAL_RANK"] == "0":
        publish(folder / f"host{rank}.json", host_facts(asked))
        reach_others(folder, rank, first_ranks, names, (job["ports"][0], job["ports"][1]))
    if world > 1 and may_meet(folder, first_ranks):
        found = collectives(rank, world)
        if rank == 0:
            publish(folder / "collective.json", found)
    sys.stdout.flush()
    os._exit(0)  # threads of a process group now and then abort an orderly exit


if __name__ == "__main__":
    if sys.argv[1] == "--quick":
        # a line of its own, whatever the login scripts have printed
        print(f"\n{MARK}{json.dumps(host_facts(json.loads(sys.stdin.readline())))}", flush=True)
    else:
        main(json.loads(sys.argv[1]))
