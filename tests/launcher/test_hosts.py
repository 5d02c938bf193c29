"""Hostfiles are data: a faulty line is named, never guessed around, and never reaches a shell."""

from __future__ import annotations

from pathlib import Path

import pytest

from grads_ds.config import UserError
from launcher.hosts import Host, read_hostfile, this_machine


def test_hosts_comments_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# cluster\nnode-1 slots=8\n\n10.0.0.2\tslots=4  # rack 2\n")
    assert read_hostfile(path) == [Host("node-1", 8), Host("10.0.0.2", 4)]


def test_every_faulty_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a\nb slots=0\nc slots=2\nc slots=2\nd;touch slots=1\n$(id) slots=1\ne slots=x\nf slots=2 extra\n")
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    found = [int(fault.split(":")[2]) for fault in caught.value.faults]
    assert found == [1, 2, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_no_hosts_is_a_fault(tmp_path: Path, text: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match="at least one line"):
        read_hostfile(tmp_path / "hosts")
    with pytest.raises(UserError, match="wanted a hostfile"):
        read_hostfile(tmp_path / "absent")


def test_this_machine_takes_the_asked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert this_machine(3) == Host("localhost", 3)
    with pytest.raises(UserError, match="--ranks 0"):
        this_machine(0)
