"""The config refuses what it does not know, lists every fault at once, and resolves to the same
thing it saves.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grads_ds.config.deepspeed_file import preset_names
from grads_ds.config.errors import UserError
from grads_ds.config.load import load_config
from grads_ds.flow.host_needs import input_paths
from grads_ds.run_dir.provenance import save_config

REPO = Path(__file__).resolve().parents[2]
GOOD = {"run_dir": "runs/x", "model": {"path": "some/model"}, "data": {"train": ["rows.jsonl"]}}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return path


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return caught.value.problems


def test_every_fault_is_listed_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        model={"path": "m", "dtyp": "float32"},
        prob={},
        sft={"learning_rate": -1},
        data={"train": []},
    )
    text = "\n".join(faults(path))
    assert "model.dtyp: unknown key; did you mean dtype?" in text
    assert "prob: unknown key; did you mean probe?" in text
    assert "sft.learning_rate" in text and "-1" in text
    assert "data.train" in text


@pytest.mark.parametrize("budget", [0, 7.5, -0.1, 1.5, "some"])
def test_a_budget_is_a_fraction_a_count_or_auto(tmp_path: Path, budget: object) -> None:
    assert any(
        "select.budget" in fault for fault in faults(write(tmp_path, select={"budget": budget}))
    )


@pytest.mark.parametrize("budget", [0.05, 1.0, 2, 700, "auto"])
def test_good_budgets_pass(tmp_path: Path, budget: object) -> None:
    assert load_config(write(tmp_path, select={"budget": budget})).select.budget == budget


def test_overrides_replace_nested_values_and_are_validated(tmp_path: Path) -> None:
    path = write(tmp_path)
    config = load_config(
        path, ["sft.learning_rate=2e-4", "probe.layers=[lm_head]", "model.lora.r=4"]
    )
    assert config.sft.learning_rate == 2e-4
    assert config.probe.layers == ["lm_head"]
    assert config.model.lora is not None and config.model.lora.r == 4
    assert faults(path, "sft.learnin_rate=1")[0].startswith(
        "sft.learnin_rate: unknown key; did you mean learning_rate?"
    )
    assert "key=value" in faults(path, "nonsense")[0]


def test_variants_must_exist_and_be_valid(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        select={"variants": {"half": {"budget": 0}, "full": {}}},
        sft={"variants": ["hlf"]},
    )
    text = "\n".join(faults(path))
    assert "select.variants.half.budget" in text
    assert "select.variants.full: the name" in text
    assert "did you mean half?" in text


def test_a_run_directory_in_what_the_run_reads_is_refused(tmp_path: Path) -> None:
    """It would change its own inputs; also by another name of the folder."""
    (tmp_path / "rows/more").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "rows/more")
    for run_dir in ("rows", "rows/run", "rows/more/run", "link/run", "rows/../rows/run"):
        path = write(
            tmp_path, run_dir=f"{tmp_path}/{run_dir}", data={"train": [f"{tmp_path}/rows"]}
        )
        assert any("a folder outside of what the run reads" in text for text in faults(path))
    path = write(tmp_path, run_dir=f"{tmp_path}/rows2", data={"train": [f"{tmp_path}/rows"]})
    assert load_config(path).run_dir


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", "pool", "prepared.json", "a\n", ""])
def test_names_of_sets_and_subsets_name_no_other_folder(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, data={"train": ["r.jsonl"], "validation": {name: "r.jsonl"}})
    assert "set name" in faults(path)[0]
    if name not in ("pool", "prepared.json"):
        path = write(tmp_path, select={"variants": {name: {"method": "random"}}})
        assert "the name must be" in faults(path)[0]


def test_broken_yaml_names_its_line_and_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("run_dir: x\nmodel: {path: [\n")
    assert f"{path}:" in faults(path)[0]
    path.write_text("run_dir: x\nrun_dir: y\n")
    assert "duplicate key" in faults(path)[0]
    assert "wanted a configuration file" in faults(tmp_path / "absent.yaml")[0]
    path.write_text("")
    assert "empty file" in faults(path)[0]


def test_the_saved_config_loads_to_the_same_config(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, select={"budget": "auto", "variants": {"r": {"method": "random"}}})
    )
    save_config(config, tmp_path / "run")
    assert load_config(tmp_path / "run/resolved.yaml").model_dump() == config.model_dump()
    saved = yaml.safe_load((tmp_path / "run/resolved.yaml").read_text())
    assert saved["provenance"]["packages"]["torch"]


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    config = load_config(path)
    assert config.deepspeed_json()["zero_optimization"]["stage"] in (0, 1, 2, 3)


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload", "zero3_hpz"])
def test_a_preset_is_found_by_name_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("a file of the preset's name is not what is meant")
    config = load_config(write(tmp_path), [f"deepspeed={name}"])
    assert config.deepspeed_json()["zero_optimization"]["stage"] == int(name[4])
    assert name in preset_names()
    assert input_paths(config) == []
    with pytest.raises(UserError, match="not valid JSON"):
        config.model_copy(update={"deepspeed": f"./{name}"}).deepspeed_json()


@pytest.mark.parametrize("wrong", ["zero3_ofload", "configs/deepspeed/zero3_offload.json"])
def test_a_deepspeed_file_that_is_missing_names_the_presets(wrong: str, tmp_path: Path) -> None:
    config = load_config(write(tmp_path), [f"deepspeed={wrong}"])
    with pytest.raises(UserError, match="zero2, zero3, zero3_hpz, zero3_offload") as caught:
        config.deepspeed_json()
    assert "did you mean zero3_offload?" in str(caught.value)


def test_the_default_is_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(write(tmp_path)).deepspeed_json()["zero_optimization"]["stage"] == 3


def test_settings_of_sft_that_nothing_answers_are_refused_together(tmp_path: Path) -> None:
    sft = {"replay": 0.2, "weights": True, "adapter": True, "early_stopping": {"set": "domian"}}
    data = {"train": ["rows"], "validation": {"domain": "rows"}}
    found = "\n".join(faults(write(tmp_path, sft=sft, data=data)))
    assert "sft.replay: wanted general rows in data.replay" in found
    assert "sft.weights: wanted select.weights" in found
    assert "sft.adapter: wanted model.lora" in found
    assert (
        "sft.early_stopping.set: 'domian' is not one of data.validation; did you mean domain?"
        in found
    )
    data |= {"replay": "general"}
    good = write(
        tmp_path,
        sft=sft | {"early_stopping": {}, "adapter": False},
        data=data,
        select={"weights": "preference"},
    )
    assert load_config(good).data.replay == ["general"]
