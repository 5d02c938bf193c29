"""What facts about hosts mean for a run: findings, with advice where something is wrong. Pure
functions; reads and writes nothing.

The facts are those of launcher/doctor/facts.py from every host; what has to be the same everywhere
is held against what most hosts have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grads_ds.launcher.doctor.facts import wrong_interfaces

FREE_DISK, FREE_SHARED_MEMORY, OPEN_FILES = 20 * 2**30, 2**30, 4096
CLOCK_SECONDS = 5.0
LOCK_SECONDS = 900.0  # no op takes as long to compile
# Below these, collectives of 4 MiB are told as slow. scripts/bench/bench_collectives.py measured
# (docs/results/bench_collectives.json): gloo reaches 0.98 and more of links of 0.1 to 2 Gbit/s, so
# that less than a third of an idle link has a cause; on a link that is faster than memory is copied
# gloo reached 2.1 to 2.5 GB/s, whatever the link, and half of that is asked of it at most. Nothing
# faster than 10 Gbit/s, no NCCL and no latency between hosts was at hand. Where the kernel names no
# speed: half of gigabit Ethernet.
USUAL_SHARE = 0.3
GLOO_BYTES_PER_SECOND = 1e9
SLOW_BYTES_PER_SECOND = 50e6
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at on one host (or on all: `*`).

    `level` is ok, warning or fault.
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

    def row(check: str, good: bool, found: str, advice: str, level: str = "fault") -> Finding:
        return Finding(check, name, "ok" if good else level, found, "" if good else advice)

    gpus, place = fact["gpus"], fact["run_dir"]
    memory, files, disk = fact["shared_memory"], fact["open_files"], place["free"]
    rows = [
        row(
            "accelerators",
            not gpus or len(gpus) >= slots,
            gpu_words(gpus),
            f"slots={slots} here: lower it, or mend the driver",
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
    for path, told in fact["files"].items():
        if "error" in told:
            advice = "copy it there, or mount the shared file system"
            rows.append(
                Finding("files", name, "fault", f"{path} cannot be read: {told['error']}", advice)
            )
    if several:
        loop = (fact["resolved"] or "127.").startswith("127.")
        found = f"{fact['host']} resolves to {fact['resolved'] or 'nothing'}"
        advice = (
            "ranks are told their interface here, but other tools will listen on loopback: mend"
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
                "a killed start leaves it and later ones wait for ever: if nothing compiles there"
                f" now, rm {lock['path']}"
            )
            rows.append(
                row(
                    "op lock",
                    False,
                    found,
                    advice,
                    "fault" if lock["seconds"] > LOCK_SECONDS else "warning",
                )
            )
    return rows


def gpu_words(gpus: Sequence[Mapping[str, str]]) -> str:
    """Number, kind, memory and driver of a host's accelerators."""
    if not gpus:
        return "none, ranks compute on the CPU"
    kinds = sorted(
        {f"{gpu['name']}, {int(gpu['memory']) // 1024} GiB, driver {gpu['driver']}" for gpu in gpus}
    )
    return f"{len(gpus)} x {'; '.join(kinds)}"


_SAME: dict[str, tuple[Callable[[Facts], Mapping[str, Any]], str]] = {
    "python": (lambda fact: {"python": fact["python"]}, "use the same environment on every host"),
    "code": (
        lambda fact: {"source": fact["code"]},
        "update the checkout on every host to the same commit",
    ),
    "packages": (
        lambda fact: fact["packages"],
        "install the same versions on every host (constraints.txt)",
    ),
    "accelerators": (
        lambda fact: {"": gpu_words(fact["gpus"])},
        "ranks wait for the slowest and break at the smallest: use equal hosts",
    ),
    "files": (
        lambda fact: {path: told.get("digest") for path, told in fact["files"].items()},
        "copy it again",
    ),
}


def compare_hosts(facts: Mapping[str, Facts]) -> list[Finding]:
    """What has to be equal on all hosts, against what most of them have (the first one's, where
    there is no majority).
    """
    findings = []
    for check, (view, advice) in _SAME.items():
        views = {name: view(fact) for name, fact in facts.items()}
        if not views:
            continue
        odd = False
        wanted = {
            key: _most([str(v.get(key)) for v in views.values()])
            for key in next(iter(views.values()))
        }
        for name, found in views.items():
            differing = []
            for key, usual in wanted.items():
                if str(found.get(key)) == usual or (check == "files" and found.get(key) is None):
                    continue  # an unreadable file has its own finding
                other = next(n for n, v in views.items() if str(v.get(key)) == usual)
                differing.append(
                    f"{key} differs from {other}'s"
                    if check == "files"
                    else f"{key} {found.get(key)}, {other} has {usual}".strip()
                )
            if differing:
                odd = True
                findings.append(Finding(check, name, "fault", "; ".join(differing), advice))
        if not odd:
            findings.append(Finding(check, "*", "ok", _same_words(check, wanted)))
    return findings


def _most(values: Sequence[str]) -> str:
    known = Counter(value for value in values if value != "None")
    return known.most_common(1)[0][0] if known else "None"


def _same_words(check: str, wanted: Mapping[str, str]) -> str:
    if check == "files":
        return f"{len(wanted)} paths, the same on every host"
    if check == "packages":
        return f"torch {wanted.get('torch')}, the same on every host"
    return f"{next(iter(wanted.values()))}, the same on every host"


def check_connectivity(name: str, reach: Mapping[str, Any]) -> list[Finding]:
    """Whether one host enters every other one."""
    advice = (
        "open the ports between the hosts (--ports LOW-HIGH names them), or set GLOO_SOCKET_IFNAME"
        " and NCCL_SOCKET_IFNAME"
    )
    return [
        (
            Finding(f"way to {other}", name, "fault", fault, advice)
            if fault
            else Finding(f"way to {other}", name, "ok", f"reached through {reach['interface']}")
        )
        for other, fault in reach.get("cannot", {}).items()
    ]


def check_collectives(
    found: Mapping[str, Any], megabits: int | None, several: bool
) -> list[Finding]:
    """Correctness and speed of the collectives, held against the slowest link's speed; and how far
    clocks are apart.
    """
    rows = []
    link = megabits * 1e6 / 8 if megabits else None
    usual = USUAL_SHARE * link if link else SLOW_BYTES_PER_SECOND
    if found.get("backend") == "gloo":
        usual = min(usual, GLOO_BYTES_PER_SECOND)
    for name in ("all_reduce", "all_gather"):
        if name not in found:
            continue
        speed, correct = found[name]["bytes_per_second"], found[name]["correct"]
        words = f"{speed / 1e9:.2f} GB/s over each rank's link"
        if several:
            words += f" of {link / 1e9:.2f} GB/s" if link else " of unknown speed"
            words += f" (usual: {usual / 1e9:.2f} and more)"
        if not correct:
            advice = "a rank or link corrupts data: take hosts out one by one"
            rows.append(Finding(name, "*", "fault", words + ", and the result is WRONG", advice))
        elif several and speed < usual:
            rows.append(
                Finding(
                    name,
                    "*",
                    "warning",
                    words,
                    "is this the fast network's interface, and is it idle?",
                )
            )
        else:
            rows.append(Finding(name, "*", "ok", words))
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
