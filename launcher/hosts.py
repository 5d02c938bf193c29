"""Hosts and their slots: from a DeepSpeed hostfile, Slurm's allocation, or this machine; chosen by
--include and --exclude.

Names are data: what is not a host name is refused, and none ever stands in a shell's text. No torch
import.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grads_ds.config.errors import UserError

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\S+)")
_NAME = re.compile(r"(?:[A-Za-z0-9_.-]+@)?[A-Za-z0-9](?:[A-Za-z0-9._:-]*[A-Za-z0-9])?")


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

    Raises UserError listing every faulty line.
    """
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"hosts: wanted a hostfile; {path}: {error.strerror or error}; give an existing file"
        ) from None
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


def hostfile_text(hosts: Sequence[Host]) -> str:
    """`hosts` as a hostfile that DeepSpeed and Open MPI read."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


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
    return (
        sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
        if listing.returncode == 0
        else 0
    )


def find_hosts(
    hostfile: str | None, ranks: int | None, include: str = "", exclude: str = ""
) -> list[Host]:
    """The hosts of this run: the hostfile's, else the Slurm allocation's this process is in, else
    this machine alone.

    Raises UserError for every fault in the file, and for names or slots that --include and
    --exclude get wrong.
    """
    if hostfile and ranks is not None:
        raise UserError(
            "--ranks: wanted one of --hosts and --ranks; found both; the hostfile's slots say how"
            " many"
        )
    if hostfile:
        hosts = read_hostfile(hostfile)
    elif ranks is None and "SLURM_JOB_ID" in os.environ and "SLURM_JOB_NODELIST" in os.environ:
        hosts = slurm_hosts(os.environ)
    else:
        hosts = [this_machine(ranks)]
    return choose_hosts(hosts, include, exclude)


def slurm_hosts(environment: Mapping[str, str]) -> list[Host]:
    """The hosts of a Slurm allocation: its node list, with as many slots as it gives tasks (else
    GPUs) to each node.
    """
    listed = environment["SLURM_JOB_NODELIST"]
    try:
        told = subprocess.run(
            ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"hosts: wanted scontrol to name the hosts of {listed}; {error}; give --hosts"
        ) from None
    names = told.stdout.split()
    counts = slurm_counts(environment.get("SLURM_TASKS_PER_NODE", ""))
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    # one task a node is salloc's default, not a wish
    if gpus.isdigit() and (not counts or set(counts) == {1}):
        counts = [int(gpus)] * len(names)
    if told.returncode or not names or len(counts) != len(names):
        tasks = environment.get("SLURM_TASKS_PER_NODE")
        found = told.stderr.strip() or f"{len(names)} hosts and SLURM_TASKS_PER_NODE={tasks}"
        raise UserError(
            f"hosts: wanted the hosts and tasks of Slurm's allocation {listed}; found {found}; give"
            " --hosts"
        )
    strange = [name for name in names if not _NAME.fullmatch(name)]
    if strange:
        raise UserError(
            f"hosts: wanted host names from scontrol; found {', '.join(map(repr, strange))}; give"
            " --hosts"
        )
    return [Host(name, slots) for name, slots in zip(names, counts, strict=True)]


def slurm_counts(text: str) -> list[int]:
    """Slurm's compressed list of numbers: "2(x3),1" is [2, 2, 2, 1]. Empty where it is not one."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            return []
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def choose_hosts(hosts: Sequence[Host], include: str, exclude: str) -> list[Host]:
    """Those of `hosts` that are included (all, when `include` is empty) and not excluded, in their
    order.

    Both are written as DeepSpeed writes them: `a@b:0,2` is host a whole and slots 0 and 2 of b.
    Raises UserError.
    """
    if include and exclude:
        raise UserError("--exclude: wanted one of --include and --exclude; found both; remove one")
    wanted, option = (include, "--include") if include else (exclude, "--exclude")
    if not wanted:
        return list(hosts)
    known = {host.address: host for host in hosts}
    named: dict[str, list[int]] = {}
    faults = []
    for part in wanted.split("@"):
        name, colon, slots = part.partition(":")
        host = known.get(name)
        if host is None:
            faults.append(
                f"{option}: {name!r} is not one of the hosts; there are: {', '.join(known)}"
            )
            continue
        numbers = slots.split(",") if colon else [str(number) for number in range(host.slots)]
        wrong = [number for number in numbers if not number.isdigit() or int(number) >= host.slots]
        if wrong:
            faults.append(
                f"{option}: {name}: wanted slots from 0 to {host.slots - 1}; found"
                f" {', '.join(map(repr, wrong))}"
            )
        named.setdefault(name, []).extend(int(number) for number in numbers if number not in wrong)
    chosen = []
    for host in hosts:
        slots_named = set(named.get(host.address, ()))
        kept = [slot for slot in range(host.slots) if (slot in slots_named) == bool(include)]
        if len(kept) == host.slots:
            chosen.append(host)
        elif kept:
            chosen.append(Host(host.name, len(kept), tuple(kept)))
    if not chosen and not faults:
        faults.append(f"{option} {wanted}: no host is left; name fewer")
    if faults:
        raise UserError(faults)
    return chosen


def shared_by(hosts: Sequence[Host], batches: Sequence[int]) -> list[Host]:
    """The first of `hosts`, as many as can share every one of `batches` (samples per step) equally
    among their slots.

    All hosts where there is nothing to share; slots of the last host that do not fit are left out,
    too.
    """
    ranks = sum(host.slots for host in hosts)
    wanted = max(n for n in range(1, ranks + 1) if all(size % n == 0 for size in batches))
    chosen, left = [], wanted
    for host in hosts:
        taken = min(host.slots, left)
        left -= taken
        if taken == host.slots:
            chosen.append(host)
        elif taken:
            chosen.append(Host(host.name, taken, host.devices[:taken] if host.devices else None))
    return chosen


def this_machine(ranks: int | None = None) -> Host:
    """This machine with `ranks` slots; by default one for each GPU, or two on a CPU (one where it
    has a single core).
    """
    gpus = visible_gpus()
    if ranks is not None and (ranks < 1 or (gpus and ranks > gpus)):
        raise UserError(
            f"--ranks {ranks}: wanted a whole number from 1 to {gpus or 'the number of cores'}"
        )
    return Host("localhost", ranks or gpus or min(2, os.cpu_count() or 1))
