"""What a host is like, as a run needs to know it: versions, code, accelerators, disk, limits,
tools, fingerprints of files.

Reads this host and the paths it is asked about; leaves nothing. Standard library only, so that a
host without torch can say so.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from grads_ds.launcher.network import address_of
from grads_ds.run_dir.digests import code_digest, content_digest

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "datasets",
    "pyarrow",
    "numpy",
    "peft",
    "safetensors",
    "pydantic",
)
# files up to the first are read whole, of larger ones three pieces
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
# what DeepSpeed compiles for offload, fused Adam and NVMe
OPS = ("cpu_adam", "fused_adam", "async_io")


def host_facts(asked: dict[str, Any]) -> dict[str, Any]:
    """Facts about this host, none of which needs torch; `asked` names paths and, where none was
    forwarded, the environment.
    """
    environment = dict(os.environ) | asked.get("environment", {})
    name = socket.gethostname()
    try:
        resolved = socket.gethostbyname(name)
    except OSError:
        resolved = None
    return {
        "host": name,
        "resolved": resolved,
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "code": code_digest(),
        "gpus": _gpus(environment),
        "run_dir": _run_dir(Path(asked["run_dir"])),
        "shared_memory": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "tools": {
            tool: shutil.which(tool, path=environment.get("PATH"))
            for tool in ("g++", "ninja", "nvcc")
        },
        "ops": {op: _built(op, environment) for op in OPS},
        "op_locks": {op: lock for op in OPS if (lock := _lock(op, environment))},
        "files": {path: _content(path) for path in asked["files"]},
        "interfaces": {name: address_of(name) for _, name in socket.if_nameindex()},
        "chosen_interfaces": {
            name: environment[name] for name in INTERFACE_VARIABLES if environment.get(name)
        },
    }


def _built(op: str, environment: dict[str, str]) -> str | None:
    """How an op of DeepSpeed is there: "pre-built" with the package, "compiled" by an earlier start
    here; None: neither.
    """
    for folder in map(Path, sys.path):
        if any((folder / "deepspeed/ops").rglob(f"{op}_op*.so")):  # where DS_BUILD_OPS=1 puts them
            return "pre-built"
    with contextlib.suppress(OSError):
        if any(_compiled_below(environment).rglob(f"{op}.so")):
            return "compiled"
    return None


def _lock(op: str, environment: dict[str, str]) -> dict[str, Any] | None:
    """The file by which one rank keeps others from an op while it compiles or looks at it, and its
    age in seconds; None: no such file.

    A killed rank leaves it behind, and every later one waits for it without end (torch 2.13.0,
    utils/file_baton.py).
    """
    with contextlib.suppress(OSError):
        for lock in _compiled_below(environment).rglob(f"{op}/lock"):
            return {"path": str(lock), "seconds": time.time() - lock.stat().st_mtime}
    return None


def _compiled_below(environment: dict[str, str]) -> Path:
    return Path(environment.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _content(path: str) -> dict[str, str]:
    """{"digest"} of the files at `path`, or {"error"} when one cannot be read."""
    try:
        return {"digest": str(content_digest(path))}
    except OSError as error:
        return {"error": error.strerror or str(error)}


def _gpus(environment: dict[str, str]) -> list[dict[str, str]]:
    """Name, driver and memory (MiB) of every NVIDIA GPU; empty without any."""
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in told.stdout.splitlines() if told.returncode == 0]
    return [{"name": row[0], "driver": row[1], "memory": row[2]} for row in rows if len(row) == 3]


def _run_dir(folder: Path) -> dict[str, Any]:
    """Free bytes where the run directory is, and why this host cannot write there (None when it
    can).
    """
    trial = folder / f".doctor.{socket.gethostname()}.{os.getpid()}"
    reason = None
    try:
        trial.write_text("x" * 4096)
        trial.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        return {"free": shutil.disk_usage(folder).free, "writable": reason}
    return {"free": 0, "writable": reason or "not there"}


def wrong_interfaces(fact: Mapping[str, Any]) -> list[str]:
    """Faults of the interfaces chosen by variables, on the host that `fact` describes."""
    faults = []
    there = ", ".join(
        f"{name} ({address})" for name, address in fact["interfaces"].items() if address
    )
    for variable, value in fact["chosen_interfaces"].items():
        if value.startswith(("^", "=")) or "," in value:
            continue  # NCCL's patterns and lists
        named = [name for name in fact["interfaces"] if name.startswith(value)]
        named = [name for name in named if name == value] or (
            named if variable.startswith("NCCL") else []
        )
        addresses = [fact["interfaces"][name] for name in named]
        if not named:
            faults.append(f"{variable}={value}: this host has no such interface; it has {there}")
        elif not any(addresses):
            faults.append(
                f"{variable}={value}: that interface has no address here; there are {there}"
            )
        elif all(address.startswith("127.") for address in addresses if address):
            faults.append(
                f"{variable}={value}: that is loopback, which leads to no other host; there are"
                f" {there}"
            )
    return faults
