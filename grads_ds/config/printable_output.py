"""What a command prints acts on no terminal: text of rows, files and hosts passes through here
whoever prints it, a library included.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from grads_ds.config.errors import printable

_RETURN = re.compile("(\r)")  # progress bars return to the begin of their line


class _Printable:
    """A text stream that spells what a terminal would act on, and is otherwise the one it wraps."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, printable. Raises what the stream raises."""
        parts = _RETURN.split(text)  # every second one is kept as it is
        self._stream.write("".join(p if i % 2 else printable(p) for i, p in enumerate(parts)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Standard output and error are printable for the length of a `with`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Printable(sys.stdout), _Printable(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
