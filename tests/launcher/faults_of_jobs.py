"""Faults that a run meets, before and while it works."""

from __future__ import annotations

from tests.launcher.fault import Fault

FAULTS_OF_JOBS = [
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
    Fault(
        "a file system that fails",
        "an I/O error in a rank",
        r"rank 1 .*could not use a file .*Input/output error",
        8,
        30,
    ),
    Fault(
        "a mapped file that is cut short",
        "a page that the file no longer has",
        r"rank 1 .*was killed by SIGBUS: a file mapped into memory could not be read",
        8,
        30,
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
