"""Hosts that share a run directory make the pool's parts together: the result is that of one
process to the bit, a host that dies loses no part that was whole, and faults are told as ever.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import write_rows
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.data import blocks, crew, shares
from grads_ds.data.encoding import Outcome
from grads_ds.data.shares import make_share, open_shares, shares_made, worth_sharing
from grads_ds.data.stage import run_prepare
from tests.data.test_parts import config, prepared
from tests.data.test_prepare import answer, tree, write
from tests.ranks import run_on_ranks

__all__ = ["config"]  # a fixture
ROWS = 10
POOL = 9 + 3 + 2 + 1  # blocks of its files


def one_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, by this process alone, each taken when the one before it is done."""
    monkeypatch.setattr(blocks, "BLOCK_ROWS", ROWS)
    monkeypatch.setattr(crew, "BLOCKS_FROM", 0)
    monkeypatch.setattr(crew.os, "sched_getaffinity", lambda pid: {0})


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    one_block_at_a_time(monkeypatch)


def share(values: dict[str, Any], run: Path, start: str, killed_at: int) -> int:
    """A host's share, taken once both hosts are there; rank 1 is killed at its block of number
    `killed_at`. How many parts there were when it ended.
    """
    one_block_at_a_time(pytest.MonkeyPatch())
    rank, begun = int(os.environ["RANK"]), []
    make = shares.make_part

    def make_part(*given: Any, **more: Any) -> Outcome:
        begun.append(given)
        if rank == 1 and len(begun) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(*given, **more)

    shares.make_part = make_part
    (run / f"{start}-{rank}").touch()
    until = time.monotonic() + 120
    while len(list(run.glob(f"{start}-*"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    make_share(Config.model_validate(values), run, rank, lambda _: None)
    return len(list(run.glob("prepared.parts/*/*.arrow")))


def test_parts_of_two_hosts_are_those_of_one_also_when_one_is_killed(config: Config) -> None:
    """Two processes; the second start goes on from what is left of the first, of which one was
    killed.
    """
    whole = prepared(config, "whole")
    run = Path(config.run_dir) / "shared"
    assert open_shares(config, run, "same")
    values = config.model_dump()
    with pytest.raises(AssertionError, match="rank 1 ended with -9"):
        run_on_ranks(2, share, values, run, "first", 2, joined=False)
    left = {file: file.stat().st_mtime_ns for file in run.glob("prepared.parts/*/*.arrow")}
    assert len(left) == 1 + POOL - 1  # but for the one that the killed host had begun
    assert len(list(run.glob("prepared.parts/pool/*.taken"))) == POOL
    assert open_shares(config, run, "same")
    assert not list(run.glob("prepared.parts/pool/*.taken"))
    parts = run_on_ranks(2, share, values, run, "second", -1, joined=False)
    assert max(parts) == 1 + POOL
    assert all(file.stat().st_mtime_ns == when for file, when in left.items())  # not made again
    said = shares_made(run)
    assert len(said) == 2 and all(" processes" in line for line in said)
    opened: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "open_packed", opened.append)
        assert prepared(config, "shared", "same") == whole
    assert opened == []  # the asking host reads no source again


def test_a_damaged_or_missing_part_of_another_host_is_made_here(config: Config) -> None:
    whole = prepared(config, "whole")
    run = Path(config.run_dir) / "shared"
    assert open_shares(config, run, "same")
    make_share(config, run, 0, lambda _: None)
    parts = sorted(run.glob("prepared.parts/pool/*.arrow"))
    parts[2].write_bytes(parts[2].read_bytes()[:-1] + b"?")
    parts[5].unlink()
    assert prepared(config, "shared", "same") == whole


def test_wrong_rows_are_told_as_one_process_tells_them(config: Config, tmp_path: Path) -> None:
    """Rows that cannot be parsed, rows the template refuses, of the pool and of a held-out set."""
    lines = (tmp_path / "lines.jsonl").read_text().splitlines()
    lines[30] = "{"
    lines[60] = json.dumps({"messages": [{"role": "user"}]})
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    found = []
    for name in ("alone", "shared"):
        run = Path(config.run_dir) / name
        if name == "shared":
            assert open_shares(config, run, "same")
            make_share(config, run, 0, lambda _: None)
            assert (run / "prepared.parts/stop").exists()
            assert len(list(run.glob("prepared.parts/pool/*.arrow"))) < 6  # no more for no use
        with pytest.raises(UserError) as caught:
            run_prepare(config, run, "same")
        found.append(caught.value.problems)
    assert found[0] == found[1] and len(found[0]) == 2
    write(tmp_path / "held.jsonl", [answer("yes"), {"text": "no"}])
    assert not open_shares(config, Path(config.run_dir) / "held", "same")


def test_small_and_unreadable_pools_are_no_work_for_other_hosts(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "HOSTS_FROM", POOL)
    assert worth_sharing(config)
    monkeypatch.setattr(shares, "HOSTS_FROM", POOL + 1)
    assert not worth_sharing(config)
    monkeypatch.setattr(shares, "HOSTS_FROM", POOL)
    (tmp_path / "array.json").write_text("[1")
    assert not worth_sharing(config)
    with pytest.raises(UserError, match="wanted open shares; found no"):
        make_share(config, tmp_path / "none", 0, lambda _: None)


def test_replay_is_shared_too_and_gone_on_from(config: Config, tmp_path: Path) -> None:
    replay = str(write_rows(tmp_path / "replay.jsonl", 11, seed=3))
    data = config.data.model_dump() | {"replay": [replay], "validation": {}}
    config = Config.model_validate(config.model_dump() | {"data": data})
    whole = prepared(config, "whole")
    run = Path(config.run_dir) / "shared"
    assert open_shares(config, run, "same")
    make_share(config, run, 0, lambda _: None)
    assert len(list(run.glob("prepared.parts/replay/*.arrow"))) == 2
    assert prepared(config, "shared", "same") == whole
    assert tree(run / "prepared") == whole
