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

from grads_ds.launcher.doctor.gpu_health import gpu_health
from grads_ds.launcher.network import address_of, is_loopback
from grads_ds.launcher.rendezvous import INTERFACES
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
        "machine": _machine(),
        "resolved": resolved,
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "code": code_digest(),
        "gpus": _gpus(environment),
        "gpu_health": gpu_health(environment),
        "visible_devices": environment.get("CUDA_VISIBLE_DEVICES"),
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
            name: environment[name] for name in INTERFACES if environment.get(name)
        },
    }


def _machine() -> str | None:
    """What two names of one machine have in common and two containers on it have not; None where
    the kernel does not say.
    """
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return ":".join([boot, *(os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid"))])
    return None


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
    return Path(
        environment.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    )


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
        listing = subprocess.run(query, capture_output=True, text=True, timeout=30, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in listing.stdout.splitlines() if listing.returncode == 0]
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
    """What is wrong with the interfaces chosen by variables, on the host that `fact` describes."""
    problems = []
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
            problems.append(f"{variable}={value}: this host has no such interface; it has {there}")
        elif not any(addresses):
            problems.append(
                f"{variable}={value}: that interface has no address here; there are {there}"
            )
        elif all(is_loopback(address) for address in addresses if address):
            problems.append(
                f"{variable}={value}: that is loopback, which leads to no other host; there are"
                f" {there}"
            )
    return problems
