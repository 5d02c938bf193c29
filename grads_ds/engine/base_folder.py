"""Where the base model's files lie on this machine."""

from __future__ import annotations

from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError, problem


def base_folder(config: Config) -> Path:
    """The base model's folder; of a hub id its snapshot in the hub's cache.

    Raises UserError where there is none.
    """
    path = Path(config.model.path)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(config.model.path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        wanted = "the base model's folder, or its hub id with the snapshot in the hub's cache"
        raise UserError(
            problem("model.path", wanted, config.model.path, "give the folder")
        ) from None
