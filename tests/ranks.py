"""Runs a function of a test module on several gloo ranks, each a process of its own, and returns what every rank returned."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
_RUNNER = """
import importlib, os, pickle, sys
sys.path[:0] = [{repo!r}, {tests!r}, {folder!r}]
module, name, arguments = pickle.load(open({call!r}, "rb"))
from grads_ds import ranks
ranks.start()
result = getattr(importlib.import_module(module), name)(*arguments)
pickle.dump(result, open({results!r} + "/" + os.environ["RANK"], "wb"))
ranks.finish()
sys.stdout.flush()
os._exit(0)  # as the command does: gloo's threads outlive their groups, and the interpreter's end among them aborts now and then
"""


def run_on_ranks(world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 240) -> list[Any]:
    """Call `function(*arguments)` (top level of its module) on `world` ranks; fails with the output of a rank that failed."""
    with tempfile.TemporaryDirectory() as results:
        call = Path(results, "call")
        folder = str(Path(sys.modules[function.__module__].__file__ or "").parent)
        module = Path(sys.modules[function.__module__].__file__ or "").stem
        call.write_bytes(pickle.dumps((module, function.__name__, arguments)))
        code = _RUNNER.format(repo=str(REPO), tests=str(REPO / "tests"), folder=folder, call=str(call), results=results)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        processes = []
        for rank in range(world):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
            }  # fmt: skip
            output = open(Path(results, f"log{rank}"), "w")  # noqa: SIM115
            processes.append(
                subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
        try:
            statuses = [process.wait(timeout=seconds) for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        logs = [Path(results, f"log{rank}").read_text()[-4000:] for rank in range(world)]
        assert not any(statuses), "\n".join(f"rank {r} ended with {s}:\n{logs[r]}" for r, s in enumerate(statuses) if s)
        if os.environ.get("SHOW_RANKS"):
            print("\n".join(logs))
        return [pickle.loads(Path(results, str(rank)).read_bytes()) for rank in range(world)]
