"""What a host says of itself stands there, what the user chose arrives, the store listens on the
job's interface alone, and nobody's ssh port is guessed: on two real hosts and on this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grads_ds.launcher.backends import SUPERVISOR
from grads_ds.launcher.doctor.comparison import compare_hosts
from grads_ds.launcher.doctor.findings import check_host
from grads_ds.launcher.hosts import Host, read_hostfile
from grads_ds.launcher.job_outcome import DONE
from grads_ds.launcher.rank_environment import environment_of
from grads_ds.launcher.reporting import Reporter
from grads_ds.launcher.timeouts import Timeouts
from grads_ds.launcher.watch import JobMonitor
from tests.cluster import Cluster
from tests.launcher.jobs import left_behind, run_code

LOOK = [sys.executable, str(SUPERVISOR.parent / "doctor/on_host.py"), "--quick"]
# rank 0 meets the others although a process tries to take its port before it has come so far;
# every rank writes its environment and the addresses its store listens on
MEET = """
import contextlib, json, socket
taken = []
for address in ("", os.environ["MASTER_ADDR"]) if rank == 0 else ():
    with contextlib.suppress(OSError):
        taken.append(socket.create_server((address, int(os.environ["MASTER_PORT"]))))
from grads_ds.launcher.process_group import join
join("gloo")
import torch.distributed as dist
dist.barrier()
port = int(os.environ["MASTER_PORT"])
listening = []
for table in ("tcp", "tcp6"):
    for line in open(f"/proc/net/{table}").read().splitlines()[1:]:
        local, _, state = line.split()[1:4]
        if state == "0A" and int(local.rpartition(":")[2], 16) == port:
            listening.append(local.rpartition(":")[0])
with open(os.path.join(sys.path[0], f"seen{rank}.json"), "w") as file:
    json.dump({"environment": dict(os.environ), "listening": listening}, file)
dist.barrier(); dist.destroy_process_group()
"""


def seen(folder: Path, rank: int) -> dict[str, str]:
    """The environment of a rank that ran MEET."""
    environment: dict[str, str] = json.loads((folder / f"seen{rank}.json").read_text())[
        "environment"
    ]
    return environment


def listening(folder: Path) -> list[str]:
    """Where rank 0's store listens, as dotted addresses ("::" as it is)."""
    raw = json.loads((folder / "seen0.json").read_text())["listening"]
    return [
        ".".join(str(byte) for byte in reversed(bytes.fromhex(text))) if len(text) == 8 else "::"
        for text in raw
    ]


