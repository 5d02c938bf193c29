"""Hostfiles are data: a faulty line is named, never guessed around, and never reaches a shell."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from grads_ds.config.errors import UserError
from grads_ds.launcher.host_choice import choose_hosts, slurm_counts, slurm_hosts, this_machine
from grads_ds.launcher.hosts import Host, read_hostfile


def test_hosts_comments_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# cluster\nnode-1 slots=8\n\n10.0.0.2\tslots=4  # rack 2\n")
    assert read_hostfile(path) == [Host("node-1", 8), Host("10.0.0.2", 4)]


def test_every_faulty_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(
        "a\nb slots=0\nc slots=2\nc slots=2\nd;touch slots=1\n$(id) slots=1\ne slots=x\nf slots=2"
        " extra\n"
    )
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    found = [int(fault.split(":")[2]) for fault in caught.value.problems]
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


def test_include_and_exclude_are_written_as_deepspeed_writes_them() -> None:
    hosts = [Host("me@a", 2), Host("b", 4), Host("c", 1)]
    assert choose_hosts(hosts, "a@b:3,0", "") == [Host("me@a", 2), Host("b", 2, (0, 3))]
    assert choose_hosts(hosts, "", "b:1@c") == [Host("me@a", 2), Host("b", 3, (0, 2, 3))]
    assert choose_hosts(hosts, "", "") == hosts


@pytest.mark.parametrize(
    "include, exclude, named",
    [
        ("d", "", "'d' is not one"),
        ("b:4", "", "slots from 0 to 3"),
        ("b:x", "", "'x'"),
        ("a", "b", "found both"),
        ("", "a@b@c", "no host is left"),
    ],
)
def test_choices_that_do_not_fit_are_named(include: str, exclude: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        choose_hosts([Host("a", 2), Host("b", 4), Host("c", 1)], include, exclude)


def test_slurms_numbers() -> None:
    assert slurm_counts("2(x3),1") == [2, 2, 2, 1]
    assert slurm_counts("4") == [4]
    assert slurm_counts("") == slurm_counts("two") == []


def test_a_slurm_allocation_gives_the_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scontrol is a stand-in here; the real one answers in tests/launcher/test_slurm_runs.py."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho node1\necho node2\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    told = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_TASKS_PER_NODE": "2,1"}
    assert slurm_hosts(told) == [Host("node1", 2), Host("node2", 1)]
    assert slurm_hosts(told | {"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}) == [
        Host("node1", 8),
        Host("node2", 8),
    ]
    with pytest.raises(UserError, match="give --hosts"):
        slurm_hosts(told | {"SLURM_TASKS_PER_NODE": "2"})


@pytest.mark.parametrize(
    "line, named",
    [
        (b"a slots=\xc2\xb2", "whole number from 1 to"),  # a digit to Python, and no number
        (b"a slots=\xd9\xa3", "whole number from 1 to"),
        (b"a slots=99999", "whole number from 1 to"),
        (b"a slots=" + b"9" * 5000, "whole number from 1 to"),
        (b"fe80::1 slots=1", "IPv6 address"),
        (b"me@[2001:db8::2] slots=1", "IPv6 address"),
        (b"caf\xe9 slots=1", "wanted a hostfile in UTF-8; found byte 0xe9 in .*hosts:2"),
        (b"localhost slots=1", "found loopback"),
        (b"me@localhost.localdomain slots=1", "found loopback"),
        (b"127.0.1.1 slots=1", "found loopback"),
        (b"127.1 slots=1", "found loopback"),  # as the system's resolver reads it
        (b"0x7f000001 slots=1", "found loopback"),
        (b"0.0.0.0 slots=1", "found loopback"),
        (b"LOCALHOST slots=1", "found loopback"),
        (b"ip6-localhost slots=1", "found loopback"),
        (b"fe80::1%eth0 slots=1", "IPv6 address"),
        (b"[fe80::1%2] slots=1", "IPv6 address"),
        (b"::ffff:10.0.0.1 slots=1", "IPv6 address"),
        (b"a slots=0x2", "whole number from 1 to"),
        (b"a slots=2.0", "whole number from 1 to"),
        (b"a slots=+2", "whole number from 1 to"),
        (b"a slots=1_0", "whole number from 1 to"),
        (b"a slots=0", "whole number from 1 to"),
        (b"\xef\xbb\xbfa slots=1", "is not a host name"),  # a byte order mark, in the middle
        (b"a\x1b[31m slots=1", "is not a host name"),
        (b"\xe2\x80\xaea slots=1", "is not a host name"),
        (b"-oProxyCommand=x slots=1", "is not a host name"),
        (b"me@ok slots=1", "is a duplicate"),
        (b"me@OK slots=1", "is a duplicate"),  # names know no case
        (b"10.0.0.1 slots=1\nme@10.0.0.1 slots=1", "is a duplicate"),
        (b"10.0.0.1 slots=1\n10.0.0.01 slots=1", "10.0.0.01 is a duplicate"),
        (b"10.0.0.1 slots=1\n167772161 slots=1", "167772161 is a duplicate"),
        (b"010.0.0.1 slots=1", "without leading zeros; found 010.0.0.1, which is read as 8.0.0.1"),
        (b"10.1 slots=1", "which is read as 10.0.0.1"),
        (b"0x0A000001 slots=1", "which is read as 10.0.0.1"),
        (b"a..b slots=1", "is not a host name"),
        (b"a" * 64 + b" slots=1", "is not a host name"),
        (b"a.b" * 100 + b" slots=1", "is not a host name"),
        (b"a slots=1e3", "whole number from 1 to"),
        (b"a slots=1\x0bb slots=1", "wanted 'name slots=N'"),  # no line ends to an editor
        (b"a slots=1\xe2\x80\xa8b slots=1", "wanted 'name slots=N'"),
    ],
)
def test_lines_that_would_fail_late_are_named_early(
    line: bytes, named: str, tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_bytes(b"ok slots=2\n" + line + b"\n")
    with pytest.raises(UserError, match=named):
        read_hostfile(tmp_path / "hosts")


def test_line_ends_of_other_systems_and_a_mark_in_front(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfa slots=2\r\nb.c-d\tslots=1\r\n")
    assert read_hostfile(tmp_path / "hosts") == [Host("a", 2), Host("b.c-d", 1)]


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_a_hostfile_is_a_regular_file_of_a_bounded_size(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / "hosts"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(65 * 2**20)
    with pytest.raises(UserError, match="hosts: wanted a hostfile"):
        read_hostfile(path)


def test_this_machine_alone_may_be_called_localhost(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    assert read_hostfile(tmp_path / "hosts") == [Host("localhost", 2)]
