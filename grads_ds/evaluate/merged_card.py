"""The README.md of a model that was not trained as it is: an interpolation, or the one that a limit
to forgetting chose. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from grads_ds.config.config import Config
from grads_ds.run_dir.provenance import package_versions, source_commit
from grads_ds.training.model_card import cell


def merged_card(
    config: Config, of: str, alpha: float | None, facts: Sequence[tuple[str, str]] = ()
) -> str:
    """The card of base + alpha (`of` - base), or of the trained model `of` itself."""
    base = config.model.path
    head = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["grads-ds", "sft", of, *(["merge"] if alpha is not None else [])],
    )
    between = f"base + {alpha:g} (trained - base), every weight" if alpha is not None else "none"
    rows = [
        ("base model", base),
        ("trained model", f"{of} of {config.run_dir}"),
        ("interpolation", between),
        *facts,
        ("source commit", source_commit() or "unknown"),
    ]
    versions = ", ".join(f"{package} {version}" for package, version in package_versions().items())
    title = f"{Path(base).name}, {'between it and' if alpha is not None else 'fine-tuned:'} {of}"
    return "\n".join(
        [
            "---",
            head.to_yaml(),
            "---",
            "",
            f"# {cell(title)}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {what} | {cell(value)} |" for what, value in rows),
            "",
            "How the training went, and on which rows, the trained model's own card says.",
            "",
            f"Versions: {versions}.",
            "",
        ]
    )
