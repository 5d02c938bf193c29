"""Every fault that the tests make happen, and what has to come of it: one list, for the tests and
for the table in docs/launcher.md.

A test that has made a fault happen calls `told` with what it saw. scripts/faults/table.py runs
those tests, gathers what they measured, and writes the table.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """`how` it is made to happen, a pattern of the message, the exit status and the seconds within
    which both must come.

    The pattern has to be found within one line, so that it cannot take its beginning from one
    host's finding and its end from another's. BAD and GOOD in it stand for the hosts' names; what
    is told of BAD must not be told of GOOD as well, but for faults of `both`.
    """

    name: str
    how: str
    message: str
    status: int
    within: float
    both: bool = False


# A doctor's warning does not stop a run: the warnings among the first were told beside faults,
# whose status this is.
FAULTS = [
    # the doctor, on hosts that differ
    Fault(
        "another Python",
        "another interpreter mounted over one host's",
        r"^BAD: python: python 3\.\d+\.\d+, GOOD has 3\.",
        2,
        20,
    ),
    Fault(
        "a package of another version",
        "metadata of another version mounted on one host",
        r"^BAD: packages: .*peft 0\.0\.1, GOOD has",
        2,
        20,
    ),
    Fault(
        "another commit",
        "an edited source file mounted on one host",
        r"^BAD: code: source \w+, GOOD has \w+; .*same commit",
        2,
        20,
    ),
    Fault(
        "no model on one host",
        "an empty file system mounted over it",
        r"^BAD: files: \S*/model differs from GOOD's.*; copy it again",
        2,
        20,
    ),
    Fault(
        "unreadable data on one host",
        "a file that gives an I/O error mounted over it",
        r"^BAD: files: \S*/pool\.jsonl cannot be read: Input/output error; copy it there",
        2,
        20,
    ),
    Fault(
        "other data on one host",
        "a file changed in its middle mounted over it",
        r"^BAD: files: (\S+ differs from GOOD's; )*\S*/held\.jsonl differs from GOOD's",
        2,
        20,
    ),
    Fault(
        "no compiler",
        "g++ hidden on one host, offload in the config",
        r"^BAD: compilers: no g\+\+; DeepSpeed compiles cpu_adam",
        2,
        20,
    ),
    Fault(
        "an op that is not built",
        "an empty folder of extensions",
        r"^BAD: ops: cpu_adam not built; .*DS_BUILD_CPU_ADAM=1",
        2,
        20,
        True,
    ),
    Fault(
        "few open files",
        "prlimit on one host's sshd",
        r"^BAD: open files: limit 512; ulimit -n",
        2,
        20,
    ),
    Fault(
        "little shared memory",
        "64 MiB mounted on one host's /dev/shm",
        r"^BAD: shared memory: 0\.1 GiB in /dev/shm; .*--shm-size",
        2,
        20,
    ),
    Fault(
        "a loopback host name",
        "another /etc/hosts mounted on one host",
        r"^BAD: host name: \S+ resolves to 127\.0\.1\.1; .*/etc/hosts",
        2,
        20,
    ),
    Fault(
        "a clock that is wrong",
        "stand-in: one host's Python reads a clock 90 s ahead",
        r"^\*: clocks: within (89|9\d)\.\d s; start chrony",
        2,
        20,
    ),
    Fault(
        "a missing GPU",
        "stand-in: another nvidia-smi's answer",
        r"^BAD: accelerators: 1 x NVIDIA A100, 80 GiB, driver 550, GOOD has 2 x NVIDIA A100.*equal"
        r" hosts",
        2,
        20,
    ),
    Fault(
        "little locked memory",
        "prlimit on one host's sshd",
        r"^BAD: locked memory: limit 65536; ulimit -l unlimited \(RDMA",
        2,
        20,
    ),
    Fault(
        "a slow link",
        "100 Mbit/s between the hosts",
        r"^\*: all_reduce: 0\.01 GB/s .*usual.*; is this the fast network",
        2,
        20,
    ),
    Fault(
        "little disk",
        "a small file system as run directory",
        r"^BAD: disk: 0\.0 GiB free; .*make room",
        2,
        20,
        True,
    ),
    # the doctor, on hosts that cannot work together
    Fault(
        "an interface that is not there",
        "GLOO_SOCKET_IFNAME=eth7",
        r"^BAD: interface: GLOO_SOCKET_IFNAME=eth7: this host has no such interface; it has .*eth0",
        2,
        20,
        True,
    ),
    Fault(
        "the loopback interface",
        "GLOO_SOCKET_IFNAME=lo",
        r"^BAD: interface: GLOO_SOCKET_IFNAME=lo: that is loopback, which leads to no other host",
        2,
        20,
        True,
    ),
    Fault(
        "blocked ports",
        "a routing rule against the port range on one host",
        r"^BAD: way to GOOD: GOOD:295\d\d: .*; open the ports",
        2,
        20,
    ),
    Fault(
        "a master port that is taken",
        "a listener on the only port of --ports",
        r"^BAD: start: .*no free port from 29511 to 29511 on BAD;",
        2,
        20,
    ),
    Fault(
        "no write permission on one host",
        "its run directory mounted read-only",
        r"^BAD: start: .*cannot write in .*Read-only file system",
        2,
        20,
    ),
    Fault(
        "a run directory that is not shared",
        "another one mounted on one host",
        r"^\S+: start: .*BAD.* does not see the job folder",
        2,
        20,
    ),
    Fault(
        "a full disk at the start",
        "a run directory without a free byte",
        r"No space left on device",
        2,
        20,
    ),
    Fault(
        "no environment on one host",
        "an empty file system mounted over .venv",
        r"BAD: wanted \S+ to look at the host.*same checkout",
        2,
        20,
    ),
    # ssh
    Fault(
        "no ssh key",
        "ssh without an identity",
        r"wants a password or another key .*ssh-copy-id",
        2,
        12,
    ),
    Fault(
        "an unknown host key",
        "an empty known_hosts, strict checking",
        r"host key is not known .*connect once by hand",
        2,
        12,
    ),
    Fault(
        "a changed host key",
        "another key in known_hosts",
        r"host key has changed .*ssh-keygen -R",
        2,
        12,
    ),
    Fault("a wrong port", "ssh to a port where nobody listens", r"no sshd answers there", 2, 12),
    Fault(
        "a login shell that refuses",
        "nologin as the remote account's shell",
        r"it has no usable shell",
        2,
        12,
    ),
    Fault(
        "a host name that does not resolve",
        "no-such-host.invalid in the hostfile",
        r"does not resolve",
        2,
        12,
    ),
    Fault(
        "a host name with shell text",
        "a;touch${IFS}x in the hostfile",
        r"is not a host name",
        2,
        12,
    ),
    Fault(
        "a host that is down",
        "all its processes killed",
        r"wanted to enter it .*(does not answer|no sshd)",
        2,
        20,
    ),
    Fault(
        "a cut network", "the link of one host down", r"wanted to enter it .*does not answer", 2, 20
    ),
    # a run, before and while it works
    Fault(
        "a fault that only `run` meets",
        "other data on one host, and no doctor",
        r"hosts: .*files: .*differs from",
        2,
        20,
    ),
    Fault(
        "a run directory in use",
        "the lock of another host that lives",
        r"is in use by grads-ds run \(pid 1 on not-\S+, since .*\); wait for it or stop it",
        2,
        12,
    ),
    # a warning, and no fault: nobody is at work there any more, and the command does what it was
    # told
    Fault(
        "a stale lock",
        "the lock of another host that has been silent",
        r"^run_dir: .* was in use by grads-ds run \(pid 1 on not-\S+, since .*\), silent for 2\d\d"
        r" s: its lock is taken over",
        0,
        30,
    ),
    Fault(
        "a host that goes down in the middle",
        "all its processes killed",
        r"fell silent without a word",
        4,
        40,
    ),
    Fault(
        "a run directory that one host does not share",
        "an empty file system mounted over its logs",
        r"^the runner did not start rank 1 on BAD\b.*put run_dir on one",
        6,
        40,
    ),
    Fault("a rank that raises", "an exception", r"failed first on rank 1 .*my own words", 1, 30),
    Fault("a rank that is killed", "SIGKILL", r"rank 1 .*killed by signal 9 \(SIGKILL\)", 4, 30),
    Fault("a rank that leaves", "_exit(3)", r"failed first on rank 1 .*status 3", 1, 30),
    Fault(
        "a rank that hangs",
        "a sleep before a barrier",
        r"rank 1 on .* in lost_in_thought .*waiting in barrier",
        5,
        120,
    ),
    Fault(
        "a rank that is slow to record",
        "stopped six sevenths of the time",
        r"rank 1 on BAD is slow: .*? the median rank",
        0,
        90,
    ),
    Fault(
        "a rank that is slow to train",
        "the same",
        r"rank 1 on BAD is slow: .*? the median rank",
        0,
        90,
    ),
    Fault(
        "a rank that is frozen", "SIGSTOP before a barrier", r"rank 2 on BAD gave no stack", 5, 120
    ),
    Fault("a rank out of memory", "a limit of its address space", r"ran out of memory", 3, 30),
    Fault(
        "a full disk in the middle",
        "a rank that fills a small file system",
        r"found no space left",
        7,
        30,
    ),
    Fault("a supervisor that is killed", "SIGKILL", r"rank 1 .*fell silent", 4, 40),
    Fault(
        "a preempted host", "SIGTERM to a supervisor", r"rank 1 was stopped: SIGTERM on", 143, 30
    ),
    Fault("a terminal that is gone", "SIGHUP to the launcher", r"stopped by signal 1$", 129, 40),
    Fault(
        "a lock that is lost",
        "another start's lock put in its place",
        r"was taken over while this process was held up; its holder is now grads-ds run \(pid 7 on"
        r" elsewhere",
        9,
        20,
    ),
    Fault(
        "an interrupt",
        "SIGINT to the launcher, ranks that ignore it",
        r"stopped by signal 2",
        130,
        40,
    ),
]
_BY_NAME = {fault.name: fault for fault in FAULTS}


def told(
    name: str, message: str, status: int, seconds: float, bad: str = "", good: str = ""
) -> None:
    """Check what came of the fault `name` against the list, and note it for the table where one is
    being made.

    `bad` and `good`: names of the host that has it and of the one that has not.
    """
    fault = _BY_NAME[name]
    found = _find(fault.message, message, bad, good)
    assert found, (
        f"{name}: wanted {fault.message!r} with BAD {bad} and GOOD {good} in: {message[-3000:]}"
    )
    if "BAD" in fault.message and good and not fault.both:
        wrong = _find(fault.message, message, good, bad)
        assert wrong is None, f"{name}: told of the wrong host: {wrong}"
    assert status == fault.status, (
        f"{name}: wanted status {fault.status}; found {status}: {message[-1000:]}"
    )
    assert seconds < fault.within, (
        f"{name}: wanted an answer within {fault.within} s; it took {seconds:.1f} s"
    )
    if file := os.environ.get("GRADS_DS_FAULT_TABLE"):
        with open(file, "a") as lines:
            lines.write(
                json.dumps(
                    {"name": name, "message": found, "status": status, "seconds": round(seconds, 1)}
                )
                + "\n"
            )


def _find(pattern: str, message: str, bad: str, good: str) -> str | None:
    """What the pattern finds in one of the message's lines."""
    if ("BAD" in pattern and not bad) or ("GOOD" in pattern and not good):
        return None
    pattern = pattern.replace("BAD", re.escape(bad)).replace("GOOD", re.escape(good))
    found = (re.search(pattern, line.strip()) for line in message.splitlines())
    return next((match[0] for match in found if match), None)
