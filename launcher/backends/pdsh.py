"""DeepSpeed's own launcher over pdsh and ssh: `deepspeed --hostfile H --launcher pdsh`.

Its weak places (seen in 0.19.8) are kept out of reach: user arguments, the working directory and
variables would pass through the remote shell unquoted, so only plain words go that way and the
environment travels in a file; a single remote host would run here, so multi-node mode is forced;
the status it returns and its `pkill` are not used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from grads_ds.config.errors import UserError
from grads_ds.launcher.ask_hosts import ask_by_ssh as ask
from grads_ds.launcher.backends import SUPERVISOR, Command, Job, missing, not_plain
from grads_ds.launcher.hosts import Host, hostfile_text

__all__ = ["ENTRY", "RUNNER_SETS", "ask", "commands", "problems"]
ENTRY = "ssh"
# DeepSpeed numbers the first slots' devices over whatever the user chose
RUNNER_SETS: tuple[str, ...] = ("CUDA_VISIBLE_DEVICES",)


def commands(job: Job) -> list[Command]:
    """The `deepspeed` call."""
    hostfile = job.folder / "hostfile"
    if unfit := not_plain([str(job.folder)], "run_dir"):
        raise UserError(unfit)
    runner = [
        "deepspeed.launcher.runner",
        "--hostfile",
        str(hostfile),
        "--launcher",
        "pdsh",
        "--force_multi",
    ]
    # our ranks agree on their own rendezvous; naming an address keeps the runner from asking the
    # first host for one
    runner += ["--master_addr", job.hosts[0].address, "--no_ssh_check", "--no_local_rank"]
    if job.ssh_port is not None:
        runner += ["--ssh_port", str(job.ssh_port)]
    script = [str(SUPERVISOR), str(job.folder)]
    return [
        Command(
            [sys.executable, "-m", *runner, *script],
            job.environment,
            {hostfile: hostfile_text(job.hosts)},
        )
    ]


def problems(hosts: Sequence[Host]) -> list[str]:
    """Missing programs, and paths that a remote shell would read as more than a path."""
    found = missing("pdsh", "ssh", package="pdsh and openssh-client")
    return found + not_plain([os.getcwd(), sys.executable, str(SUPERVISOR)], "pdsh")