@pytest.mark.cluster
def test_what_is_true_on_a_host_stands_and_what_was_chosen_arrives(
    hosts: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed over pdsh: HOME and USER are the host's, caches and accelerators the user's; the
    store listens on the address that the other host uses.
    """
    monkeypatch.setenv("PATH", hosts.environment["PATH"])
    monkeypatch.chdir(tmp_path)
    here = {"HOME": str(tmp_path), "USER": "elsewhere", "LOGNAME": "elsewhere"}
    chosen = {"XDG_CACHE_HOME": "/cache of mine", "CUDA_VISIBLE_DEVICES": "3,5"}
    for name, value in (here | chosen | {"XDG_RUNTIME_DIR": "/run/user/7"}).items():
        monkeypatch.setenv(name, value)
    place = {"hosts": read_hostfile(hosts.hostfile), "backend": "pdsh"}
    outcome = run_code(MEET, tmp_path, monkeypatch, forked=True, **place)
    assert outcome.status == DONE, outcome
    for rank in range(2):
        environment = seen(tmp_path, rank)
        assert {name: environment[name] for name in chosen} == chosen
        assert (environment["HOME"], environment["USER"]) == ("/root", "root")
        assert environment.get("XDG_RUNTIME_DIR") != "/run/user/7"
        assert environment["MASTER_ADDR"] == hosts.addresses[0]
    assert listening(tmp_path) == [hosts.addresses[0]]
    assert left_behind(str(tmp_path)) == []


def test_one_machines_store_listens_on_loopback_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_code(MEET, tmp_path, monkeypatch, forked=True).status == DONE
    assert listening(tmp_path) == ["127.0.0.1"]
    assert seen(tmp_path, 0)["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.cluster
@pytest.mark.parametrize(
    "backend", [pytest.param("pdsh", marks=pytest.mark.long), "openmpi", "mpich"]
)
def test_the_ssh_port_and_the_way_between_hosts_are_options(
    backend: str, hosts: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ssh is entered by the port that was asked for; the ranks meet where they were told."""
    log = tmp_path / "ssh.log"
    (tmp_path / "bin").mkdir()
    real = shutil.which("ssh", path=hosts.environment["PATH"])
    (tmp_path / "bin/ssh").write_text(f'#!/bin/sh\necho "$*" >> {log}\nexec {real} "$@"\n')
    (tmp_path / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{hosts.environment['PATH']}")
    monkeypatch.chdir(tmp_path)
    for number, address in enumerate(hosts.addresses, 1):
        sshd = [shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin") or "sshd", "-f"]
        sshd += [str(hosts.hostfile.parent / "sshd_config"), "-p", "2222"]
        subprocess.run(hosts.on(number, *sshd, "-o", f"ListenAddress {address}:2222"), check=False)
    outcome = run_code(
        MEET,
        tmp_path,
        monkeypatch,
        forked=True,
        hosts=read_hostfile(hosts.hostfile),
        backend=backend,
        ssh_port=2222,
        master_addr=hosts.host_names[0],
        interface="eth0",
    )
    assert outcome.status == DONE, outcome
    calls = log.read_text().splitlines()
    assert calls and all("-p 2222" in call or "-p2222" in call for call in calls)
    for rank in range(2):
        assert seen(tmp_path, rank)["MASTER_ADDR"] == hosts.host_names[0]
        assert seen(tmp_path, rank)["NCCL_SOCKET_IFNAME"] == "eth0"


@pytest.mark.cluster
def test_one_machine_under_two_names_is_told(hosts: Cluster, tmp_path: Path) -> None:
    """Its ranks would share one accelerator; two hosts on one kernel are two."""

    def facts(host: int) -> dict[str, object]:
        asked = json.dumps({"run_dir": str(tmp_path), "files": []})
        done = subprocess.run(
            hosts.on(host, *LOOK), input=asked, capture_output=True, text=True, check=True
        )
        found: dict[str, object] = json.loads(done.stdout.partition("grads-ds-host:")[2])
        return found

    one, again, two = facts(1), facts(1), facts(2)
    bad = [f for f in compare_hosts({"a": one, "a.example": again, "b": two}) if f.level != "ok"]
    assert [(f.check, f.host, f.level) for f in bad] == [("machine", "a.example", "problem")]
    assert "same machine as a" in bad[0].found and "once" in bad[0].advice


def test_fewer_chosen_accelerators_than_slots_are_a_fault(tmp_path: Path) -> None:
    gpus = [{"name": "H100", "driver": "550", "memory": "81559"}] * 4
    asked = {"run_dir": str(tmp_path), "files": []}
    done = subprocess.run(LOOK, input=json.dumps(asked), capture_output=True, text=True, check=True)
    fact = json.loads(done.stdout.partition("grads-ds-host:")[2]) | {"gpus": gpus}
    for visible, level in ((None, "ok"), ("2,3", "problem"), ("0,1,2,3", "ok")):
        rows = check_host("a", fact | {"visible_devices": visible}, 4, False, [])
        assert next(row for row in rows if row.check == "accelerators").level == level


def test_a_user_id_without_a_passwd_entry_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As containers start it (--user 12345): neither HOME nor a name; libraries ask for both."""
    inside = ["unshare", "--user", "--map-user=12345"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"]).returncode:
        pytest.skip("this machine makes no user namespaces")
    repo = SUPERVISOR.parents[2]
    code = f"""
import sys; sys.path[:0] = [{str(repo)!r}, {str(repo / "tests")!r}]
from pathlib import Path
from grads_ds.launcher.doctor.facts import host_facts
from grads_ds.launcher.hosts import Host
from grads_ds.launcher.job import Placement, run_job
from tests.launcher.jobs import QUICK
host_facts({{"run_dir": ".", "files": []}})
rank = "import getpass, pathlib; print(getpass.getuser(), pathlib.Path.home())"
place = Placement([Host("localhost", 1)], "local", limits=QUICK)
outcome = run_job("stage", [sys.executable, "-c", rank], place, Path("logs"))
sys.exit(outcome.status)
"""
    names = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
    done = subprocess.run(
        [*inside, sys.executable, "-c", code],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k not in names},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["12345", "/tmp/grads-ds-12345"]


def test_a_hosts_own_accelerators_stand_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Slurm's gres gives them; DeepSpeed's runner, which numbers them anew, is not heeded."""
    job = {"hosts": [["a", 1]], "devices": [None], "ports": [0, 0]}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    for ignored, devices, visible, said in (
        ([], None, "7", 1),
        (["CUDA_VISIBLE_DEVICES"], None, "2,3", 0),
        ([], [5], "5", 0),
    ):
        described = job | {"runner_sets": ignored, "devices": [devices]}
        given = {"CUDA_VISIBLE_DEVICES": "2,3"}
        environment, notes = environment_of(tmp_path, described, (0, 0, 1), given, lambda: False)
        assert environment["CUDA_VISIBLE_DEVICES"] == visible and len(notes) == said
    shown: list[str] = []
    monitor = JobMonitor(
        tmp_path, [Host("a", 2)], Timeouts(), shown.append, Reporter(tmp_path, "stage", "now")
    )
    for seen_rank in monitor.ranks:
        seen_rank.record = {"state": "running", "notes": ["CUDA_VISIBLE_DEVICES=7 of a stands"]}
    monitor.look()
    monitor.look()
    assert shown == ["grads-ds: CUDA_VISIBLE_DEVICES=7 of a stands (2 ranks)\n"]
