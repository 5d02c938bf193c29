"""The user's input is wrong: the exception, how a problem is worded, and how text from data is
printed.

Standard library only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

# control characters but line ends and tabs; marks that turn the direction of a line round, after
# which what is shown is not what is there; line and paragraph ends; halves of surrogate pairs
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# of the system's errors, those that a wrong path makes: the user's to fix; the others are the file
# system's own (run_dir/storage.py)
WRONG_PATH = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class UserError(Exception):
    """The user's input is wrong.

    Carries every problem found, printable; the command line prints them all and exits with
    status 2.
    """

    def __init__(self, problems: Sequence[str] | str):
        given = [problems] if isinstance(problems, str) else problems
        self.problems: list[str] = [printable(text) for text in given]
        super().__init__("\n".join(self.problems))


class StoppedBySignal(Exception):
    """A signal asked this process to end and it has kept what it had. `status`: 143, 129 after
    SIGHUP.
    """

    def __init__(self, text: str, status: int = 143):
        super().__init__(text)
        self.status = status


def problem(where: str, wanted: str, found: str, fix: str) -> str:
    """One problem of the user's input, as every command words it."""
    return f"{where}: wanted {wanted}; found {found}; {fix}"


def printable(text: str) -> str:
    """`text` with every character that a terminal or a page would act on spelled as an escape.

    Line ends and tabs stay. Escape sequences, other control characters, direction marks and halves
    of surrogate pairs, as they come with rows, file names and templates, become \\x1b, \\u202e, ...
    """
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode()


def nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; valid here: {', '.join(names)}" if names else ""
