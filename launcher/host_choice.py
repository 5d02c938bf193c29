"""Which hosts a run uses: the hostfile's, those of Slurm's allocation, or this machine; chosen by
--include and --exclude.

No torch import.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence

from grads_ds.config.errors import UserError
from grads_ds.launcher.hosts import Host, is_host_name, is_number, read_hostfile


def find_hosts(
    hostfile: str | None, ranks: int | None, include: str = "", exclude: str = ""
) -> list[Host]:
    """The hosts of this run: the hostfile's, else the Slurm allocation's this process is in, else
    this machine alone.

    Raises UserError for every problem in the file, and for names or slots that --include and
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
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"hosts: wanted scontrol to name the hosts of {listed}; {error}; give --hosts"
        ) from None
    names = listing.stdout.split()
    counts = slurm_counts(environment.get("SLURM_TASKS_PER_NODE", ""))
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    # one task a node is salloc's default, not a wish
    if is_number(gpus) and (not counts or set(counts) == {1}):
        counts = [int(gpus)] * len(names)
    if listing.returncode or not names or len(counts) != len(names):
        tasks = environment.get("SLURM_TASKS_PER_NODE")
        found = listing.stderr.strip() or f"{len(names)} hosts and SLURM_TASKS_PER_NODE={tasks}"
        raise UserError(
            f"hosts: wanted the hosts and tasks of Slurm's allocation {listed}; found {found}; give"
            " --hosts"
        )
    strange = [name for name in names if not is_host_name(name)]
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
        found = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
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
    named_hosts, option = (include, "--include") if include else (exclude, "--exclude")
    if not named_hosts:
        return list(hosts)
    known = {host.address: host for host in hosts}
    named: dict[str, list[int]] = {}
    problems = []
    for part in named_hosts.split("@"):
        name, colon, slots = part.partition(":")
        host = known.get(name)
        if host is None:
            problems.append(
                f"{option}: {name!r} is not one of the hosts; there are: {', '.join(known)}"
            )
            continue
        numbers = slots.split(",") if colon else [str(number) for number in range(host.slots)]
        wrong = [number for number in numbers if not is_number(number) or int(number) >= host.slots]
        if wrong:
            problems.append(
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
    if not chosen and not problems:
        problems.append(f"{option} {named_hosts}: no host is left; name fewer")
    if problems:
        raise UserError(problems)
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
