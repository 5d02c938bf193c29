"""Tear a run down at every write, sync, rename and unlink of its single-process stages, and flip
bits in everything it leaves; after each, a new start must end with the undisturbed run's bytes or
with a clear error.

    python scripts/faults/torture.py [--every 1] [--flips 200] [--stages prepare select]

Needs a C compiler and Linux. Every attempt is a forked process on a copy of the run directory; the
calls are counted and broken by storage_shim.c, preloaded. Prints a table of Markdown
(docs/torture.md) and exits 1 when anything was silently wrong, stuck, or left behind.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
SHIM = Path(tempfile.gettempdir()) / f"storage_shim.{os.getuid()}.so"
KILL, FAIL, FULL = 1, 2, 3  # modes of the shim
ATTEMPTS = (("killed", KILL, 0), ("EIO", FAIL, errno.EIO), ("disk full", FULL, errno.ENOSPC))
SECONDS = 120  # a start that takes longer is stuck
WHOLE, REFUSED, WRONG, STUCK = "same bytes", "clear error", "WRONG", "STUCK"


def build_shim() -> Path:
    """Compile the shim, unless that was done since it changed."""
    source = Path(__file__).with_name("storage_shim.c")
    if not SHIM.exists() or SHIM.stat().st_mtime < source.stat().st_mtime:
        aside = SHIM.with_suffix(f".{os.getpid()}")
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(aside), str(source), "-ldl"]
        subprocess.run(command, check=True)
        aside.replace(SHIM)
    return SHIM


def attempt(work: Callable[[], None], arm: Callable[[], None] | None = None) -> int | str:
    """Exit status of `work` in a forked process, as the command line would give it; "killed"."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            _quiet()
            if arm is not None:
                arm()
            status = _status_of(work)
        finally:
            os._exit(status)
    deadline = time.time() + SECONDS
    while time.time() < deadline:
        done, ended = os.waitpid(child, os.WNOHANG)
        if done:
            return "killed" if os.WIFSIGNALED(ended) else os.WEXITSTATUS(ended)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return STUCK


def _quiet() -> None:
    sink = os.open(os.devnull, os.O_WRONLY)
    log = os.environ.get("TORTURE_LOG")
    if log:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)


def _status_of(work: Callable[[], None]) -> int:
    import traceback

    import small_run

    from grads_ds.config.errors import UserError
    from grads_ds.run_dir.storage import storage_status

    small_run.frozen_clock()
    try:
        work()
    except UserError as error:
        print("refused:", error, flush=True)
        return 2
    except BaseException as error:
        traceback.print_exc()
        return storage_status(error) or 1
    return 0


def crash_points(
    folder: Path, name: str, config: object, every: int, library: ctypes.CDLL
) -> tuple[int, Counter[tuple[str, str]]]:
    """(calls of the undisturbed stage, how the attempts ended by kind): `folder` holds the run just
    before stage `name`.
    """
    import small_run

    step = small_run.STEPS[name]
    before = folder.with_name("before")
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(folder, before, symlinks=True)

    def reset() -> None:
        shutil.rmtree(folder)
        shutil.copytree(before, folder, symlinks=True)

    def counted() -> None:
        step(config)
        Path(folder.with_name("count")).write_text(str(library.storage_shim_seen()))

    root = str(folder).encode()
    assert attempt(counted, lambda: library.storage_shim_arm(root, 0, 0, 0)) == 0
    calls = int(folder.with_name("count").read_text())
    wanted = small_run.outputs(folder)
    found: Counter[tuple[str, str]] = Counter()
    for kind, mode, number in ATTEMPTS:
        for n in range(1, calls + 1, every):
            reset()
            first = attempt(
                lambda: step(config),
                lambda n=n, mode=mode, number=number: library.storage_shim_arm(
                    root, n, mode, number
                ),
            )
            end, said = _ending(first, mode, number), ""
            if end is None:
                again = attempt(lambda: step(config))
                end = STUCK if again == STUCK else WHOLE if again == 0 else WRONG
                now, said = small_run.outputs(folder), ""
                changed = {n for n in wanted.keys() | now.keys() if wanted.get(n) != now.get(n)}
                if again == 0 and changed:
                    end, said = WRONG, f"; not the same: {', '.join(sorted(changed))}"
            if end != WHOLE:
                text = f"{name}: {kind} at call {n}: {end} (first start {first}{said})"
                print(text, file=sys.stderr, flush=True)
            found[kind, end] += 1
    reset()
    assert attempt(lambda: step(config)) == 0
    return calls, found


