"""A real Slurm on the hosts of a test cluster: munged everywhere, slurmctld on host 1, one slurmd
per host; gone with the cluster.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster import PATH, Cluster

_CONF = """ClusterName={name}
SlurmctldHost={first}({address})
AuthType=auth/munge
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/affinity
TaskPluginParam=autobind=threads
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmctldTimeout=60
SlurmdTimeout=60
KillWait=5
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def start(hosts: Cluster, cpus: int = 4) -> dict[str, str]:
    """Bring Slurm up on the cluster; returns the environment for its commands, which run inside a
    host (`hosts.on(1, ...)`).
    """
    missing = [
        tool
        for tool in ("munged", "slurmctld", "slurmd", "srun")
        if not shutil.which(tool, path=PATH)
    ]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (scripts/install.sh --dev)")
    folder = hosts.hostfile.parent / "slurm"
    (folder / "state").mkdir(parents=True)
    names = hosts.host_names
    for name in names:
        (folder / f"spool_{name}").mkdir()
    nodes = "\n".join(
        f"NodeName={n} NodeAddr={a} CPUs={cpus}"
        for n, a in zip(names, hosts.addresses, strict=True)
    )
    conf = folder / "slurm.conf"
    conf.write_text(
        _CONF.format(
            name=hosts.name, first=names[0], address=hosts.addresses[0], folder=folder, nodes=nodes
        )
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = os.environ | {"PATH": PATH, "SLURM_CONF": str(conf)}
    for number, name in enumerate(names, 1):
        # slurmd looks for the freezer even where it tracks processes by group
        prepare = (
            f"mkdir -p /run/munge && munged --force --key-file {key} --num-threads 2 --log-file"
            " /run/munge/log --pid-file /run/munge/pid --seed-file /run/munge/seed && mount -t"
            " tmpfs tmpfs /sys/fs/cgroup && mkdir /sys/fs/cgroup/freezer && mount -t cgroup -o"
            " freezer freezer /sys/fs/cgroup/freezer"
        )
        daemons = "slurmctld && slurmd" if number == 1 else "slurmd"
        done = subprocess.run(
            hosts.on(number, "sh", "-c", f"{prepare} && {daemons} -N {name}"),
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            pytest.skip(f"Slurm's daemons do not start here: {done.stderr.strip()[-300:]}")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        told = subprocess.run(
            hosts.on(1, "sinfo", "-h", "-o", "%T %D"),
            env=environment,
            capture_output=True,
            text=True,
        )
        if told.stdout.strip() == f"idle {len(names)}":
            return environment
        time.sleep(0.3)
    logs = "\n".join(_tail(file) for file in sorted(folder.glob("*.log")))
    raise AssertionError(f"Slurm's nodes do not become idle: {told.stdout}{told.stderr}\n{logs}")


def _tail(file: Path) -> str:
    return f"{file.name}:\n{file.read_text()[-1500:]}"
