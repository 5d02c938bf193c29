"""The stacks of all ranks in one sentence: which rank, on which host, is where, and what the others
wait in.

Reads the `rank<N>.stack` files that Python's faulthandler wrote ("most recent call first").
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

_FRAME = re.compile(r'  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>\S+)')
_WAITS = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "_all_gather_base",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "broadcast_object_list",
    "barrier",
    "monitored_barrier",
    "all_to_all",
    "all_to_all_single",
    "gather",
    "scatter",
    "send",
    "recv",
    "wait",
    "synchronize",
    "init_process_group",
    "reduce",
)
_COLLECTIVES = re.compile(r"torch/distributed/|deepspeed/comm/|/torch/cuda/")


@dataclass(frozen=True)
class Frame:
    """Where a rank's main thread is: the innermost call, the collective it waits in, the innermost
    line of other code.
    """

    call: str
    collective: str | None
    at: str


def main_thread(text: str) -> Frame | None:
    """The place of the last dump's main thread in a faulthandler file, or None."""
    parts = re.split(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*$", text, flags=re.M)
    if len(parts) < 2:
        return None
    # faulthandler lists threads newest first: the main thread is the last of a dump, and the last
    # dump is the latest
    threads = [[match.groupdict() for match in _FRAME.finditer(part)] for part in parts[1:]]
    frames = threads[-1]
    if not frames:
        return None
    # on GPUs the hooks of a backward pass run in a thread of their own
    if frames[0]["function"] == "_engine_run_backward":
        frames = next(
            (t for t in threads[:-1] if any(_COLLECTIVES.search(f["file"]) for f in t)), frames
        )
    collective = next(
        (
            f["function"]
            for f in reversed(frames)
            if _COLLECTIVES.search(f["file"]) and f["function"] in _WAITS
        ),
        None,
    )
    own = next(
        (
            f
            for f in frames
            if "/site-packages/" not in f["file"] and "/lib/python" not in f["file"]
        ),
        frames[0],
    )
    file = "/".join(own["file"].split("/")[-2:])
    return Frame(frames[0]["function"], collective, f"{file}:{own['line']} in {own['function']}")


def sentence(stacks: Mapping[int, str], hosts: Mapping[int, str]) -> str:
    """One sentence about where `stacks` (text by rank) stand, the odd ones first."""
    places = {rank: main_thread(text) for rank, text in stacks.items()}
    known = {rank: place for rank, place in places.items() if place}
    if not known:
        return "no rank answered with its stack"
    groups: dict[tuple[str | None, str], list[int]] = defaultdict(list)
    for rank, place in known.items():
        groups[place.collective, "" if place.collective else place.at].append(rank)
    waiting = {key: ranks for key, ranks in groups.items() if key[0]}
    elsewhere = {key: ranks for key, ranks in groups.items() if not key[0]}
    parts = [
        f"{_names(ranks, hosts)} in {known[ranks[0]].call} ({at})"
        for (_, at), ranks in elsewhere.items()
    ]
    # nobody is elsewhere: ranks that wait in different collectives are the clue
    if len(waiting) > 1 or not elsewhere:
        common = Counter({key: len(ranks) for key, ranks in waiting.items()})
        ordered = sorted(waiting.items(), key=lambda item: common[item[0]])
    else:
        ordered = list(waiting.items())
    for (collective, _), ranks in ordered:
        parts.append(f"{_names(ranks, hosts)} waiting in {collective} ({known[ranks[0]].at})")
    silent = [rank for rank, place in places.items() if place is None]
    if silent:
        parts.append(f"{_names(silent, hosts, verb=False)} gave no stack")
    return "; ".join(parts)


def _names(ranks: list[int], hosts: Mapping[int, str], verb: bool = True) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} on {hosts.get(ranks[0], '?')}{' is' if verb else ''}"
    shown = ", ".join(str(rank) for rank in ranks[:6]) + (
        f" and {len(ranks) - 6} more" if len(ranks) > 6 else ""
    )
    return f"ranks {shown}{' are' if verb else ''}"