def _ending(first: int | str, mode: int, number: int) -> str | None:
    """What is wrong with how the broken start itself ended, or None."""
    if first == STUCK:
        return STUCK
    # a call whose failure is of no consequence (a leftover, the lock) may pass: the bytes tell
    allowed = {KILL: ("killed", 0), FAIL: (8, 0), FULL: (7, 0)}[mode]
    return None if first in allowed else f"{WRONG} status"


def flips(folder: Path, config: object, draws: int, seed: int = 0) -> dict[str, Counter[str]]:
    """Flip `draws` single bits in each kind of output; after each, a whole new start."""
    import small_run

    from scripts.faults.bit_flips import flip, kind_of

    draw = random.Random(seed)
    before = folder.with_name("finished")
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(folder, before, symlinks=True)
    wanted = small_run.outputs(folder)
    kinds: dict[str, list[Path]] = {}
    for file in sorted(before.rglob("*")):
        relative = file.relative_to(before)
        if file.is_file() and relative.parts[0] == "run" and file.stat().st_size:
            kinds.setdefault(kind_of(relative), []).append(relative)
    found: dict[str, Counter[str]] = {}
    for kind, files in kinds.items():
        found[kind] = Counter()
        for _ in range(draws):
            shutil.rmtree(folder)
            shutil.copytree(before, folder, symlinks=True)
            file = folder / draw.choice(files)
            flip(file, draw)
            if kind.startswith("scores/part"):  # read when the table has to be made again
                (folder / "run/state/probe.record.json").unlink()

            def start() -> None:
                for step in small_run.STEPS.values():
                    step(config)

            status = attempt(start)
            # the export lies outside the run: made before the damage, it is not made again
            now = small_run.outputs(folder)
            end = REFUSED if status in (1, 2, 8) else STUCK if status == STUCK else WHOLE
            changed = {n for n in wanted.keys() | now.keys() if wanted.get(n) != now.get(n)}
            if status == 0 and changed:
                end = WRONG
                print(f"{file.relative_to(folder)}: {sorted(changed)}", file=sys.stderr)
            found[kind][end] += 1
    return found


def main(options: argparse.Namespace) -> int:
    """Run both parts, print the tables; the exit status."""
    import small_run

    from conftest import make_tiny_model

    library = ctypes.CDLL(str(build_shim()))
    bad = 0
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base, "job")
        folder.mkdir()
        made = attempt(lambda: (make_tiny_model(Path(base, "model")), None)[1])
        assert made == 0, made
        config = small_run.make(folder, Path(base, "model"))
        small_run.warm(config)
        print("| stage | calls | broken at | ended |\n|---|---|---|---|")
        for name in small_run.STEPS:
            if options.stages and name not in options.stages:
                assert attempt(lambda name=name: small_run.STEPS[name](config)) == 0
                continue
            calls, found = crash_points(folder, name, config, options.every, library)
            for (kind, end), count in sorted(found.items()):
                print(f"| {name} | {calls} | {kind} | {end} {count} |", flush=True)
                bad += count if end != WHOLE else 0
        if options.flips:
            print("\n| output | flips | ended |\n|---|---|---|")
            for kind, ends in flips(folder, config, options.flips).items():
                text = ", ".join(f"{end} {count}" for end, count in sorted(ends.items()))
                print(f"| {kind} | {options.flips} | {text} |", flush=True)
                bad += ends[WRONG] + ends[STUCK]
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="only every n-th call")
    parser.add_argument("--flips", type=int, default=200, help="bits per kind of output")
    parser.add_argument("--stages", nargs="*", default=[], help="only these stages")
    if os.environ.get("LD_PRELOAD") != str(SHIM):
        build_shim()
        sys.path[:0] = [str(REPO)]
        environment = os.environ | {
            "LD_PRELOAD": str(SHIM),
            "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")]),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "HF_DATASETS_CACHE": str(Path(tempfile.gettempdir()) / "torture-cache"),
        }
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    sys.exit(main(parser.parse_args()))
