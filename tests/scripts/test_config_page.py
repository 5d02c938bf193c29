"""docs/config.md is what the config records say, and holds every key."""

from __future__ import annotations

import re

from grads_ds.config.config import Config
from scripts import config_page


def test_the_config_page_is_what_the_records_say() -> None:
    assert config_page.PAGE.read_text() == config_page.page(), (
        "run: python scripts/config_page.py --write"
    )


def test_the_page_has_every_key_under_its_section_with_its_meaning() -> None:
    shown, section = set(), ""
    for line in config_page.PAGE.read_text().splitlines():
        if line.startswith("## "):
            section = "" if line == "## Top level" else line.removeprefix("## ") + "."
        elif found := re.match(r"\| `(\w+)`[ †]*\|.*\| ([^|]*) \|$", line):
            shown.add(section + found[1])
    assert shown == set(config_page.keys(Config))
    assert {"probe.epochs", "model.lora.r", "select.filters.column"} <= shown


def test_every_key_but_sections_has_a_description() -> None:
    schema = Config.model_json_schema()
    silent = [
        f"{name}.{key}"
        for name, record in schema["$defs"].items()
        for key, field in record["properties"].items()
        if not field.get("description")
    ]
    assert silent == []
