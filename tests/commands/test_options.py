"""Limits and ways between hosts are options; every value that cannot be meant is named at once,
and a queued job gets them as they were given.
"""

from __future__ import annotations

import argparse

import pytest

from grads_ds.commands.options import add_placement, placement, placement_words
from grads_ds.config.errors import UserError
from grads_ds.launcher.timeouts import Timeouts


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_placement(parser)
    return parser.parse_args(["--ranks", "1", *words])


GIVEN = ["--lost-seconds", "300", "--grace-seconds", "600", "--hang-seconds", "7200"]
GIVEN += ["--start-seconds", "900", "--ssh-port", "2222", "--master-addr", "10.0.0.1"]
GIVEN += ["--interface", "ib0", "--ports", "29500-29600"]


def test_limits_and_ways_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    place = placement(parsed(*GIVEN))
    limits = Timeouts(start=900.0, lost=300.0, hang=7200.0, checkpoint=600.0)
    assert place.limits == limits
    assert (place.ssh_port, place.master_addr, place.interface) == (2222, "10.0.0.1", "ib0")
    assert placement(parsed(*placement_words(parsed(*GIVEN)))) == place


def test_every_value_that_cannot_be_meant_is_named() -> None:
    words = ["--lost-seconds", "0", "--grace-seconds", "nan", "--ssh-port", "70000"]
    words += ["--master-addr", "a;b", "--interface", "eth0 lo", "--ports", "²-3"]
    with pytest.raises(UserError) as caught:
        placement(parsed(*words))
    assert len(caught.value.problems) == 6
