"""What a recording depends on: score parts of another recording are never mixed in."""

from __future__ import annotations

import json
import platform
from pathlib import Path

from grads_ds import scores
from grads_ds.config.columns import DRAWING, idle_keys, wants_reference
from grads_ds.config.config import Config
from grads_ds.distributed import ranks
from grads_ds.distributed.host_consistency import check_hosts_agree
from grads_ds.run_dir.provenance import package_versions, source_commit


def recording_of(config: Config, run_dir: Path, model_path: str) -> scores.Recording:
    """What the scores depend on and how this start makes them. Raises UserError where hosts differ.

    Every rank calls this.
    """
    pool_dir = run_dir / "prepared/pool"
    extras = config.probe.extras
    reference: dict[str, str | Path] = (
        {"anchor": run_dir / "prepared" / config.anchor_set()} if wants_reference(extras) else {}
    )
    facts = check_hosts_agree({"data": pool_dir, "model": model_path, **reference})
    during = config.probe.record == "during" and config.probe.epochs > 0
    model = config.model.model_dump(
        mode="json", include={"dtype", "attention", "trust_remote_code"}
    )
    probe = config.probe.inputs() if during else config.probe.recording_inputs()
    if not during:  # the anchor counts by its content below, controls are recorded by themselves
        for name in {"anchor", "controls", *idle_keys(extras)}:
            probe.pop(name, None)
    inputs = {
        "model": model_path,
        "model files": facts[f"model {model_path}"],
        "pool": facts[f"data {pool_dir}"],
        **{f"model.{name}": value for name, value in model.items()},
        **{f"probe.{name}": value for name, value in probe.items()},
    }
    if extras:
        inputs |= {
            "probe.extras": sorted(extras),
            "model before": config.model.path if "early" in extras else None,
        }
        if set(DRAWING) & set(extras):
            inputs |= {"seed": config.seed, "data.max_length": config.data.max_length}
        inputs |= {what: facts[f"{what} {path}"] for what, path in reference.items()}
    if during:
        inputs |= {"seed": config.seed, "model.lora": config.model.model_dump(mode="json")["lora"]}
        inputs["deepspeed"] = config.deepspeed_json()
    start = {
        "ranks": ranks.world(),
        "hosts": sorted(set(ranks.all_gather_object(platform.node()))),
        "versions": package_versions(),
        "code": facts["code of grads_ds"],
        "source_commit": ranks.from_main(source_commit),
    }
    return scores.Recording(inputs, start)


def trained_with(done_file: Path, model_dir: Path) -> str | None:
    try:
        return str(json.loads(done_file.read_text())["key"]) if model_dir.is_dir() else None
    except (FileNotFoundError, ValueError, KeyError):
        return None
