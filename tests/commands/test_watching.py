"""Looking again and again: redrawn on a terminal, plain where there is none, over when there is no
more to come.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import REPO
from grads_ds.cli import main
from grads_ds.commands.watching import watched
from grads_ds.run_dir.units import mark_done


def looks(*texts: str) -> Callable[[], tuple[str, bool]]:
    left = list(texts)
    return lambda: (left.pop(0), bool(left))


def test_without_a_terminal_each_new_text_is_printed_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert watched(looks("step 1", "step 1", "step 2"), 0.2) == 0
    said = capsys.readouterr().out
    assert said.count("step 1") == 1 and said.endswith("step 2\n") and "\x1b" not in said


def test_watching_an_idle_run_says_so_and_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark_done(tmp_path, "prepare", {}, [], 3.0)
    assert main(["status", str(tmp_path), "--watch"]) == 0
    assert "nobody at work" in capsys.readouterr().out
    assert main(["status", str(tmp_path), "--watch", "0"]) == 2


def test_a_terminal_is_redrawn_in_place_and_keeps_the_last_text() -> None:
    code = (
        "from grads_ds.commands.watching import watched\n"
        "texts = ['first\\nlong line', 'last']\n"
        "raise SystemExit(watched(lambda: (texts.pop(0), bool(texts)), 0.2))"
    )
    said, status = in_terminal(code)
    assert status == 0
    assert "\x1b[Hfirst\x1b[K\r\nlong line\x1b[K\r\n\x1b[J" in said
    assert said.endswith("\x1b[?1049llast\r\n")


def test_the_command_draws_on_the_terminal_and_shows_names_as_text(tmp_path: Path) -> None:
    mark_done(tmp_path / "run\x1b[2J", "prepare", {}, [], 3.0)
    arguments = ["status", str(tmp_path / "run\x1b[2J"), "--watch"]
    said, status = in_terminal(
        f"from grads_ds.cli import main\nraise SystemExit(main({arguments}))"
    )
    assert status == 0 and said.startswith("\x1b[?1049h\x1b[H")
    assert "run\\x1b[2J" in said and "\x1b[2J" not in said


def test_the_keyboard_ends_it_without_a_complaint() -> None:
    code = (
        "from grads_ds.commands.watching import watched\n"
        "raise SystemExit(watched(lambda: ('still', True), 0.2))"
    )
    said, status = in_terminal(code, interrupt=True)
    assert status == 0 and said.endswith("\x1b[?1049lstill\r\n")


def in_terminal(code: str, interrupt: bool = False) -> tuple[str, int]:
    """What `code` writes on a terminal of its own, and its exit status."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said, deadline = b"", time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        said += chunk
        if interrupt and b"still" in said:
            interrupt = False
            process.send_signal(signal.SIGINT)
    os.close(ours)
    return said.decode(), process.wait(10)
