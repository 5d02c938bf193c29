"""Hosts and their slots: reads a DeepSpeed hostfile or looks at this machine. No torch import."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grads_ds.config import UserError
from grads_ds.run_dir import publish_text

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\S+)")
_NAME = re.compile(r"(?:[A-Za-z0-9_.-]+@)?[A-Za-z0-9](?:[A-Za-z0-9._:-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class Host:
    """One machine and the number of ranks it takes."""

    name: str
    slots: int

    @property
    def address(self) -> str:
        """The name without a user."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a DeepSpeed hostfile (`name slots=N`, `#` comments). Raises UserError listing every faulty line."""
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"hosts: wanted a hostfile; {path}: {error.strerror or error}; give an existing file") from None
    hosts: dict[str, Host] = {}
    faults = []
    for number, raw in enumerate(lines, 1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        found = _LINE.fullmatch(line)
        where = f"hosts: {path}:{number}"
        if not found:
            faults.append(f"{where}: wanted 'name slots=N'; found {line!r}")
            continue
        name, slots = found["name"], found["slots"]
        if not _NAME.fullmatch(name):
            faults.append(f"{where}: {name!r} is not a host name (letters, digits, '.', '-', '_')")
        elif name in hosts:
            faults.append(f"{where}: {name} stands twice; add its slots up on one line")
        elif not slots.isdigit() or int(slots) < 1:
            faults.append(f"{where}: wanted slots to be a whole number from 1 on; found {slots!r}")
        else:
            hosts[name] = Host(name, int(slots))
    if not hosts and not faults:
        faults.append(f"hosts: {path}: wanted at least one line 'name slots=N'; found none")
    if faults:
        raise UserError(faults)
    return list(hosts.values())


def write_hostfile(path: Path, hosts: Sequence[Host]) -> Path:
    """Write `hosts` as a hostfile that DeepSpeed and Open MPI read; returns `path`."""
    publish_text(path, "".join(f"{host.name} slots={host.slots}\n" for host in hosts))
    return path


def visible_gpus() -> int:
    """How many NVIDIA GPUs this process may use, without starting CUDA."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([item for item in visible.split(",") if item.strip() not in ("", "-1")])
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines()) if listing.returncode == 0 else 0


def this_machine(ranks: int | None = None) -> Host:
    """This machine with `ranks` slots; by default one for each GPU, or two on a CPU (one where it has a single core)."""
    gpus = visible_gpus()
    if ranks is not None and (ranks < 1 or (gpus and ranks > gpus)):
        raise UserError(f"--ranks {ranks}: wanted a whole number from 1 to {gpus or 'the number of cores'}")
    return Host("localhost", ranks or gpus or min(2, os.cpu_count() or 1))
