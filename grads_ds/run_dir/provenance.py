"""What a run was made with: the resolved config, package versions, the source commit."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from grads_ds.config.config import Config
from grads_ds.run_dir.ownership import MARKER
from grads_ds.run_dir.publish import publish_text, sweep

RESOLVED = "resolved.yaml"
_DIGEST = "# sha256 of the lines below: "
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


def save_config(config: Config, run_dir: Path) -> None:
    """Write the resolved config with package versions and the source commit to `resolved.yaml`,
    when it differs. Its first line is the sha256 of the others.
    """
    tree = config.model_dump(mode="json")
    tree["provenance"] = {
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "source_commit": source_commit(),
    }
    path, text = run_dir / RESOLVED, resolved_text(tree)
    for published in (run_dir / MARKER, path):  # the run is this start's alone by now
        sweep(published)
    if not path.is_file() or path.read_bytes() != text.encode():
        publish_text(path, text)


def resolved_text(tree: dict[str, Any]) -> str:
    """The text of `resolved.yaml`, its digest first."""
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return f"{_DIGEST}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def resolved_is_whole(run_dir: Path) -> bool:
    """Whether `resolved.yaml` is as it was written, or not there. Raises OSError."""
    path = run_dir / RESOLVED
    if not path.is_file():
        return True
    first, _, text = path.read_bytes().partition(b"\n")
    return first == f"{_DIGEST}{hashlib.sha256(text).hexdigest()}".encode()


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
    here = Path(__file__).resolve().parent.parent.parent
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
