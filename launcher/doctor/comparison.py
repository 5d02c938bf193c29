"""What has to be equal on all hosts, held against what most of them have; and hosts that are one
machine. Pure functions; reads and writes nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grads_ds.launcher.doctor.findings import Facts, Finding, gpu_words

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
        lambda fact: {path: content.get("digest") for path, content in fact["files"].items()},
        "copy it again",
    ),
}


def compare_hosts(facts: Mapping[str, Facts]) -> list[Finding]:
    """What has to be equal on all hosts, against what most of them have (the first one's, where
    there is no majority).
    """
    findings = one_machine(facts)
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
                findings.append(Finding(check, name, "problem", "; ".join(differing), advice))
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


def one_machine(facts: Mapping[str, Facts]) -> list[Finding]:
    """Hosts of different names that are the same machine: their ranks would share its
    accelerators.
    """
    names = defaultdict(list)
    for name, fact in facts.items():
        if machine := fact.get("machine"):  # a host with an older checkout tells of none
            names[machine].append(name)
    return [
        Finding(
            "machine",
            name,
            "problem",
            f"is the same machine as {first}; ranks of both would compute on the same accelerators",
            "name every machine once, with all of its slots on that line",
        )
        for first, *others in names.values()
        for name in others
    ]
