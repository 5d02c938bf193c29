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
from grads_ds.run_dir.layout import model_folder, trained_names

BASE = "base"


@dataclass(frozen=True)
class MadeModel:
    """`of`: the trained model it lies between the base and, at `alpha` (None: it is the base or a
    trained model itself).
    """

    name: str
    of: str | None = None
    alpha: float | None = None


def made_models(config: Config) -> list[MadeModel]:
    """The base first, then the trained models, then `evaluate.interpolate` of each."""
    trained = trained_names(config)
    between = [
        MadeModel(f"{name}@{alpha:g}", name, alpha)
        for name in trained
        for alpha in config.evaluate.interpolate
    ]
    return [MadeModel(BASE), *map(MadeModel, trained), *between]


@contextlib.contextmanager
def model_path(config: Config, run_dir: Path, model: MadeModel) -> Iterator[str]:
    """The folder (or the base's hub id) of a model for the length of a `with`. Every rank enters
    it; rank 0 merges.
    """
    if model.name == BASE:
        yield config.model.path
        return
    if model.of is None or model.alpha is None:
        yield str(run_dir / model_folder(model.name))
        return
    folder = run_dir / "evaluation" / ".between"
    of, alpha = run_dir / model_folder(model.of), model.alpha

    def merge() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        interpolate(base_folder(config), of, alpha, folder, heartbeat.beat)

    ranks.from_main(merge)
    try:
        yield str(folder)
    finally:
        ranks.barrier()
        if ranks.is_main():
            shutil.rmtree(folder, ignore_errors=True)
