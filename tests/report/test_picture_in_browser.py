"""The picture of gain and forgetting in a real browser: on a phone and on a desk, light and dark,
one drawing is seen, its letters can be read, and nothing is wider than the window. Skipped without
Chromium.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.browser import PROGRAM, Browser, browser
from tests.report.html_page import report
from tests.report.synthetic_forgetting import LINE, write_forgetting
from tests.report.synthetic_run import make_run

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")

SEEN = "[...document.querySelectorAll('.forgetting svg')].filter((s) => s.clientWidth)"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("picture")
    config = make_run(folder, n=60, variants=False)
    models = {"selected": ("grads", 3000, 0.24, 0.010)} | LINE
    between = {"selected@0.5": ("selected", 0.5, None, 0.18, 0.003)}
    write_forgetting(Path(config.run_dir), models, between)
    report(config)
    with browser(tmp_path_factory.mktemp("profile")) as found:
        found.open(Path(config.run_dir) / "report.html")
        yield found


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_one_drawing_is_seen_and_can_be_read(window: Browser, width: int, scheme: str) -> None:
    shape = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    window.call("Emulation.setDeviceMetricsOverride", **shape)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    window.call("Emulation.setEmulatedMedia", features=features)
    assert window.evaluate(f"{SEEN}.length") == 1
    heights = f"{SEEN}.flatMap((s) => [...s.querySelectorAll('text.name, text.tick')])"
    letters = window.evaluate(
        f"{heights}.map((t) => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a)"
    )
    assert len(letters) > 8 and min(size for size in letters if size > 0) >= 10
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    ink, card = (
        window.evaluate(f"getComputedStyle(document.querySelector('{s}')).{p}")
        for s, p in ((".forgetting text.name.plain", "fill"), ("#forgetting", "backgroundColor"))
    )
    dark = [sum(map(int, colour[4:-1].split(","))) < 384 for colour in (ink, card)]
    assert dark == [scheme == "light", scheme == "dark"]
    assert window.complaints == []
