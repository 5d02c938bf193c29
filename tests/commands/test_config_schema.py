"""`grads-ds config --schema`: accepts what the loader accepts, and names what it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from conftest import REPO
from grads_ds.cli import main
from grads_ds.config.config import Config
from grads_ds.config.load import load_config

LEAST: dict[str, Any] = {
    "run_dir": "runs/x",
    "model": {"path": "some/model"},
    "data": {"train": ["rows.jsonl"]},
}


@pytest.fixture
def schema(capsys: pytest.CaptureFixture[str]) -> Draft202012Validator:
    assert main(["config", "--schema"]) == 0
    found = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(path: Path, schema: Draft202012Validator) -> None:
    schema.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"train": "rows.jsonl", "replay": "general"}},
        {"data": {"train": ["a", "b"], "validation": {"d": "one", "g": ["two", "three"]}}},
        {"probe": {"layers": "all"}},
        {"probe": {"layers": "lm_head"}},
        {
            "probe": {
                "layers": ["embedding", "lm_head"],
                "extras": ["anchor"],
                "anchor": ["rows.jsonl"],
            }
        },
        {"select": {"budget": "auto"}},
        {"deepspeed": "zero3_hpz"},
    ],
)
def test_every_form_that_loads_is_valid(
    changes: dict[str, Any], schema: Draft202012Validator, tmp_path: Path
) -> None:
    tree = LEAST | changes
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    load_config(tmp_path / "config.yaml")
    schema.validate(tree)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prob": {}}, "prob"),
        ({"probe": {"epoch": 1}}, "epoch"),
        ({"sft": {"learning_rate": -1}}, "-1"),
        ({"model": {"path": "m", "dtype": "float8"}}, "float8"),
    ],
)
def test_what_does_not_load_is_invalid(
    changes: dict[str, Any], named: str, schema: Draft202012Validator
) -> None:
    errors = list(schema.iter_errors(LEAST | changes))
    assert errors and any(named in error.message for error in errors)


def test_every_key_is_described(schema: Draft202012Validator) -> None:
    sections = [Config, *(field.annotation for field in Config.model_fields.values())]
    silent = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in getattr(section, "model_fields", {}).items()
        if not field.description and not hasattr(field.annotation, "model_fields")
    ]
    assert silent == []
