"""The user's input is wrong: the exception, and how a near miss of a name is worded.

Standard library only.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """The user's input is wrong.

    Carries every problem found; the command line prints them all and exits with status 2.
    """

    def __init__(self, problems: Sequence[str] | str):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; valid here: {', '.join(names)}" if names else ""
