"""Is the cluster fit for a run? Every host is looked at the way a job would use it, and compared with the first one.

`examine` tries ssh, runs launcher/examine.py on every slot through the very backend a job would use, and turns what comes
back into findings: what was looked at, where, what was found, and advice where it is wrong. No torch import.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grads_ds.config import UserError
from launcher.backends import BY_SSH
from launcher.hosts import Host
from launcher.job import Place, run_job
from launcher.outcome import DONE
from launcher.rank import read
from launcher.reach import unreachable
from launcher.watch import Limits

SCRIPT = Path(__file__).with_name("examine.py")
LIMITS = Limits(start=60.0, lost=15.0, hang=60.0, grace=3.0, settle=3.0)
FREE_DISK, FREE_SHARED_MEMORY, OPEN_FILES = 20 * 2**30, 2**30, 4096
CLOCK_SECONDS = 5.0
SLOW_BYTES_PER_SECOND = (
    50e6  # half of gigabit Ethernet: below it the hosts talk over the wrong network, or a broken one
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at on one host (or on all: `*`). `level` is ok, warning or fault."""

    check: str
    host: str
    level: str
    found: str
    advice: str = ""


def examine(place: Place, run_dir: Path, files: Sequence[str], wants_compiler: bool) -> list[Finding]:
    """Look at every host. `files` are the model and data paths that a run reads; the compiler matters for offload."""
    findings: list[Finding] = []
    if place.backend in BY_SSH:
        lost = unreachable(place.hosts)
        for host in place.hosts:
            fault = lost.get(host.name)
            findings.append(
                Finding("ssh", host.address, "fault" if fault else "ok", fault or "entered without a password")
            )
        if lost:
            return findings
    question = {"run_dir": str(run_dir.resolve()), "files": list(files)}
    limited = Place(place.hosts, place.backend, place.ports, LIMITS)
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        outcome = run_job("doctor", [sys.executable, str(SCRIPT), json.dumps(question)], limited, run_dir / "logs")
    except UserError as error:
        return findings + [Finding("start", "*", "fault", fault) for fault in error.faults]
    except OSError as error:
        return [
            *findings,
            Finding("run directory", "*", "fault", f"{run_dir}: {error.strerror or error}", "make it writable here"),
        ]
    folder = max((run_dir / "logs/doctor").iterdir())
    if outcome.status == DONE:
        findings.append(Finding("start", "*", "ok", f"every rank started, by {place.backend}"))
    else:
        words = outcome.error.strip().splitlines()
        found = outcome.sentence + (f": {words[-1]}" if words else "")
        findings.append(Finding("start", outcome.host or "*", "fault", found, f"see {folder}"))
    return findings + judge_hosts(place.hosts, folder, wants_compiler)


def judge_hosts(hosts: Sequence[Host], folder: Path, wants_compiler: bool) -> list[Finding]:
    """Findings from what the ranks wrote into the job folder."""
    firsts = [sum(host.slots for host in hosts[:i]) for i in range(len(hosts))]
    facts = {host.address: read(folder / f"host{first}.json") for host, first in zip(hosts, firsts, strict=True)}
    slots = {host.address: host.slots for host in hosts}
    findings: list[Finding] = []
    known = {name: fact for name, fact in facts.items() if fact}
    for name, fact in known.items():
        findings += _one_host(name, fact, slots[name], len(hosts) > 1, wants_compiler)
    findings += _same_everywhere(known)
    for host, first in zip(hosts, firsts, strict=True):
        reach = read(folder / f"reach{first}.json")
        for other, fault in reach.get("cannot", {}).items():
            level, found = ("fault", fault) if fault else ("ok", f"reached through {reach['interface']}")
            advice = "open the ports between the hosts (--ports LOW-HIGH names them), or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            findings.append(Finding(f"way to {other}", host.address, level, found, advice if fault else ""))
    return findings + _collectives(read(folder / "collective.json"), len(hosts) > 1)


