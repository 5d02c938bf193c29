"""Is the cluster fit for a run? Every host is looked at the way a job would use it, and compared
with the others.

`examine` (for `grads-ds doctor`) tries ssh, runs launcher/doctor/on_host.py on every slot through
the very backend a job would use, and turns what comes back into findings. `glance` (for `grads-ds
run`) asks every host once for what it is like and starts no job. What the facts mean stands in
launcher/doctor/findings.py. No torch import.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from grads_ds.config.errors import UserError
from grads_ds.launcher import backends
from grads_ds.launcher.backends import SUPERVISOR
from grads_ds.launcher.doctor.comparison import compare_hosts
from grads_ds.launcher.doctor.findings import Facts, Finding, check_host
from grads_ds.launcher.doctor.links import check_collectives, check_connectivity
from grads_ds.launcher.hosts import Host
from grads_ds.launcher.job import Placement, run_job
from grads_ds.launcher.job_outcome import DONE
from grads_ds.launcher.records import read
from grads_ds.launcher.rendezvous import INTERFACES
from grads_ds.launcher.timeouts import Timeouts

_WORDS = [sys.executable, str(SUPERVISOR.parent / "doctor/on_host.py")]
LIMITS = Timeouts(start=60.0, lost=15.0, hang=60.0, grace=3.0, settle=3.0)
# what of this environment decides what a host finds; the rest comes with the job
_CARRIED = ("PATH", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "CUDA_VISIBLE_DEVICES", *INTERFACES)


def examine(
    place: Placement, run_dir: Path, files: Sequence[str], ops: Sequence[str]
) -> list[Finding]:
    """Look at every host.

    `files` are the model and data paths that a run reads, `ops` what DeepSpeed loads for the
    config.
    """
    findings: list[Finding] = []
    question = {"run_dir": str(run_dir.resolve()), "files": list(files)}
    backend = backends.load(place.backend)
    if backend.ENTRY != "here":
        if problems := backend.problems(place.hosts):
            return [Finding("start", "*", "problem", problem) for problem in problems]
        quick = json.dumps(question | {"files": []})
        answers = backend.ask(place.hosts, [*_WORDS, "--quick"], quick, place.ssh_port)
        for host in place.hosts:
            answer = answers[host.name]
            lost = isinstance(answer, str)
            found = str(answer) if lost else "entered without a password"
            findings.append(
                Finding(backend.ENTRY, host.address, "problem" if lost else "ok", found)
            )
        if any(isinstance(answer, str) for answer in answers.values()):
            return findings
    limited = replace(place, limits=LIMITS)
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        outcome = run_job(
            "doctor", [*_WORDS, json.dumps(question)], limited, run_dir / "logs", shown=False
        )
    except UserError as error:
        return findings + [Finding("start", "*", "problem", problem) for problem in error.problems]
    except OSError as error:
        found = f"{run_dir}: {error.strerror or error}"
        return [*findings, Finding("run directory", "*", "problem", found, "make it writable here")]
    folder = max((run_dir / "logs/doctor").iterdir())
    if outcome.status == DONE:
        findings.append(Finding("start", "*", "ok", f"every rank started, by {place.backend}"))
    else:
        found = f"{outcome.sentence}: {_core(outcome.error)}".rstrip(": ")
        findings.append(Finding("start", outcome.host or "*", "problem", found, f"see {folder}"))
    return findings + judge_hosts(place.hosts, folder, ops)


def _core(error: str) -> str:
    """The one line of an error that says most: a supervisor's own, else the last."""
    lines = [line.strip() for line in error.splitlines() if re.search(r"\w", line)]
    return next((line for line in lines if "grads-ds: " in line), lines[-1] if lines else "")


def judge_hosts(hosts: Sequence[Host], folder: Path, ops: Sequence[str]) -> list[Finding]:
    """Findings from what the ranks wrote into the job folder."""
    firsts = [sum(host.slots for host in hosts[:i]) for i in range(len(hosts))]
    facts = [read(folder / f"host{first}.json") for first in firsts]
    known = [(host, fact) for host, fact in zip(hosts, facts, strict=True) if fact]
    findings = _judge(known, len(hosts), ops)
    speeds = []
    for host, first in zip(hosts, firsts, strict=True):
        reach = read(folder / f"reach{first}.json")
        findings += check_connectivity(host.address, reach)
        if reach.get("megabits"):
            speeds.append(int(reach["megabits"]))
    slowest = min(speeds) if speeds else None
    return findings + check_collectives(read(folder / "collective.json"), slowest, len(hosts) > 1)


def _judge(known: Sequence[tuple[Host, Facts]], hosts: int, ops: Sequence[str]) -> list[Finding]:
    findings = [
        finding
        for host, fact in known
        for finding in check_host(host.address, fact, host.slots, hosts > 1, ops)
    ]
    return findings + compare_hosts({host.address: fact for host, fact in known})


def glance(
    place: Placement, run_dir: Path, files: Sequence[str], ops: Sequence[str]
) -> tuple[dict[str, str], list[Finding]]:
    """What a run can know of its hosts within a second or two: (why a host cannot be asked, by
    name; findings of the others).

    Versions, code, accelerators, interfaces, disk, permission, limits, fingerprints of model and
    data; no job, no collective. Every backend has its own way to ask. A host that takes longer than
    launcher/ask_hosts.py allows is one that cannot be asked.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    carried = {name: os.environ[name] for name in _CARRIED if name in os.environ}
    chosen = place.environment()
    carried |= {k: v for k, v in chosen.items() if k in ("DS_ACCELERATOR", *INTERFACES)}
    question = {"run_dir": str(run_dir.resolve()), "files": list(files), "environment": carried}
    backend = backends.load(place.backend)
    answers = backend.ask(place.hosts, [*_WORDS, "--quick"], json.dumps(question), place.ssh_port)
    lost = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    known = [
        (host, answer) for host in place.hosts if not isinstance(answer := answers[host.name], str)
    ]
    return lost, _judge(known, len(place.hosts), ops)
