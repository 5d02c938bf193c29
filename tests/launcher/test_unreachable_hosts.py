"""Hosts that cannot be entered, or are not there: told within seconds, with the way to mend it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.launcher import doctor_cluster
from tests.launcher.doctor_cluster import examined, mounted, named
from tests.launcher.faults import told

hosts, job, small_disk = doctor_cluster.hosts, doctor_cluster.job, doctor_cluster.small_disk
pytestmark = pytest.mark.cluster


LAX = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"


SSH = {
    "no ssh key": f"{LAX} -o IdentityFile=/dev/null -o IdentitiesOnly=yes",
    "an unknown host key": "-o StrictHostKeyChecking=yes -o UserKnownHostsFile=/dev/null",
    "a changed host key": "-o StrictHostKeyChecking=yes -o UserKnownHostsFile={folder}/known",
    "a wrong port": f"{LAX} -p 9",
}


@pytest.mark.parametrize("name", SSH)
def test_a_host_that_ssh_cannot_enter(
    name: str,
    hosts: Cluster,
    job: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(job / "key")], check=True
    )
    key = (job / "key.pub").read_text()
    (job / "known").write_text("".join(f"{address} {key}" for address in hosts.addresses))
    (job / "bin").mkdir()
    (job / "bin/ssh").write_text(
        f'#!/bin/sh\nexec /usr/bin/ssh -F /dev/null {SSH[name].format(folder=job)} "$@"\n'
    )
    (job / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{job}/bin:{os.environ['PATH']}")
    told(name, *examined(capsys, hosts.hostfile), **named(hosts))


def test_hosts_that_are_not_there(
    hosts: Cluster, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A login shell that lets nobody in, unknown names, a cut link, a host without processes."""
    shells = job / "passwd"
    shells.write_text(
        "root:x:0:0:root:/root:/usr/sbin/nologin\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n"
    )
    with mounted(hosts, (shells, "/etc/passwd")):
        told("a login shell that refuses", *examined(capsys, hosts.hostfile), **named(hosts))
    for host, name in (
        ("no-such-host.invalid", "a host name that does not resolve"),
        ("a;touch${IFS}x", "a host name with shell text"),
    ):
        (job / "hosts").write_text(f"{host} slots=1\n")
        told(name, *examined(capsys, job / "hosts"))
    assert not (job / "x").exists()
    for name, cut, mend in (
        ("a cut network", ("link", "2", "down"), ("link", "2", "up")),
        ("a host that is down", ("kill", "2"), ("boot", "2")),
    ):
        hosts.control(*cut)
        try:
            told(name, *examined(capsys, hosts.hostfile), **named(hosts))
        finally:
            hosts.control(*mend)
