"""The models that are evaluated: the base, every trained one, and what is made between them.

An interpolation is merged into a folder of its own for as long as it is read, and removed.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.distributed import heartbeat, ranks
from grads_ds.engine.base_folder import base_folder
from grads_ds.engine.interpolation import interpolate
from grads_ds.run_dir.layout import model_folder, snapshot_folder, snapshot_folders, trained_names

BASE = "base"


@dataclass(frozen=True)
class MadeModel:
    """`of`: the trained model that it is made of: at `alpha` between the base and it, or as it was
    after the share `steps` of its training. None: it is the base or a trained model itself.
    """

    name: str
    of: str | None = None
    alpha: float | None = None
    steps: float | None = None


def made_models(config: Config, run_dir: Path) -> list[MadeModel]:
    """The base first, then the trained models, their snapshots, and `evaluate.interpolate` of each
    but the frontier's.
    """
    trained = trained_names(config)
    followed = config.sft.followed(trained)
    snapshots = [
        MadeModel(f"{name}~{share:g}", name, steps=share)
        for name in followed
        for share, folder in snapshot_folders(config, name).items()
        if (run_dir / folder).is_dir()  # early stopping may have come before it
    ]
    between = [
        MadeModel(f"{name}@{alpha:g}", name, alpha)
        for name in followed
        for alpha in config.evaluate.interpolate
    ]
    return [MadeModel(BASE), *map(MadeModel, trained), *snapshots, *between]


def made_folder(run_dir: Path, of: str, steps: float | None) -> Path:
    """Where a trained model lies, or its snapshot."""
    return run_dir / (model_folder(of) if steps is None else snapshot_folder(of, steps))


@contextlib.contextmanager
def model_path(config: Config, run_dir: Path, model: MadeModel) -> Iterator[str]:
    """The folder (or the base's hub id) of a model for the length of a `with`. Every rank enters
    it; rank 0 merges.
    """
    if model.name == BASE:
        yield config.model.path
        return
    source = made_folder(run_dir, model.of or model.name, model.steps)
    if model.alpha is None:
        yield str(source)
        return
    folder, alpha = run_dir / "evaluation" / ".between", model.alpha

    def merge() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        interpolate(base_folder(config), source, alpha, folder, heartbeat.beat)

    ranks.from_main(merge)
    try:
        yield str(folder)
    finally:
        ranks.barrier()
        if ranks.is_main():
            shutil.rmtree(folder, ignore_errors=True)
