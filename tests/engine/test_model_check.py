"""Models of the hub are looked at before anything is loaded, as folders are."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import make_tiny_model
from grads_ds.engine.model_check import check_model


def test_a_hub_models_snapshot_is_looked_at_where_the_hub_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a model gone from the cache ends a stage before its ranks start."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (gone,) = check_model("org/tiny")
    assert "the model org/tiny from the hub or its cache (HF_HUB_OFFLINE is set)" in gone
    stored = tmp_path / "models--org--tiny"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs/main").write_text("0" * 40)
    folder = make_tiny_model(stored / "snapshots" / ("0" * 40))
    assert check_model("org/tiny") == []
    (folder / "model.safetensors").unlink()
    (found,) = check_model("org/tiny")
    assert "wanted weights" in found and str(folder) in found