def _one_host(name: str, fact: Mapping[str, Any], slots: int, several: bool, wants_compiler: bool) -> list[Finding]:
    def row(check: str, good: bool, found: str, advice: str, level: str = "fault") -> Finding:
        return Finding(check, name, "ok" if good else level, found, "" if good else advice)

    gigabytes: Callable[[int], str] = lambda size: f"{size / 2**30:.1f} GiB"  # noqa: E731
    gpus, place = fact["gpus"], fact["run_dir"]
    memory, files, disk = fact["shared_memory"], fact["open_files"], place["free"]
    rows = [
        row("accelerators", not gpus or len(gpus) >= slots, _gpu_words(gpus), f"slots={slots} here: lower it, or mend the driver"),
        row("run directory", place["writable"] is None, place["writable"] or "writable, shared", "let this user write there"),
        row("disk", disk >= FREE_DISK, f"{gigabytes(disk)} free", "checkpoints of a 7B model take 100 GB; make room", "warning"),
        row("shared memory", memory >= FREE_SHARED_MEMORY, f"{gigabytes(memory)} in /dev/shm",
            "give the container more: docker run --shm-size 8g, or an emptyDir of medium Memory", "warning"),
        row("open files", files >= OPEN_FILES or files < 0, f"limit {files}", "ulimit -n 65536", "warning"),
    ]  # fmt: skip
    if several:
        loop = (fact["resolved"] or "127.").startswith("127.")
        found = f"{fact['host']} resolves to {fact['resolved'] or 'nothing'}"
        advice = "ranks are told their interface here, but other tools will listen on loopback: mend /etc/hosts"
        rows.append(row("host name", not loop, found, advice, "warning"))
        if gpus:
            unlimited = fact["locked_memory"] < 0
            rows.append(
                row(
                    "locked memory",
                    unlimited,
                    f"limit {fact['locked_memory']}",
                    "ulimit -l unlimited (RDMA)",
                    "warning",
                )
            )
    if wants_compiler:
        wanted = ["g++", "ninja", *(["nvcc"] if gpus else [])]
        absent = [tool for tool in wanted if not fact["tools"][tool]]
        found = f"no {', '.join(absent)}" if absent else ", ".join(wanted)
        rows.append(
            row(
                "compilers",
                not absent,
                found,
                "offload compiles an optimizer: scripts/install.sh, or the CUDA toolkit",
            )
        )
    return rows


def _gpu_words(gpus: Sequence[Mapping[str, str]]) -> str:
    if not gpus:
        return "none, ranks compute on the CPU"
    kinds = sorted({f"{gpu['name']}, {int(gpu['memory']) // 1024} GiB, driver {gpu['driver']}" for gpu in gpus})
    return f"{len(gpus)} x {'; '.join(kinds)}"


def _same_everywhere(facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What has to be equal on all hosts, against the first one."""
    if not facts:
        return []
    first, reference = next(iter(facts.items()))
    advice = {
        "python": "use the same environment on every host",
        "code": "update the checkout on every host to the same commit",
        "packages": "install the same versions on every host (constraints.txt)",
        "accelerators": "ranks wait for the slowest and break at the smallest: use equal hosts",
    }
    findings = []
    for path, digest in reference["files"].items():
        for name, fact in facts.items():
            theirs = fact["files"].get(path)
            if theirs is None:
                findings.append(
                    Finding(
                        "files",
                        name,
                        "fault",
                        f"{path} cannot be read",
                        "copy it there, or mount the shared file system",
                    )
                )
            elif theirs != digest:
                findings.append(Finding("files", name, "fault", f"{path} differs from {first}'s", "copy it again"))
    if not findings:
        findings.append(Finding("files", "*", "ok", f"{len(reference['files'])} paths, the same on every host"))
    views: dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
        "python": lambda fact: {"python": fact["python"]},
        "code": lambda fact: {"source": fact["code"]},
        "packages": lambda fact: fact["packages"],
        "accelerators": lambda fact: {
            "kinds": sorted({(gpu["name"], gpu["memory"], gpu["driver"]) for gpu in fact["gpus"]})
        },
    }
    for check, view in views.items():
        wanted = view(reference)
        odd = False
        for name, fact in facts.items():
            found = view(fact)
            differing = [
                f"{key} {found[key]}, {first} has {wanted[key]}" for key in wanted if found[key] != wanted[key]
            ]
            if differing:
                odd = True
                findings.append(Finding(check, name, "fault", "; ".join(differing), advice[check]))
        if not odd:
            told = (
                f"{wanted.get('torch') and 'torch ' + wanted['torch']}"
                if check == "packages"
                else next(iter(wanted.values()))
            )
            findings.append(Finding(check, "*", "ok", f"{told or 'none'}, the same on every host"))
    return findings


def _collectives(found: Mapping[str, Any], several: bool) -> list[Finding]:
    rows = []
    for name in ("all_reduce", "all_gather"):
        if name in found:
            speed, correct = found[name]["bytes_per_second"], found[name]["correct"]
            words = f"{speed / 1e9:.2f} GB/s over each rank's link" + ("" if correct else ", and the result is WRONG")
            slow = several and speed < SLOW_BYTES_PER_SECOND
            level = "fault" if not correct else "warning" if slow else "ok"
            advice = (
                "a rank or link corrupts data: take hosts out one by one"
                if not correct
                else "is this the fast network's interface?"
            )
            rows.append(Finding(name, "*", level, words, advice if level != "ok" else ""))
    if "clocks" in found:
        times = [moment for _, moment in found["clocks"]]
        skew = max(times) - min(times)
        good = skew < CLOCK_SECONDS
        rows.append(
            Finding(
                "clocks",
                "*",
                "ok" if good else "warning",
                f"within {skew:.1f} s",
                "" if good else "start chrony or ntpd",
            )
        )
    return rows
