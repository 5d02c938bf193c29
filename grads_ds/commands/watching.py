"""A command that looks again and again: one screen on a terminal, one report after the other where
there is none.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from grads_ds.config.errors import UserError, problem

SECONDS = 2.0
_HOME, _TO_END_OF_LINE, _TO_END = "\x1b[H", "\x1b[K", "\x1b[J"
_ASIDE, _BACK = "\x1b[?1049h", "\x1b[?1049l"  # the screen beside, and the one before


def add_watch(command: Any, until: str, seconds: float = SECONDS) -> None:
    """Declare `--watch [SECONDS]`."""
    command.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=seconds,
        metavar="SECONDS",
        help=f"look {until} (default: every {seconds:g} s)",
    )


def watched(look: Callable[[], tuple[str, bool]], seconds: float) -> int:
    """Show what `look` says (text, whether there is more to come) every so many seconds; 0 once
    there is no more, or when the keyboard interrupts.

    On a terminal the text is redrawn in place and the last one stays; elsewhere a text that differs
    from the one before is printed with its time. Raises UserError for fewer than 0.2 seconds.
    """
    if not 0.2 <= seconds < float("inf"):
        raise UserError(
            problem("--watch", "at least 0.2 seconds", f"{seconds:g}", "look less often")
        )
    terminal, before = sys.stdout.isatty(), ""
    if terminal:
        _act(_ASIDE)
    try:
        while True:
            earlier, (before, more) = before, look()
            if terminal:
                fitting = before.split("\n")[: max(1, shutil.get_terminal_size().lines - 1)]
                _act(_HOME)
                for line in fitting:
                    sys.stdout.write(line)
                    _act(f"{_TO_END_OF_LINE}\n")
                _act(_TO_END)
            elif before != earlier:
                sys.stdout.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n{before}\n")
            sys.stdout.flush()
            if not more:
                return 0
            time.sleep(seconds)
    except KeyboardInterrupt:
        return 0
    finally:
        if terminal:
            _act(_BACK)
            print(before, flush=True)


def _act(sequence: str) -> None:
    """Have the terminal do something: past sys.stdout, which lets text alone through."""
    assert sys.__stdout__ is not None
    sys.__stdout__.write(sequence)
