"""Within a host libraries see its ranks alone: they shard a model there, while the functions of
`ranks` go on to mean the whole job, and hosts wait for each other at the end only.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from grads_ds.config.config import Config
from grads_ds.distributed import host_group, ranks
from grads_ds.distributed.host_group import ranks_by_host, sign_of_life, within_host
from grads_ds.distributed.reduction import all_reduce_sum
from ranks import run_on_ranks
from tests.probe.jobs import make_config, stage, table_of

# where a collective's whole tensor stands
COLLECTIVES = {
    "all_gather_into_tensor": (0, "output_tensor"),
    "all_gather": (1, "tensor"),
    "all_reduce": (0, "tensor"),
    "broadcast": (0, "tensor"),
}


def two_hosts() -> int:
    """Let this job's ranks be those of two hosts, the even and the odd ones; this rank's host."""
    host = ranks.rank() % 2
    host_group.this_host = lambda: f"host {host}"
    return host


def seen_and_meant() -> dict[str, Any]:
    two_hosts()
    found: dict[str, Any] = {"hosts": ranks_by_host()}
    before = (dist.get_rank(), dist.get_world_size(), os.environ["WORLD_SIZE"])
    for turn in range(2):
        with within_host():
            total = torch.tensor([ranks.rank()])
            dist.all_reduce(total)
            found[f"seen {turn}"] = (dist.get_rank(), dist.get_world_size(), int(total))
            found["meant"] = (
                ranks.rank(),
                ranks.world(),
                ranks.all_gather_object(ranks.rank()),
                ranks.from_main(lambda: f"rank {ranks.rank()}"),
                all_reduce_sum(np.array([ranks.rank()]))[0],
                ranks.in_step(),
            )
            ranks.barrier()
    found["same after"] = before == (
        dist.get_rank(),
        dist.get_world_size(),
        os.environ["WORLD_SIZE"],
    )
    return found


def test_libraries_see_a_host_and_ranks_means_the_job() -> None:
    for rank, found in enumerate(run_on_ranks(5, seen_and_meant)):
        own = [r for r in range(5) if r % 2 == rank % 2]
        assert found["hosts"] == [[0, 2, 4], [1, 3]]
        for turn in range(2):
            assert found[f"seen {turn}"] == (own.index(rank), len(own), sum(own))
        assert found["meant"] == (rank, 5, [0, 1, 2, 3, 4], "rank 0", 10, own)
        assert found["same after"]


def with_shards(config: Config, where: str) -> Config:
    return config.model_copy(
        update={"probe": config.probe.model_copy(update={"shard_within": where})}
    )


def recorded(config: Config) -> dict[str, int]:
    """Record as one of two hosts; bytes into collectives during the pass, by whether ranks of both
    hosts take part.
    """
    from grads_ds.engine import frozen_pass

    two_hosts()
    moved: Counter[str] = Counter()
    in_pass = [False]

    def counted(original: Any, place: int, keyword: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = kwargs[keyword] if keyword in kwargs else args[place]
            group = kwargs.get("group") or dist.group.WORLD
            hosts = {rank % 2 for rank in dist.get_process_group_ranks(group)}
            if in_pass[0]:
                moved["over" if len(hosts) > 1 else "inside"] += tensor.nbytes
            return original(*args, **kwargs)

        return call

    for name, (place, keyword) in COLLECTIVES.items():
        setattr(dist, name, counted(getattr(dist, name), place, keyword))
    # DeepSpeed looked it up when the ranks started
    deepspeed.comm.comm.cdb.all_gather_function = dist.all_gather_into_tensor
    original = frozen_pass.with_progress

    def watched(*args: Any) -> Any:
        in_pass[0] = True
        yield from original(*args)
        in_pass[0] = False

    frozen_pass.with_progress = watched
    stage("probe", config)
    return dict(moved)


def test_a_table_of_two_hosts_is_the_one_of_the_world_and_of_one_host(tmp_path: Path) -> None:
    tables, moved = {}, {}
    for where in ("world", "host"):
        config = with_shards(make_config(tmp_path / where, probe={"layers": "all"}), where)
        stage("prepare", config)
        moved[where] = run_on_ranks(4, recorded, config)
        tables[where] = table_of(config)
    config = make_config(tmp_path / "one", probe={"layers": "all"})
    stage("prepare", config)
    run_on_ranks(4, stage, "probe", config)
    assert tables["host"].equals(tables["world"]) and tables["host"].equals(table_of(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one/model")
    size = sum(p.nbytes for p in model.parameters())
    for world, host in zip(moved["world"], moved["host"], strict=True):
        assert not host.get("over") and host["inside"] > size
        assert world["over"] > size and not world.get("inside")


def test_hosts_of_one_rank_each_hold_the_model_whole(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    stage("prepare", config)
    run_on_ranks(2, recorded, with_shards(config, "host"))
    apart = table_of(config)
    other = make_config(tmp_path / "world")
    stage("prepare", other)
    run_on_ranks(2, stage, "probe", other)
    assert apart.equals(table_of(other))


def at_its_own_pace(signs: bool) -> tuple[float, str]:
    """Seconds until this host had done its part, of which the second one takes three, and what
    leaving said.
    """
    host = two_hosts()
    host_group.default_pg_timeout = timedelta(seconds=1.5)
    host_group.BEAT_SECONDS = 0.3
    ranks_by_host()
    began = time.monotonic()
    try:
        with within_host():
            for _ in range(10 * host):
                time.sleep(0.3)
                if signs:
                    sign_of_life()
            spent = time.monotonic() - began
    except RuntimeError as error:
        return spent, str(error)
    return spent, f"left after {time.monotonic() - began >= 3}"


def test_a_fast_host_waits_at_the_end_for_one_that_gives_signs_of_life() -> None:
    fast, slow = run_on_ranks(2, at_its_own_pace, True)
    assert fast[0] < 1.5 and slow[0] >= 3
    assert fast[1] == slow[1] == "left after True"


def test_a_host_that_gives_no_sign_is_not_waited_for_without_end() -> None:
    fast, _ = run_on_ranks(2, at_its_own_pace, False)
    assert fast[1].startswith("1 ranks of other hosts have not come to the end")
