"""Ways to start one process on every slot: one file each, all with the same names in it.

    commands(job) -> list[Command]      what the launcher starts here; together they start every
                                        rank's supervisor
    problems(hosts) -> list[str]        why this backend cannot be used from here; empty when it can
    ask(hosts, words, question, port)   what a command answers on each host, before any job
    ENTRY                               by what `ask` enters a host: "ssh", "srun", "here"
    RUNNER_SETS                         variables that its runner sets on every rank unasked

A new backend is one new file here, and a row in runners.py when its runner has variables of its
own.

Whatever starts them, the ranks report through the job folder; a backend says nothing about how a
job went.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Protocol

import grads_ds
from grads_ds.config.errors import UserError
from grads_ds.launcher.hosts import Host

NAMES = tuple(sorted(module.name for module in iter_modules(__path__)))
SUPERVISOR = Path(grads_ds.__file__).resolve().parent / "launcher" / "rank.py"
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")


@dataclass(frozen=True)
class Job:
    """What a backend has to know: where the job's folder is, who takes part, and the environment of
    the starting process.
    """

    folder: Path
    hosts: Sequence[Host]
    environment: dict[str, str]
    ssh_port: int | None = None

    @property
    def ranks(self) -> int:
        """How many ranks there are in all."""
        return sum(host.slots for host in self.hosts)

    def supervisor(self) -> list[str]:
        """The command of one rank's supervisor."""
        return [sys.executable, str(SUPERVISOR), str(self.folder)]


@dataclass(frozen=True)
class Command:
    """One process to start here. `files` (text by path) are written before it starts."""

    arguments: list[str]
    environment: dict[str, str]
    files: dict[Path, str] = field(default_factory=dict)


class Backend(Protocol):
    """The signature all backends share."""

    ENTRY: str
    RUNNER_SETS: Sequence[str]

    def commands(self, job: Job) -> list[Command]:
        """What the launcher starts here."""

    def problems(self, hosts: Sequence[Host]) -> list[str]:
        """Why this backend cannot be used from here."""

    def ask(
        self, hosts: Sequence[Host], words: Sequence[str], question: str, port: int | None
    ) -> dict[str, Mapping[str, Any] | str]:
        """What `words` answer (a line of JSON) on each host when given `question`; or, as text,
        why there is no answer.
        """


def load(name: str) -> Backend:
    """The backend of that name."""
    return import_module(f"grads_ds.launcher.backends.{name}")  # type: ignore[return-value]


def choose(name: str | None, hosts: Sequence[Host]) -> str:
    """The backend to use: the one asked for; else local for this machine, Slurm inside an
    allocation, pdsh for a hostfile.
    """
    if name is not None:
        if name == "local" and [host.name for host in hosts] != ["localhost"]:
            raise UserError(
                "--backend local: wanted no hosts but this machine; leave --hosts out, or take pdsh"
            )
        return name
    if [host.name for host in hosts] == ["localhost"]:
        return "local"
    return "slurm" if "SLURM_JOB_ID" in os.environ and shutil.which("srun") else "pdsh"


def missing(*programs: str, package: str) -> list[str]:
    """Problems for programs that are not on PATH."""
    absent = [program for program in programs if not shutil.which(program)]
    return [
        f"wanted the program {name}; found none on PATH; install {package} (scripts/install.sh"
        " --cluster)"
        for name in absent
    ]


def not_plain(texts: Sequence[str], what: str) -> list[str]:
    """Problems for words that a remote shell would read as more than themselves."""
    return [
        f"{what}: {text!r} would pass through a remote shell; wanted letters, digits and @%+=:,./_-"
        " only; use another path"
        for text in dict.fromkeys(texts)
        if not _PLAIN.fullmatch(text)
    ]
