"""What one host's facts (launcher/doctor/facts.py) mean for a run: findings, with advice where
something is wrong. Pure functions; reads and writes nothing.

comparison.py holds the hosts against each other, links.py judges the ways between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grads_ds.launcher.doctor.facts import wrong_interfaces
from grads_ds.launcher.doctor.gpu_health import ailing

FREE_DISK, FREE_SHARED_MEMORY, OPEN_FILES = 20 * 2**30, 2**30, 4096
LOCK_SECONDS = 900.0  # no op takes as long to compile
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at on one host (or on all: `*`).

    `level` is ok, warning or problem.
    """

    check: str
    host: str
    level: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.host}: {self.check}: {self.found}" + (
            f"; {self.advice}" if self.advice else ""
        )


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def check_host(
    name: str, fact: Facts, slots: int, several: bool, ops: Sequence[str]
) -> list[Finding]:
    """What one host's facts say for `slots` ranks, one host of `several` or the only one; `ops` are
    those that DeepSpeed will load.
    """

    def row(check: str, good: bool, found: str, advice: str, level: str = "problem") -> Finding:
        return Finding(check, name, "ok" if good else level, found, "" if good else advice)

    gpus, place, visible = fact["gpus"], fact["run_dir"], fact.get("visible_devices")
    memory, files, disk = fact["shared_memory"], fact["open_files"], place["free"]
    rows = [
        row(
            "accelerators",
            not gpus or _usable(fact) >= slots,
            gpu_words(gpus) + (f", of which {visible} may be used" if gpus and visible else ""),
            f"slots={slots} here: lower it, change CUDA_VISIBLE_DEVICES, or repair the driver",
        ),
        row(
            "run directory",
            place["writable"] is None,
            place["writable"] or "writable, shared",
            "let this user write there",
        ),
        row(
            "disk",
            disk >= FREE_DISK,
            f"{_gigabytes(disk)} free",
            "checkpoints of a 7B model take 100 GB; make room",
            "warning",
        ),
        row(
            "shared memory",
            memory >= FREE_SHARED_MEMORY,
            f"{_gigabytes(memory)} in /dev/shm",
            "give the container more: docker run --shm-size 8g, or an emptyDir of medium Memory",
            "warning",
        ),
        row(
            "open files",
            files >= OPEN_FILES or files < 0,
            f"limit {files}",
            "ulimit -n 65536",
            "warning",
        ),
    ]
    for path, content in fact["files"].items():
        if "error" in content:
            advice = "copy it there, or mount the shared file system"
            rows.append(
                Finding(
                    "files", name, "problem", f"{path} cannot be read: {content['error']}", advice
                )
            )
    if several:
        loop = (fact["resolved"] or "127.").startswith("127.")
        found = f"{fact['host']} resolves to {fact['resolved'] or 'nothing'}"
        advice = (
            "ranks are told their interface here, but other tools will listen on loopback: fix"
            " /etc/hosts"
        )
        rows.append(row("host name", not loop, found, advice, "warning"))
        wrong = "; ".join(wrong_interfaces(fact))
        chosen = ", ".join(f"{key}={value}" for key, value in fact["chosen_interfaces"].items())
        advice = (
            "unset it: the launcher finds the interface towards the other hosts; or name the"
            " right one"
        )
        rows.append(row("interface", not wrong, wrong or chosen or "left to the launcher", advice))
        if gpus:
            limit = fact["locked_memory"]
            rows.append(
                row(
                    "locked memory",
                    limit < 0,
                    f"limit {limit}",
                    "ulimit -l unlimited (RDMA)",
                    "warning",
                )
            )
    rows += [Finding("GPU health", name, *told) for told in ailing(fact)]
    return rows + _ops(row, fact, ops)


def _ops(row: Callable[..., Finding], fact: Facts, ops: Sequence[str]) -> list[Finding]:
    """Ops that DeepSpeed will load: pre-built, compiled by an earlier start, or to be compiled,
    which takes compilers.
    """
    if not ops:
        return []
    to_compile = [op for op in ops if not fact["ops"][op]]
    wanted = ["g++", "ninja", *(["nvcc"] if fact["gpus"] else [])]
    absent = [tool for tool in wanted if not fact["tools"][tool]]
    rows = [
        row(
            "ops",
            not to_compile,
            ", ".join(f"{op} {fact['ops'][op] or 'not built'}" for op in ops),
            "the first start compiles, minutes on every host;"
            f" {' '.join(f'DS_BUILD_{op.upper()}=1' for op in to_compile)} pip install deepspeed"
            " builds them beforehand",
            "warning",
        )
    ]
    if to_compile:
        found = f"no {', '.join(absent)}" if absent else ", ".join(wanted)
        advice = (
            f"DeepSpeed compiles {', '.join(to_compile)} with them: scripts/install.sh, or the CUDA"
            " toolkit"
        )
        rows.append(row("compilers", not absent, found, advice))
    for op in ops:
        if lock := fact.get("op_locks", {}).get(op):  # a host with an older checkout tells of none
            found = f"{op} is locked by {lock['path']}, {lock['seconds']:.0f} s old"
            advice = (
                "a killed start leaves it and later ones wait without end: if nothing compiles"
                f" there now, rm {lock['path']}"
            )
            rows.append(
                row(
                    "op lock",
                    False,
                    found,
                    advice,
                    "problem" if lock["seconds"] > LOCK_SECONDS else "warning",
                )
            )
    return rows


def _usable(fact: Facts) -> int:
    """How many accelerators of a host its ranks may use."""
    visible = fact.get("visible_devices")
    if visible is None:
        return len(fact["gpus"])
    return len([item for item in visible.split(",") if item.strip() not in ("", "-1")])


def gpu_words(gpus: Sequence[Mapping[str, str]]) -> str:
    """Number, kind, memory and driver of a host's accelerators."""
    if not gpus:
        return "none, ranks compute on the CPU"
    kinds = sorted(
        {f"{gpu['name']}, {int(gpu['memory']) // 1024} GiB, driver {gpu['driver']}" for gpu in gpus}
    )
    return f"{len(gpus)} x {'; '.join(kinds)}"
