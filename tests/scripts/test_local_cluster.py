"""The local cluster: hosts that see each other and not each other's processes, links that are slow
or cut, nothing left behind.
"""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from cluster import PATH, SCRIPT, cluster

pytestmark = pytest.mark.cluster


def run(*command: str, **kwargs: object) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, **kwargs
    ).stdout  # type: ignore[call-overload,no-any-return]


def traces(name: str) -> list[str]:
    """Everything of a cluster that this machine shows: namespaces, interfaces, processes, files."""
    environment = os.environ | {"PATH": PATH}
    seen = (
        run("ip", "netns", "list", env=environment)
        + run("ip", "-o", "link", env=environment)
        + run("ps", "ax", "-o", "args")
    )
    found = [
        line for line in seen.splitlines() if f"{name}-" in line or f"local_cluster.{name}" in line
    ]
    return found + [entry for entry in os.listdir("/tmp") if name in entry]


def test_hosts_are_apart_and_reach_each_other() -> None:
    with cluster(2) as pair, cluster(1) as other:
        assert not {*pair.addresses} & {*other.addresses}
        inside = pair.on(
            1,
            "sh",
            "-c",
            f"hostname; hostname -I; ssh {pair.addresses[1]} hostname; ps ax | grep -c sshd",
        )
        lines = run(*inside).split()
        assert lines[:3] == [pair.host_names[0], pair.addresses[0], pair.host_names[1]]
        # from this machine, through what `env` gives
        assert (
            run("ssh", pair.addresses[1], "hostname", env=pair.environment).strip()
            == pair.host_names[1]
        )
        assert pair.hostfile.read_text() == "".join(
            f"{address} slots=1\n" for address in pair.addresses
        )
        # up again is done already
        began = [run(*pair.on(1, "stat", "-c", "%Y", "/proc/1")) for _ in range(1)]
        pair.control("up", "2")
        assert began == [run(*pair.on(1, "stat", "-c", "%Y", "/proc/1"))]
        names = pair.name, other.name
    assert [traces(name) for name in names] == [[], []]


def test_a_host_dies_with_its_processes_and_comes_back() -> None:
    with cluster(2) as pair:
        sleeper = subprocess.Popen(pair.on(2, "sleep", "60"))
        neighbour = subprocess.Popen(pair.on(1, "sleep", "60"))
        time.sleep(0.5)
        pair.control("kill", "2")
        assert sleeper.wait(timeout=10) != 0
        assert neighbour.poll() is None
        assert pair.control("status").split()[2::3] == ["up", "gone"]
        pair.control("boot", "2")
        assert run(*pair.on(1, "ssh", pair.addresses[1], "hostname")).strip() == pair.host_names[1]
        pair.control("link", "2", "down")
        cut = subprocess.run(
            pair.on(1, "ping", "-c1", "-W1", pair.addresses[1]), capture_output=True
        )
        assert cut.returncode != 0
        pair.control("link", "2", "up")
        neighbour.kill()
        neighbour.wait()


def test_links_are_as_slow_as_asked() -> None:
    with cluster(2, 1, "--rate", "80mbit") as pair:
        size = 4_000_000  # 0.4 s at 80 Mbit/s, less the queue's burst
        before, began = pair.bytes_sent(), time.monotonic()
        run(
            *pair.on(
                1,
                "sh",
                "-c",
                f"head -c {size} /dev/zero | ssh {pair.addresses[1]} 'cat > /dev/null'",
            )
        )
        slow = time.monotonic() - began
        assert slow > 0.3
        assert size <= pair.bytes_sent() - before < 1.3 * size


@pytest.mark.parametrize(
    "words, fault",
    [
        (["up"], "number of hosts"),
        (["--name", "A_B", "up", "1"], "--name"),
        (["exec", "9", "ls"], "host's number"),
        ([], "wanted a command"),
    ],
)
def test_senseless_commands_are_refused(words: list[str], fault: str) -> None:
    done = subprocess.run(
        [str(SCRIPT), *words], capture_output=True, text=True, env=os.environ | {"PATH": PATH}
    )
    assert done.returncode == 2 and fault in done.stderr
