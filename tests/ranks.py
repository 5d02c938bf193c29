"""Runs a function of a test module on several gloo ranks, each a process of its own, and returns
what every rank returned.

The ranks are forked from a server that has imported what they need and run none of it: importing
costs a rank more than most tests do.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grads_ds.launcher.network import open_door
from grads_ds.launcher.rendezvous import DOOR_VARIABLE

REPO = Path(__file__).resolve().parent.parent
multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.imported_by_ranks"])


def run_on_ranks(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    seconds: float = 240,
    start: str = "forkserver",
    joined: bool = True,
) -> list[Any]:
    """Call `function(*arguments)` (top level of its module) on `world` ranks; fails with the output
    of a rank that failed.

    start: spawn for what is read from the environment when a library is imported.
    joined: False where the function itself joins the ranks' process group.
    """
    context = multiprocessing.get_context(start)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(sys.modules[function.__module__].__file__ or "")
        module = ".".join(source.relative_to(REPO).with_suffix("").parts)
        Path(folder, "call").write_bytes(pickle.dumps((module, function.__name__, arguments)))
        door = open_door("127.0.0.1")
        job = os.environ | {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(door.getsockname()[1]),
            DOOR_VARIABLE: "",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        environments = [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        handed_down = [door, *[None] * (world - 1)]  # rank 0 inherits the socket
        processes = [
            context.Process(
                target=_rank,
                args=(folder, str(source.parent), os.getcwd(), environment, joined, handed),
            )
            for environment, handed in zip(environments, handed_down, strict=True)
        ]
        deadline = time.monotonic() + seconds
        try:
            for process in processes:
                process.start()
            door.close()
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            statuses = [process.exitcode for process in processes]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        logs = [
            file.read_text()[-4000:] if file.exists() else ""
            for file in _files(folder, "log", world)
        ]
        told = "\n".join(
            f"rank {r} ended with {s}:\n{logs[r]}" for r, s in enumerate(statuses) if s != 0
        )
        assert not any(status != 0 for status in statuses), told
        if os.environ.get("SHOW_RANKS"):
            print("\n".join(logs))
        return [pickle.loads(file.read_bytes()) for file in _files(folder, "result", world)]


def _files(folder: str, kind: str, world: int) -> list[Path]:
    return [Path(folder, f"{kind}{rank}") for rank in range(world)]


def _rank(
    folder: str,
    tests: str,
    place: str,
    environment: dict[str, str],
    joined: bool,
    door: socket.socket | None,
) -> None:
    """One rank, in its own process: the test's environment and place, its output in a file; rank 0
    with the socket at which the ranks meet.
    """
    rank = environment["RANK"]
    log = os.open(Path(folder, f"log{rank}"), os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.clear()
    os.environ.update(environment)
    if door is not None:
        os.environ[DOOR_VARIABLE] = str(door.detach())
    os.chdir(place)
    # a loader's workers are forked from it as from a rank of its own
    multiprocessing.set_start_method("fork", force=True)
    sys.path[:0] = [str(REPO), str(REPO / "tests"), tests]
    module, name, arguments = pickle.loads(Path(folder, "call").read_bytes())
    from grads_ds.distributed import ranks

    if joined:
        ranks.start()
    result = getattr(importlib.import_module(module), name)(*arguments)
    Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
    ranks.finish()
    sys.stdout.flush()
    # as the command leaves: gloo's threads outlive their groups, and the interpreter's end among
    # them aborts now and then
    os._exit(0)
