"""Every file in configs/ is one to start from: it loads, its batches fit, its JSON is strict."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from grads_ds.cli import main
from grads_ds.config.load import load_config
from grads_ds.training.division import check_training

REPO = Path(__file__).resolve().parents[2]
RANKS = {
    "quickstart": 2,
    "quickstart_real": 2,
    "7b_one_node": 8,
    "70b_eight_nodes": 64,
    "lora_70b_one_node": 8,
}


@pytest.mark.parametrize(
    "path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_config_and_its_batches_fit_the_ranks_it_is_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    config = load_config(path)
    ranks = RANKS[path.stem]
    assert not check_training(config, "probe", config.probe, ranks)
    assert not check_training(config, "sft", config.sft, ranks)
    assert set(config.sft.variants) <= {"full", *config.select.variants}


@pytest.mark.parametrize("name", [name for name in RANKS if "quickstart" not in name])
def test_the_memory_a_config_states_is_what_the_plan_says_and_fits(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPO)
    text = (REPO / f"configs/{name}.yaml").read_text()
    (stated,) = re.findall(
        r"# Expected memory of a GPU \(grads-ds plan (.*)\):\n#   (.*) of 80 GiB", text
    )
    # 2 when something does not fit
    assert main(["plan", f"configs/{name}.yaml", *stated[0].split()]) == 0
    found = re.findall(r"^(\w+): fits: ([\d.]+) of 80 GiB", capsys.readouterr().out, re.M)
    assert stated[1] == ", ".join(f"{stage} {memory}" for stage, memory in found)


@pytest.mark.parametrize(
    "path", sorted(REPO.glob("grads_ds/config/presets/*.json")), ids=lambda path: path.stem
)
def test_deepspeed_file_leaves_batch_sizes_and_precision_open(path: Path) -> None:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs), "duplicate key"
        return dict(pairs)

    settings = json.loads(path.read_text(), object_pairs_hook=once)
    assert settings["zero_optimization"]["stage"] == int(path.stem[4])
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ):
        assert settings[key] == "auto"
    assert settings["bf16"]["enabled"] == settings["fp16"]["enabled"] == "auto"
