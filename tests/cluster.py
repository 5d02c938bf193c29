"""Several hosts on this machine for a test (scripts/local_cluster.sh): brought up, driven, taken
down, skipped where they cannot be.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "local_cluster.sh"
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


@dataclass(frozen=True)
class Cluster:
    """Hosts 1..N.

    `environment` lets a process of this machine reach them by ssh, pdsh and `deepspeed --hostfile`.
    """

    name: str
    hostfile: Path
    addresses: list[str]
    environment: dict[str, str] = field(repr=False)

    @property
    def host_names(self) -> list[str]:
        """What each host calls itself."""
        return [f"{self.name}-{number}" for number in range(1, len(self.addresses) + 1)]

    def control(self, *words: str, seconds: float = 60) -> str:
        """Run a command of the script (kill, boot, link, shape, bytes, ...) on this cluster;
        returns what it printed.
        """
        return _script("--name", self.name, *words, seconds=seconds)

    def on(self, host: int, *command: str) -> list[str]:
        """The argument list that runs `command` inside a host."""
        return [str(SCRIPT), "--name", self.name, "exec", str(host), *command]

    def bytes_sent(self) -> int:
        """What all hosts have sent so far, from their network interfaces' counters."""
        return sum(int(line.split()[1]) for line in self.control("bytes").splitlines())


@contextlib.contextmanager
def cluster(hosts: int, slots: int = 1, *options: str) -> Iterator[Cluster]:
    """`hosts` hosts for the length of a `with`; the test is skipped, with the reason, where they
    cannot be made.
    """
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    missing = [
        tool
        for tool in ("ip", "tc", "sshd", "unshare", "nsenter")
        if not shutil.which(tool, path=PATH)
    ]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (scripts/install.sh --dev)")
    name = f"t{uuid.uuid4().hex[:6]}"
    if subprocess.run(
        ["ip", "netns", "add", name], env=os.environ | {"PATH": PATH}, capture_output=True
    ).returncode:
        pytest.skip("this machine does not let root make network namespaces")
    subprocess.run(["ip", "netns", "del", name], env=os.environ | {"PATH": PATH}, check=True)
    try:
        _script("--name", name, "--slots", str(slots), *options, "up", str(hosts), seconds=120)
        folder = Path("/tmp", f"local_cluster.{name}")
        addresses = [line.split()[0] for line in (folder / "hostfile").read_text().splitlines()]
        environment = os.environ | {
            "PATH": f"{folder}/bin:{PATH}",
            "HOSTFILE": str(folder / "hostfile"),
        }
        yield Cluster(name, folder / "hostfile", addresses, environment)
    finally:
        _script("--name", name, "down")


def _script(*words: str, seconds: float = 60) -> str:
    done = subprocess.run(
        [str(SCRIPT), *words],
        env=os.environ | {"PATH": PATH},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, f"local_cluster.sh {' '.join(words)}: {done.stderr}"
    return done.stdout
