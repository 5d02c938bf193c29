"""The report as a browser would take it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from grads_ds.config.config import Config
from grads_ds.report import page
from grads_ds.report.stage import run_report

SECTIONS = ["headline", *(section.name for section in page.SECTIONS)]


class Page(HTMLParser):
    """The page as a browser would take it: elements, attributes, and the text of each section."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._section = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag in ("section", "header") and found.get("id"):
            self._section = str(found["id"])

    def handle_data(self, data: str) -> None:
        text = self.text.get(self._section, "") + data + " "
        self.text[self._section] = re.sub(r"\s+", " ", text)


def report(config: Config) -> Page:
    run_report(config, Path(config.run_dir))
    return Page((Path(config.run_dir) / "report.html").read_text(encoding="utf-8"))


def block(page: Page) -> dict[str, Any]:
    """The block of JSON that the page's script reads."""
    found = re.findall(
        r'<script type="application/json" class="row-data">(.*?)</script>', page.html
    )
    return dict(json.loads(found[0]))
