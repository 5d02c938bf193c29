"""A forecast made with another DeepSpeed than the one simulated says so, once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from grads_ds.plan import replay_deepspeed_0_19 as replayed
from grads_ds.plan.timeline import Timeline
from grads_ds.plan.zero_settings import ZeroSettings

SETTINGS = ZeroSettings(3, 2, 2, 1e6, 1e6, 1e3, 1e9, 1e9, True)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    replayed._compare_version.cache_clear()
    yield
    replayed._compare_version.cache_clear()


@pytest.mark.parametrize(("installed", "said"), [("0.19.12", 0), ("0.20.1", 1), ("0.190.0", 1)])
def test_another_version_is_said_once(
    installed: str, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replayed.metadata, "version", lambda name: installed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            replayed.replay(Timeline([], {}), SETTINGS)
    found = [str(warning.message) for warning in caught]
    assert len(found) == said and all(f"found {installed}" in text for text in found)
