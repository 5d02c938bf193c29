"""One synthetic run and its page, for the tests of one file."""

from __future__ import annotations

import pytest

from grads_ds.config.config import Config
from tests.report.html_page import Page, report
from tests.report.synthetic_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Page]:
    config = make_run(tmp_path_factory.mktemp("report"))
    return config, report(config)
