"""Hosts that differ are named with the difference; digests tell contents apart and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from grads_ds.config.errors import UserError
from grads_ds.distributed import host_consistency
from grads_ds.distributed.host_consistency import check_hosts_agree
from grads_ds.run_dir import digests
from grads_ds.run_dir.digests import content_digest


def test_a_digest_is_of_the_content_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tmp_path / "one"
    (one / "sub").mkdir(parents=True)
    (one / "sub/a").write_bytes(b"a" * 1000)
    (one / "b").write_bytes(os.urandom(5000))
    two = tmp_path / "two"
    shutil.copytree(one, two)
    os.utime(two / "b", (1, 1))
    (two / ".cache").write_text("a half-written file")
    assert (
        content_digest(one) == content_digest(two) and content_digest(tmp_path / "absent") is None
    )
    (two / "b").rename(two / "c")
    assert content_digest(one) != content_digest(two)
    (two / "c").rename(two / "b")
    # large files by blocks: other content is seen, and another length
    monkeypatch.setattr(digests, "WHOLE_BELOW", 1000)
    monkeypatch.setattr(digests, "BLOCK", 16)
    before = content_digest(one)
    assert before == content_digest(two)
    (two / "b").write_bytes(bytes(byte ^ 1 for byte in (two / "b").read_bytes()))
    assert before != content_digest(two)
    (one / "b").write_bytes((one / "b").read_bytes() + b"\0")
    assert before != content_digest(one)


def test_every_host_that_differs_is_named_with_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").write_bytes(b"weights")

    def others(value: Any) -> list[Any]:
        host, facts = value
        same = dict(facts)
        changed = facts | {"package torch": "1.0", "code of grads_ds": "other"}
        missing = {name: fact for name, fact in facts.items() if name != "package pyarrow"} | {
            "package mpi4py": "4.2"
        }
        # rank 0's host has two ranks, of which only the first looks
        return [
            (host, facts),
            (host, None),
            ("same", same),
            ("changed", changed),
            ("missing", missing),
        ]

    monkeypatch.setattr(host_consistency.ranks, "all_gather_object", others)
    monkeypatch.setattr(
        host_consistency, "package_versions", lambda: {"torch": "2.0", "pyarrow": "20"}
    )
    with pytest.raises(UserError) as refusal:
        check_hosts_agree({"model": tmp_path / "model"})
    faults = refusal.value.problems
    assert [fault.split(":")[0] for fault in faults] == ["changed", "changed", "missing", "missing"]
    assert (
        "package torch: wanted 2.0 as on" in faults[1]
        and "found 1.0; make the hosts the same" in faults[1]
    )
    assert (
        "package mpi4py: wanted not installed" in faults[2]
        and "package pyarrow: wanted 20" in faults[3]
    )


def test_one_host_agrees_with_itself(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    facts = check_hosts_agree({"model": tmp_path / "model", "data": "owner/name"})
    assert facts[f"model {tmp_path / 'model'}"] == content_digest(tmp_path / "model")
    assert facts["data owner/name"] == "not there" and "package torch" in facts
