"""The ranks of one host as a world of their own, for the libraries that shard a model: parameters
stay inside the host, and hosts go at their own pace.

DeepSpeed, transformers and the recorder take torch's default process group where none is named.
Inside `within_host` that is the group of this host's ranks; `ranks` still means all of them. A
frozen model needs no reduction, so nothing else has to cross between hosts.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from deepspeed.constants import default_pg_timeout

from grads_ds.distributed import heartbeat, ranks
from grads_ds.run_dir.processes import boot_id

BEAT_SECONDS = 30.0  # between two signs of life that a rank gives to those that wait for it
LOOK_SECONDS = 0.2  # between two looks at whether the others are done
_KEY = "grads_ds/within_host"

_hosts: list[list[int]] = []  # the job's ranks by host, once somebody asked
_group: Any = None  # of this host's ranks, once it was used
_clone: Any = None  # DeepSpeed's, of that group
_passes = 0  # that ended within a host
_last_sign = 0.0


def this_host() -> str:
    """What tells this host from the job's others, also from one of the same name."""
    return f"{platform.node()}/{boot_id()}"


def ranks_by_host() -> list[list[int]]:
    """The job's ranks, host by host. Every rank calls this."""
    if not _hosts:
        named: dict[str, list[int]] = {}
        for rank, host in enumerate(ranks.all_gather_object(this_host())):
            named.setdefault(host, []).append(rank)
        _hosts.extend(named.values())
    return _hosts


@contextlib.contextmanager
def within_host() -> Iterator[None]:
    """Libraries see this host's ranks alone. Every rank of the job enters and leaves.

    Leaving waits for the ranks of all hosts, however far behind they are, as long as one of them
    gives a sign of life (`sign_of_life`). On one host nothing changes.
    """
    global _group, _passes
    hosts = ranks_by_host()
    if len(hosts) == 1:
        yield
        return
    if _group is None:
        _group, _ = dist.new_subgroups_by_enumeration(hosts, timeout=default_pg_timeout)
    size = dist.get_world_size(_group)
    kept = os.environ.get("WORLD_SIZE")
    with ranks.libraries_see(_group), _own_clone_of_world():
        # zero.Init refuses a world of one that the environment calls larger (DeepSpeed 0.19.8)
        os.environ["WORLD_SIZE"] = str(size)
        try:
            yield
        finally:
            if kept is None:
                del os.environ["WORLD_SIZE"]
            else:
                os.environ["WORLD_SIZE"] = kept
    _passes += 1
    _wait_for_all(f"{_KEY}/{_passes}")


@contextlib.contextmanager
def _own_clone_of_world() -> Iterator[None]:
    """DeepSpeed clones the default process group once and keeps the clone in a module variable
    (0.19.8): inside, it is that of this host's group.
    """
    global _clone
    from deepspeed.utils import groups

    kept, groups._WORLD_GROUP = groups._WORLD_GROUP, _clone
    try:
        yield
    finally:
        _clone, groups._WORLD_GROUP = groups._WORLD_GROUP, kept


def sign_of_life() -> None:
    """Tell those that wait in another host that this rank goes on."""
    global _last_sign
    now = time.monotonic()
    if _group is not None and now - _last_sign > BEAT_SECONDS:
        _last_sign = now
        ranks.store().add(f"{_KEY}/signs", 1)


def _wait_for_all(key: str) -> None:
    """Wait until every rank of the job has come here; RuntimeError after the timeout of a
    collective without any sign of life.
    """
    store, world = ranks.store(), ranks.world()
    store.add(key, 1)
    seen, since = (-1, -1), time.monotonic()
    while (found := (store.add(key, 0), store.add(f"{_KEY}/signs", 0)))[0] < world:
        if found != seen:
            seen, since = found, time.monotonic()
        elif time.monotonic() - since > default_pg_timeout.total_seconds():
            raise RuntimeError(
                f"{world - found[0]} ranks of other hosts have not come to the end of the pass and"
                f" gave no sign of life for {default_pg_timeout}"
            )
        heartbeat.beat("waiting for the other hosts", found[0], world)
        time.sleep(LOOK_SECONDS)
