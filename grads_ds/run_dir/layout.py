"""Where everything lies in a run directory, and what is there for one configuration."""

from __future__ import annotations

from pathlib import Path

from grads_ds.config.config import Config

MAIN = "selected"  # the name of the main selection among the variants
PARTS = "prepared.parts"  # what prepare keeps while it runs


def trained_names(config: Config) -> list[str]:
    """The models SFT trains: the main selection and the variants, in a fixed order."""
    return [MAIN, *dict.fromkeys(config.sft.variants)]


def selection_folder(name: str) -> str:
    """Where a subset lies in the run directory."""
    return "selection" if name == MAIN else f"selection/variants/{name}"


def model_folder(name: str) -> str:
    """Where a trained model lies in the run directory."""
    return "sft/model" if name == MAIN else f"sft/variants/{name}/model"


def scores_unit(config: Config) -> str:
    """The unit that leaves the score table."""
    return (
        "probe/train"
        if config.probe.epochs > 0 and config.probe.record == "during"
        else "probe/record"
    )


def adapter_folder(name: str) -> str:
    """Where a trained model's LoRA adapter lies by itself in the run directory."""
    return str(Path(model_folder(name)).parent / "adapter")


def token_gates_folder(name: str) -> str:
    """Where a training keeps what its token gates are made of, while it runs."""
    return str(Path(model_folder(name)).parent / "token_gates")


def checkpoints_folder(unit: str) -> str:
    """Where a training unit keeps its checkpoints while it runs."""
    if unit == "probe/train":
        return "probe/checkpoints"
    return str(Path(model_folder(unit.removeprefix("sft/"))).parent / "checkpoints")


def snapshot_folder(name: str, share: float) -> str:
    """Where a trained model lies as it was after a share of its steps."""
    return str(Path(model_folder(name)).parent / "snapshots" / f"{share:g}")


def snapshot_folders(config: Config, name: str) -> dict[float, str]:
    """Share of the steps -> folder, of one trained model."""
    if name not in config.sft.followed([name]):
        return {}
    return {share: snapshot_folder(name, share) for share in sorted(set(config.sft.snapshots))}
