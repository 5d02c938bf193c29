"""One fault that the tests make happen, and what has to come of it."""

from __future__ import annotations

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
