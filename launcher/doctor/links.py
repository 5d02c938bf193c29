"""What the ways between hosts are like: who enters whom, how fast collectives go and whether they
are right, how far clocks are apart. Pure functions; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grads_ds.launcher.doctor.findings import Finding

CLOCK_SECONDS = 5.0
# Below these, collectives of 4 MiB count as slow. scripts/bench/bench_collectives.py measured
# (docs/results/bench_collectives.json): gloo reaches 0.98 and more of links of 0.1 to 2 Gbit/s, so
# that less than a third of an idle link has a cause; on a link that is faster than memory is copied
# gloo reached 2.1 to 2.5 GB/s, whatever the link, and half of that is asked of it at most. Nothing
# faster than 10 Gbit/s, no NCCL and no latency between hosts was at hand. Where the kernel names no
# speed: half of gigabit Ethernet.
USUAL_SHARE = 0.3
GLOO_BYTES_PER_SECOND = 1e9
SLOW_BYTES_PER_SECOND = 50e6


def check_connectivity(name: str, reach: Mapping[str, Any]) -> list[Finding]:
    """Whether one host enters every other one."""
    advice = (
        "open the ports between the hosts (--ports LOW-HIGH names them), or name the"
        " network: --interface"
    )
    return [
        (
            Finding(f"way to {other}", name, "problem", reason, advice)
            if reason
            else Finding(f"way to {other}", name, "ok", f"reached through {reach['interface']}")
        )
        for other, reason in reach.get("cannot", {}).items()
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
        rate = f"{speed / 1e9:.2f} GB/s over each rank's link"
        if several:
            rate += f" of {link / 1e9:.2f} GB/s" if link else " of unknown speed"
            rate += f" (usual: {usual / 1e9:.2f} and more)"
        if not correct:
            advice = "a rank or link corrupts data: take hosts out one by one"
            rows.append(Finding(name, "*", "problem", rate + ", and the result is WRONG", advice))
        elif several and speed < usual:
            rows.append(
                Finding(
                    name,
                    "*",
                    "warning",
                    rate,
                    "is this the fast network's interface, and is it idle?",
                )
            )
        else:
            rows.append(Finding(name, "*", "ok", rate))
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
