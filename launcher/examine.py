"""What one rank of `grads-ds doctor` finds out about its host and the way to the others.

Run under the supervisor as `python launcher/examine.py JSON`, which names the paths to look at. Writes into the job folder
`host<rank>.json` (the first rank of each host: what the host is like), `reach<rank>.json` (which other hosts it can enter) and
`collective.json` (rank 0: bandwidths). Standard library only until the collectives, so that a host without torch can say so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # by path, this folder stood there, full of short names

from launcher.rank import address_towards, free_port, interface_towards, publish, read  # noqa: E402

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "datasets",
    "pyarrow",
    "numpy",
    "peft",
    "safetensors",
    "pydantic",
)
MEET_SECONDS = 30.0
CONNECT_SECONDS = 5.0
COLLECTIVE_BYTES = 4 * 2**20


def host_facts(asked: dict[str, Any]) -> dict[str, Any]:
    """Facts about this host, none of which needs torch."""
    name = socket.gethostname()
    try:
        resolved = socket.gethostbyname(name)
    except OSError:
        resolved = None
    run_dir = Path(asked["run_dir"])
    return {
        "host": name,
        "resolved": resolved,
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "code": code_digest(),
        "gpus": gpus(),
        "run_dir": {"free": shutil.disk_usage(run_dir).free, "writable": _writable(run_dir)},
        "shared_memory": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "tools": {tool: shutil.which(tool) for tool in ("g++", "ninja", "nvcc")},
        "files": {path: content_digest(Path(path)) for path in asked["files"]},
    }


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def code_digest() -> str:
    """A digest of this package's own source: hosts with different ones run different programs."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in ("grads_ds", "launcher"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def content_digest(path: Path) -> str | None:
    """A digest of names, sizes and beginnings of the files at `path`, in seconds for any size; None when it cannot be read."""
    digest = hashlib.sha256()
    try:
        for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
            digest.update(f"{file.name}:{file.stat().st_size}:".encode())
            with open(file, "rb") as content:
                digest.update(content.read(65536))
    except OSError:
        return None
    return digest.hexdigest()[:12]


def gpus() -> list[dict[str, str]]:
    """Name, driver and memory (MiB) of every NVIDIA GPU; empty without any."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in told.stdout.splitlines() if told.returncode == 0]
    return [{"name": row[0], "driver": row[1], "memory": row[2]} for row in rows if len(row) == 3]


def _writable(folder: Path) -> str | None:
    """None when this host can write in the folder, else the reason."""
    trial = folder / f".doctor.{socket.gethostname()}.{os.getpid()}"
    try:
        trial.write_text("x")
        trial.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def reach_others(
    folder: Path, rank: int, first_ranks: list[int], names: list[str], ports: tuple[int, int]
) -> dict[str, Any]:
    """Open a port, let the others in, enter theirs. Returns interface and, by host, None or why it cannot be entered."""
    other = next((name for first, name in zip(first_ranks, names, strict=True) if first != rank), None)
    if other is None:
        return {"interface": None, "address": None, "cannot": {}}
    address, interface = address_towards(other), interface_towards(other)
    with socket.socket() as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(("", free_port(*ports)))
        door.listen(64)
        publish(folder / f"door{rank}.json", {"address": address, "port": door.getsockname()[1]})
        deadline = time.monotonic() + MEET_SECONDS
        cannot: dict[str, str | None] = {}
        for first, name in zip(first_ranks, names, strict=True):
            if first == rank:
                continue
            while not (theirs := read(folder / f"door{first}.json")) and time.monotonic() < deadline:
                time.sleep(0.05)
            if not theirs:
                cannot[name] = "it opened no port in time"
                continue
            try:
                with socket.create_connection((theirs["address"], theirs["port"]), timeout=CONNECT_SECONDS):
                    cannot[name] = None
            except OSError as error:
                cannot[name] = f"{theirs['address']}:{theirs['port']}: {error.strerror or error}"
        publish(
            folder / f"reach{rank}.json", {"interface": interface, "address": address, "cannot": cannot, "rank": rank}
        )
        while (
            any(not (folder / f"reach{first}.json").exists() for first in first_ranks) and time.monotonic() < deadline
        ):
            time.sleep(0.05)  # the door stays open until everybody has tried it
    return {"interface": interface, "address": address, "cannot": cannot}


def collectives(rank: int, world: int) -> dict[str, Any]:
    """All-reduce and all-gather over all ranks: seconds, and bytes per second that cross one rank's link (ring algorithm)."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda" if cuda else "cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    count = COLLECTIVE_BYTES // 4
    ours = torch.full((count,), float(rank + 1), device=device)
    gathered = torch.empty(world * (count // world), device=device)
    found: dict[str, Any] = {"time": 0.0}
    for name, moved in (("all_reduce", 2 * (world - 1) / world), ("all_gather", (world - 1) / world)):
        best = float("inf")
        for _ in range(4):
            tensor = ours.clone()
            dist.barrier()
            began = time.perf_counter()
            if name == "all_reduce":
                dist.all_reduce(tensor)
            else:
                dist.all_gather_into_tensor(gathered, tensor[: count // world].contiguous())
            if cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        correct = bool(tensor[0] == world * (world + 1) / 2) if name == "all_reduce" else bool(gathered[-1] == world)
        found[name] = {"seconds": best, "bytes_per_second": moved * COLLECTIVE_BYTES / best, "correct": correct}
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
    if os.environ["LOCAL_RANK"] == "0":
        publish(folder / f"host{rank}.json", host_facts(asked))
        names = [name.rpartition("@")[2] for name, _ in job["hosts"]]
        counts = [slots for _, slots in job["hosts"]]
        first_ranks = [sum(counts[:i]) for i in range(len(counts))]
        reach_others(folder, rank, first_ranks, names, (job["ports"][0], job["ports"][1]))
    if world > 1:
        found = collectives(rank, world)
        if rank == 0:
            publish(folder / "collective.json", found)
    sys.stdout.flush()
    os._exit(0)  # threads of a process group now and then abort an orderly exit


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
