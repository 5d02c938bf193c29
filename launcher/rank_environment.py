"""The environment of one rank: what the launcher forwards, what is true on its host only, where
the ranks meet.

Reads the job folder's `environment.json` once. Standard library only: every rank's supervisor
imports it.
"""

from __future__ import annotations

import json
import os
import pwd
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grads_ds.launcher import rendezvous

_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# what a host or a runner says about itself; everything else is as it was where the launcher was
# started
OF_THE_HOST = ("HOSTNAME", "TMPDIR", "HOME", "USER", "LOGNAME", "SHELL", *_DEVICES)


def take(folder: Path) -> dict[str, str]:
    """The forwarded environment. Raises OSError when its file is gone."""
    forwarded: dict[str, str] = json.loads((folder / "environment.json").read_text())
    return forwarded


def environment_of(
    folder: Path,
    job: Mapping[str, Any],
    place: tuple[int, int, int],
    forwarded: Mapping[str, str],
    stopped: Callable[[], bool],
) -> tuple[dict[str, str], list[str]]:
    """(the rank's environment, sentences about what was chosen for it).

    Args:
        folder: the job folder.
        job: `job.json`.
        place: rank, local rank, number of ranks.
        forwarded: what the launcher forwards.
        stopped: whether the launcher has told this rank to stop.
    """
    rank, local_rank, world = place
    ignored = job.get("runner_sets", ())
    here = {k: os.environ[k] for k in OF_THE_HOST if k in os.environ and k not in ignored}
    host, count, devices = _host_of(job, rank)
    notes = [
        f"{name}={here[name]} of {socket.gethostname()} stands, not {forwarded[name]} of the"
        " launcher's shell"
        for name in _DEVICES
        if name in here and name in forwarded and here[name] != forwarded[name] and devices is None
    ]
    environment = dict(forwarded) | here
    environment |= _of_the_user(environment)
    environment |= rendezvous.agree(folder, job, rank, host == 0, forwarded, stopped)
    environment |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(count),
        "GRADS_DS_JOB_FOLDER": str(folder),
    }
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    return environment, notes


def _host_of(job: Mapping[str, Any], rank: int) -> tuple[int, int, list[int] | None]:
    """(number of the rank's host in the list, its slots, the accelerators chosen for them)."""
    before = 0
    for number, ((_, count), devices) in enumerate(zip(job["hosts"], job["devices"], strict=True)):
        before += count
        if rank < before:
            return number, count, devices or None
    return 0, 1, None


def _of_the_user(environment: Mapping[str, str]) -> dict[str, str]:
    """HOME and LOGNAME for a user id that this host has no entry for, as in many containers:
    libraries ask for both and end with a KeyError.
    """
    try:
        entry = pwd.getpwuid(os.getuid())
        known = {"HOME": entry.pw_dir, "LOGNAME": entry.pw_name}
    except KeyError:
        uid = os.getuid()
        known = {
            "HOME": os.path.join(tempfile.gettempdir(), f"grads-ds-{uid}"),
            "LOGNAME": str(uid),
        }
    return {name: value for name, value in known.items() if not environment.get(name)}
