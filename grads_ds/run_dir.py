"""The run directory: what is finished, why something is due again, who is at work, and how files
are published.

Every unit of work (a stage, or a part of one such as one variant's training) leaves
`state/<unit>.json` when it is done: the inputs it was made from, a fresh id, and its output files
with their sizes. A unit is done while that record matches; its id is an input of the units
downstream, so that redoing one redoes those after it. No torch import.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from grads_ds.config import Config, UserError

# the holder touches its lock every few seconds; a lock this old has no holder
LOCK_STALE_SECONDS = 120.0
LOCK_BEAT_SECONDS = 5.0
LOCK_VARIABLE = "GRADS_DS_LOCK"
_PACKAGES = (
    "grads_ds",
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "peft",
    "accelerate",
    "pyarrow",
    "numpy",
    "mpi4py",
)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling (file or folder) of `path`; on success flush it to disk and rename
    it into place.

    On failure nothing is published and what stood at `path` is untouched. A folder replaces the old
    one as a whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield aside
        for file in [aside, *aside.rglob("*")] if aside.is_dir() else [aside]:
            _fsync(file)
        if aside.is_dir() and path.exists():
            old = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
            path.rename(old)
            aside.rename(path)
            _remove(old)
        else:
            aside.replace(path)
        _fsync(path.parent)
    finally:
        _remove(aside)


def publish_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as aside:
        aside.write_text(text)


def publish_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically. NaN is refused: it is not JSON."""
    publish_text(path, json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n")


def _fsync(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems refuse to sync folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---- finished units ------------------------------------------------------------------------------


def _marker(run_dir: Path, unit: str) -> Path:
    return run_dir / "state" / f"{unit.replace('/', '.')}.json"


def unit_id(run_dir: Path, unit: str) -> str | None:
    """The id of the unit's last completion, None when it never completed."""
    try:
        return str(json.loads(_marker(run_dir, unit).read_text())["id"])
    except (OSError, ValueError, KeyError):
        return None


def why_due(run_dir: Path, unit: str, inputs: Mapping[str, Any]) -> str | None:
    """None when the unit is done and its inputs are these; otherwise the reason it has to run, in
    words.
    """
    try:
        record = json.loads(_marker(run_dir, unit).read_text())
        then, outputs = record["inputs"], record["outputs"]
    except (OSError, ValueError, KeyError):
        return "not done yet"
    now = json.loads(json.dumps(inputs))
    if then != now:
        old, new = _flat(then), _flat(now)
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        shown = [
            (
                f"{key} changed"
                if len(str(new.get(key))) > 40 or len(str(old.get(key))) > 40
                else f"{key} was {old.get(key)}, now {new.get(key)}"
            )
            for key in changed[:3]
        ]
        return ", ".join(shown) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    for name, size in outputs.items():
        path = run_dir / name
        if not path.is_file():
            return f"{name} is gone"
        if path.stat().st_size != size:
            return f"{name} was altered"
    return None


def mark_done(
    run_dir: Path, unit: str, inputs: Mapping[str, Any], outputs: Sequence[str], seconds: float
) -> str:
    """Record the unit as done after `seconds`.

    `outputs` are files or folders in the run directory; returns the new id.
    """
    files: dict[str, int] = {}
    for name in outputs:
        path = run_dir / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                files[str(file.relative_to(run_dir))] = file.stat().st_size
    new_id = uuid.uuid4().hex
    publish_json(
        _marker(run_dir, unit),
        {
            "unit": unit,
            "id": new_id,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": round(seconds, 3),
            "inputs": inputs,
            "outputs": files,
        },
    )
    return new_id


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


# ---- the saved config ----------------------------------------------------------------------------


def save_config(config: Config, run_dir: Path) -> None:
    """Write the resolved config with package versions and the source commit to `config.yaml`, when
    it differs.
    """
    tree = config.model_dump(mode="json")
    tree["provenance"] = {
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "source_commit": source_commit(),
    }
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    path = run_dir / "config.yaml"
    if not path.is_file() or path.read_text() != text:
        publish_text(path, text)


def package_versions() -> dict[str, str]:
    """Installed versions of the packages a result depends on; packages that are absent are left
    out.
    """
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def source_commit() -> str | None:
    """The commit of the checkout this code runs from ('+' when it has uncommitted changes); None
    outside a checkout.
    """
    here = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
        dirty = subprocess.run(
            ["git", "-C", here, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (
        commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")
        if commit.returncode == 0
        else None
    )


# ---- who is at work ------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(run_dir: Path, what: str) -> Iterator[None]:
    """Hold the run directory. Raises UserError naming the holder when somebody else is at work in
    it.

    The lock is a file with host, pid and task, touched every few seconds; one whose holder is dead
    (same host) or silent for two minutes (any host) is taken over. A process started by the holder
    inherits the right through the environment.
    """
    path = run_dir / "lock.json"
    token = uuid.uuid4().hex
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if _holder(path).get("token") == os.environ.get(LOCK_VARIABLE, token):
            yield
            return
        _take(
            path,
            {
                "token": token,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process": _process(os.getpid()),
                "what": what,
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            },
        )
    except OSError as error:
        raise UserError(
            f"run_dir: wanted a folder to write in; found {run_dir}: {error.strerror or error}"
        ) from None
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, token, stop), daemon=True)
    beat.start()
    before = os.environ.get(LOCK_VARIABLE)
    os.environ[LOCK_VARIABLE] = token
    try:
        yield
    finally:
        stop.set()
        beat.join()
        os.environ.pop(LOCK_VARIABLE, None)
        if before is not None:
            os.environ[LOCK_VARIABLE] = before
        if _holder(path).get("token") == token:
            path.unlink(missing_ok=True)


def lock_holder(run_dir: Path) -> dict[str, Any] | None:
    """Who is at work in the run directory (host, pid, what, since); None when nobody is, or the
    holder is gone.
    """
    holder = _holder(run_dir / "lock.json")
    return (
        {key: holder.get(key) for key in ("host", "pid", "what", "since")}
        if _alive(run_dir / "lock.json", holder)
        else None
    )


def _take(path: Path, record: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.{record['token']}.tmp")
    try:
        # whole before it is a lock: a full disk or a kill leaves none without a holder
        aside.write_text(json.dumps(record))
        for _ in range(3):
            try:
                os.link(aside, path)
                return
            except FileExistsError:
                holder = _holder(path)
                who = (
                    f"{holder.get('what')} (pid {holder.get('pid')} on {holder.get('host')}, since"
                    f" {holder.get('since')})"
                )
                if _alive(path, holder):
                    raise UserError(
                        f"run_dir: {path.parent} is in use by {who}; wait for it or stop it"
                    ) from None
                with contextlib.suppress(OSError):  # another start may have been quicker
                    silent = time.time() - path.stat().st_mtime
                    gone = (
                        f"silent for {silent:.0f} s"
                        if silent > LOCK_STALE_SECONDS
                        else "which has ended"
                    )
                    print(
                        f"run_dir: {path.parent} was in use by {who}, {gone}: its lock is taken"
                        " over",
                        file=sys.stderr,
                    )
                path.unlink(missing_ok=True)
    finally:
        aside.unlink(missing_ok=True)
    raise UserError(
        f"run_dir: {path} keeps changing hands; is another start of this run under way?"
    )


def _holder(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def _alive(path: Path, holder: dict[str, Any]) -> bool:
    try:
        silent = time.time() - path.stat().st_mtime
    except OSError:
        return False
    if silent > LOCK_STALE_SECONDS:
        return False
    if holder.get("host") == socket.gethostname() and holder.get("pid"):
        # a host or container that came back gives the same small numbers to other processes
        process = _process(holder["pid"])
        return process is not None and holder.get("process", process) == process
    return True


def _process(pid: int) -> str | None:
    """What tells a process from another one of the same number, before or after it; None when there
    is none.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # when it started
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{after_name[19]}"
    except (OSError, IndexError):
        return None


def _beat(path: Path, token: str, stop: threading.Event) -> None:
    while not stop.wait(LOCK_BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
