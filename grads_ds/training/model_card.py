"""The model card: what a trained model was made of, so that a folder found later still says it.

Reads the config, `prepared/prepared.json`, `selection/` and `scores/table.parquet`; returns the
text of the model's README.md. No torch.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from grads_ds.config.config import Config
from grads_ds.config.errors import printable
from grads_ds.run_dir.digests import sha256
from grads_ds.run_dir.layout import selection_folder
from grads_ds.run_dir.provenance import package_versions, source_commit
from grads_ds.training.token_gates import GateCounts


def model_card(
    config: Config, run_dir: Path, name: str, rows: int, steps: int, gate: GateCounts | None = None
) -> str:
    """The card of a trained model: data, method, budget, scores.

    Args:
        config: the run's config.
        run_dir: holds what the model was made of.
        name: the subset it was trained on.
        rows: their number.
        steps: optimizer steps, at most.
        gate: what the token gate did, if there is one.
    """
    sets = _json(run_dir / "prepared/prepared.json").get("sets", {})
    pool = sets.get("pool", {}).get("kept")
    settings = config.sft.inputs(exclude={"variants"})
    facts: list[tuple[str, Any]] = [
        ("base model", config.model.path),
        (
            "trained",
            (
                f"LoRA, {config.model.lora.model_dump()}, merged"
                if config.model.lora
                else "every parameter"
            ),
        ),
        (
            "pool",
            (
                f"{pool:,} samples of {', '.join(config.data.train)}"
                if pool is not None
                else ", ".join(config.data.train)
            ),
        ),
        (
            "rows trained on",
            f"{rows:,}"
            + (f", {config.sft.replay:.0%} of them general" if config.sft.replay else ""),
        ),
        ("optimizer steps", f"{steps:,} at most"),
        *([("tokens that count", str(gate))] if gate else []),
    ]
    if name == "full":
        facts.append(("selection", "none: the whole pool"))
    else:
        chosen = config.select.resolve(None if name == "selected" else name)
        report = _json(run_dir / selection_folder(name) / "selection.json")
        counts = report.get("counts", {})
        facts += [
            ("selection method", chosen.method),
            (
                "selection budget",
                (
                    f"{chosen.budget_tokens or chosen.budget}: {counts.get('selected')} of"
                    f" {counts.get('pool')} samples"
                ),
            ),
            ("scores' fingerprint", f"sha256 {sha256(run_dir / 'scores/table.parquet')}"),
        ]
    facts.append(("source commit", source_commit() or "unknown"))
    head = ModelCardData(
        base_model=config.model.path,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["grads-ds", "sft", name],
    )
    versions = ", ".join(f"{package} {version}" for package, version in package_versions().items())
    return "\n".join(
        [
            "---",
            head.to_yaml(),
            "---",
            "",
            (
                f"# {cell(Path(config.model.path).name)}, fine-tuned on"
                f" {'the whole pool' if name == 'full' else f'the subset {name}'}"
            ),
            "",
            (
                "Made by grads-ds: the pool was scored by its gradients, a subset was chosen, the"
                " base model was fine-tuned on it."
            ),
            "",
            "| | |",
            "|---|---|",
            *(f"| {what} | {cell(value)} |" for what, value in facts),
            "",
            "Settings of the training:",
            "",
            "```yaml",
            yaml.safe_dump({"seed": config.seed, "sft": settings}, sort_keys=False).strip(),
            "```",
            "",
            f"Versions: {versions}.",
            "",
        ]
    )


def cell(value: Any) -> str:
    """A value as it is read in a table of Markdown: no mark of Markdown or HTML acts."""
    text = html.escape(printable(str(value)), quote=False).replace("\n", " ")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
